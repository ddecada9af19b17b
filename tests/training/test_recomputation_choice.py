"""`auto` takes the fastest mode that fits the free memory, by the estimate."""

import pytest
import torch

from cogvideox_sat.configuration.recomputation import Recomputation
from cogvideox_sat.files.sizes import GIB
from cogvideox_sat.training import recomputation_choice
from cogvideox_sat.training.memory_estimate import Layout, estimate_memory
from cogvideox_sat.training.recomputation_choice import candidates, decide, fastest_that_fits, free_memory
from training_clips import write_dataset
from training_runs import assert_same, metrics, train, weights, write_config
from untrained_engines import ADAM, CLIP, engine_of


def test_attention_is_given_up_last():
    order = list(candidates(2))
    assert order == [Recomputation(*each) for each in ((0, 0), (0, 1), (0, 2), (1, 1), (2, 0))]
    needs = dict(zip(order, (90, 70, 50, 40, 30), strict=True))
    for free, index in ((100, 0), (90, 0), (89, 1), (50, 2), (49, 3), (30, 4), (0, 4)):
        assert fastest_that_fits(2, needs.__getitem__, free) == order[index]


def needed(engine, mode: object) -> int:
    engine.network.transformer.checkpoint_activations = mode
    memory = estimate_memory(engine, Layout.from_config(ADAM, torch.float32), CLIP, 2)
    return memory.total - memory.weights


@pytest.mark.parametrize(("mode", "spare"), [(False, 1.01), ("attention", 1.01), (True, 1.01), (True, 0.5)])
def test_it_fills_what_is_free(tiny, mode, spare, monkeypatch):
    engine = engine_of(tiny.config("2b"))
    layers = engine.network.num_layers
    free = int(needed(engine, mode) * spare / recomputation_choice.USABLE["cpu"])
    monkeypatch.setattr(recomputation_choice, "free_memory", lambda _: free)
    engine.network.transformer.checkpoint_activations = "auto"
    line = decide(engine, Layout.from_config(ADAM, torch.float32), CLIP, 2)
    chosen, order = engine.network.transformer.checkpoint_activations, list(candidates(layers))
    fitting = [each for each in order if needed(engine, each) <= needed(engine, mode) * spare]
    assert chosen == (fitting or [Recomputation(layers)])[0]
    assert order.index(chosen) <= order.index(Recomputation.of(mode, layers))
    assert line.startswith("checkpoint_activations: auto: ") and "\n" not in line
    assert line.endswith("so memory may run out") == (spare < 1)


def test_it_is_asked_for(tiny, monkeypatch):
    engine = engine_of(tiny.config("2b"))
    layout = Layout.from_config(ADAM, torch.float32)
    assert decide(engine, layout, CLIP, 1) is None
    assert engine.network.transformer.checkpoint_activations is False
    engine.network.transformer.checkpoint_activations = "auto"
    monkeypatch.setattr(recomputation_choice, "free_memory", lambda _: None)
    assert "not known" in decide(engine, layout, CLIP, 1)
    assert engine.network.transformer.checkpoint_activations == Recomputation(engine.network.num_layers)


def test_free_memory_of_a_cpu_is_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(recomputation_choice, "free_host_memory", lambda: 8 * GIB)
    assert free_memory(torch.device("cpu")) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 2 * GIB


@pytest.mark.slow
@pytest.mark.long
def test_a_run_goes_on_in_another_mode_to_the_bit(tmp_path, tiny, caplog):
    """Four steps without recomputation equal two, and two more with `auto`, which logs it."""
    clips = write_dataset(tmp_path / "clips", clips=4, frames=12, sizes=[(64, 96)])
    straight = train(write_config(tmp_path / "straight.yaml", tiny, "2b", clips, lora=True))
    config = write_config(tmp_path / "changed.yaml", tiny, "2b", clips, lora=True, save=str(tmp_path / "changed"))
    train(config, "--checkpoint_activations", "attention", "--save_interval", "2")
    (first,) = (tmp_path / "changed").iterdir()
    caplog.set_level("INFO")
    changed = train(config, "--resume", str(first / "2"), "--checkpoint_activations", "auto")
    assert metrics(changed) == metrics(straight)
    assert_same(weights(changed), weights(straight))
    (line,) = [each.getMessage() for each in caplog.records if "checkpoint_activations: auto" in each.getMessage()]
    assert "nothing recomputed of 2 layers" in line

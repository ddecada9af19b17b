"""The installed DeepSpeed has the undocumented parts in use; a missing one is named."""

import os
import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from safetensors.torch import save_file

from cogvideox_sat.configuration.deepspeed_runtime import runtime_config
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.training import deepspeed_adapter, deepspeed_engine
from cogvideox_sat.training.deepspeed_adapter import (
    CHECKED,
    ENGINE,
    LOSS_SCALE,
    OPTIMIZERS,
    PARTITIONED,
    check,
    loss_scale,
    set_loss_scale,
)
from cogvideox_sat.weights.diffusers_names import TABLES, assemble, to_diffusers
from cogvideox_sat.weights.loading import load_network
from cogvideox_sat.weights.stored_values import StoredValue
from distributed import run_distributed
from seeded import seed_module_
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from small_engines import arguments, build, linear_as_before  # noqa: F401  (a fixture)
from support import Reference, anonymous_growth

pytestmark = pytest.mark.usefixtures("linear_as_before")

ROOT = Path(__file__).parents[2]
BF16 = {"bf16": {"enabled": True}}
# Stage, dtype and section, by the class of the optimizer that DeepSpeed then takes.
ENGINES = {
    "EmaAdam": (0, torch.float32, {}),
    "DeepSpeedZeroOptimizer": (2, torch.float32, {}),
    "DeepSpeedZeroOptimizer_Stage3": (3, torch.float32, {}),
    "BF16_Optimizer": (1, torch.bfloat16, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_the_installed_version_has_all_that_is_used(kind):
    """`initialize` checks each engine, and its UserError names what is gone."""
    stage, dtype, section = ENGINES[kind]
    engine = build(arguments(stage, **section), dtype)
    assert type(engine.optimizer).__name__ == kind, "the class has another name now: see deepspeed_adapter.OPTIMIZERS"
    check(engine)


def test_every_optimizer_in_the_tables_is_tried():
    assert OPTIMIZERS.keys() < ENGINES.keys()


def stand_in(**without: str) -> SimpleNamespace:
    """Return a ZeRO-2 engine's stand-in; `without` removes an attribute of a part."""
    scaler = DynamicLossScaler(256.0, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    optimizer = type("DeepSpeedZeroOptimizer", (), {})()
    vars(optimizer).update(dict.fromkeys(OPTIMIZERS["DeepSpeedZeroOptimizer"]), loss_scaler=scaler)
    engine = SimpleNamespace(**dict.fromkeys(ENGINE), module=torch.nn.Linear(1, 1))
    engine.optimizer = optimizer
    for part, name in without.items():
        delattr({"engine": engine, "optimizer": optimizer, "scaler": scaler}[part], name)
    return engine


@pytest.mark.parametrize(
    ("part", "name", "says"),
    [
        *(("engine", name, f"{name} of the engine") for name in ENGINE if name != "optimizer"),
        *(("optimizer", name, f"{name} of DeepSpeedZeroOptimizer") for name in OPTIMIZERS["DeepSpeedZeroOptimizer"]),
        *(("scaler", name, f"{name} of the loss scale") for name in LOSS_SCALE),
    ],
)
def test_what_is_gone_is_named(part, name, says):
    check(stand_in())
    with pytest.raises(UserError, match=f"lacks {says}; install deepspeed=={CHECKED}"):
        check(stand_in(**{part: name}))


def test_an_engine_without_its_optimizer_or_parts_of_parameters_is_told_too(monkeypatch):
    with pytest.raises(UserError, match="optimizer of the engine"):
        check(stand_in(engine="optimizer"))
    engine = stand_in()
    engine.module.weight.ds_id = 1
    with pytest.raises(UserError, match="ds_shape of a parameter, ds_tensor of a parameter"):
        check(engine)
    monkeypatch.setattr(deepspeed_adapter.deepspeed, "ops", SimpleNamespace())
    with pytest.raises(UserError, match="__compatible_ops__"):
        check(stand_in())


def test_a_loss_scale_goes_on_where_it_was():
    engine, other = stand_in(), stand_in()
    scaler = engine.optimizer.loss_scaler
    for overflow in (False, True, True, False):
        scaler.update_scale(overflow)
    set_loss_scale(other, loss_scale(engine))
    assert loss_scale(other) == loss_scale(engine)
    assert loss_scale(other)["cur_iter"] == 4
    other.optimizer.loss_scaler = LossScaler(scale=8.0)
    set_loss_scale(other, loss_scale(engine))
    assert (loss_scale(other), other.optimizer.loss_scaler.cur_scale) == ({}, 8.0)


def test_no_other_module_names_what_is_not_documented():
    """But for the name of a module in stored files."""
    names = {*ENGINE, *LOSS_SCALE, *PARTITIONED, *chain(*OPTIMIZERS.values())}
    keys = {"optimizer", "zero_optimization", "overflow", "loss_scaler", "check_grad_overflow"}  # and words in files
    pattern = re.compile(
        rf"\b({'|'.join(sorted(names - keys))})\b|deepspeed\.ops\b|\.(overflow|loss_scaler|check_grad_overflow)\b"
        r"|\.zero_optimization\("
    )
    found = {
        f"{path.name}: {match[0]}"
        for folder in ("sat", "sgm", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "deepspeed_adapter.py"
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == {"weights.py: .loss_scaler"}


# ---------------------------------------------------------------------------------------------------------------------
# Starting ZeRO-3
# ---------------------------------------------------------------------------------------------------------------------


def divided(files: list[str], case: dict, dtype: torch.dtype, persistent: int) -> list[tuple[dict, int, int, int, int]]:
    """Return the weights, bytes and memory of each checkpoint in this process.

    They are the weights of all processes together, their bytes, the bytes that this process read and holds, and the
    growth of its memory.
    """
    from cogvideox_sat.parallel.process_groups import initialize_process_groups

    initialize_process_groups()
    os.environ["LOCAL_RANK"] = "0"  # as `initialize` sets it
    section = {"bf16": {"enabled": dtype == torch.bfloat16}}
    config, settings = arguments(3, "torch.optim.SGD", **section)
    config["optimizer"]["params"] = {"lr": 0.01}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent
    results, read = [], []
    fill = StoredValue.fill

    def counted(value: StoredValue, target: torch.Tensor, start: int, stop: int) -> None:
        read.append(max(stop - start, 0) * target.element_size())
        fill(value, target, start, stop)

    StoredValue.fill = counted
    for file in files:
        network = instantiate_on_meta(case).to(dtype)
        read.clear()

        def load(network=network, file=file) -> None:
            load_network(network, file, in_shares=True)
            deepspeed_engine.divide(network, runtime_config(config, deepspeed_engine.dtype_name(dtype)), dtype)

        grown = anonymous_growth(load)
        deepspeed_engine.initialize(network, config, settings, dtype)
        parameters = dict(network.named_parameters())
        held = sum(each.ds_tensor.numel() * each.element_size() for each in parameters.values())
        whole = {}
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[name] = parameter.detach().clone()
        size = sum(each.numel() * each.element_size() for each in whole.values())
        results.append((whole, size, sum(read), held, grown))
        del network, parameters
    return results


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.long
def test_each_process_reads_its_part_of_the_weights(tmp_path, dtype):
    """Each of two processes reads half of the bytes of both layouts, to the bit."""
    case = Reference("dit/t2v_2b").case["network_config"]
    case["params"].update(num_layers=3, hidden_size=768, num_attention_heads=12)
    network = seed_module_(instantiate_from_config(case))
    (tmp_path / "sat").mkdir()
    torch.save({"module": network.state_dict()}, tmp_path / "sat" / "mp_rank_00_model_states.pt")
    weights = network.state_dict()
    theirs = {name: assemble(pieces, weights).contiguous() for name, pieces in to_diffusers(weights).items()}
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    files = [str(tmp_path / "sat"), str(tmp_path / "theirs")]
    expected = instantiate_on_meta(case).to(dtype)
    load_network(expected, files[0])
    expected = dict(expected.named_parameters())
    ranks = run_distributed(divided, 2, files, case, dtype, 0)
    for number in range(len(files)):
        size = ranks[0][number][1]
        assert size > 80e6 * torch.finfo(dtype).bits / 32
        for whole, _, read, held, grown in (results[number] for results in ranks):
            assert whole.keys() == expected.keys()
            compared = whole.keys() - (TABLES if number else ())  # missing in diffusers' files
            assert all(torch.equal(whole[name], expected[name]) for name in compared)
            assert 0.49 * size < read < 0.51 * size
            assert held < 0.51 * size
            if dtype == torch.float32:  # otherwise Python's own memory is too large in comparison
                assert grown < 0.8 * size

"""The training command on tiny models: saving, resuming and several processes."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from cogvideox_sat.engine.precision import DTYPES
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, checkpoint_file, is_adapter, network_weights
from cogvideox_sat.weights.rank_shares import cuts_by_name, recut
from conftest import TinyModels
from long_cases import others_long
from support import FP16_PROCESSOR, needs_fp16
from training_clips import write_dataset
from training_runs import (
    LORA,
    assert_same,
    metrics,
    precomputed,
    runs_of,
    start,
    train,
    train_alone,
    train_in_processes,
    weights,
    write_config,
)
from videos import read_video

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=8, frames=12, sizes=[(64, 96)])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny, clips) -> Path:
    """Run four steps at batch 2 on one process without ZeRO, for comparison."""
    folder = tmp_path_factory.mktemp("one")
    return train(write_config(folder / "config.yaml", tiny, "5b", clips, micro_batch=2))


@pytest.mark.distributed
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, tiny, clips, one_process):
    run = train_in_processes(write_config(tmp_path / "config.yaml", tiny, "5b", clips), 2)
    assert metrics(run) == pytest.approx(metrics(one_process), rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one_process, "grad_norm"), rel=1e-4)
    assert_same(weights(run), weights(one_process), 1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("zero", others_long(3, 2, 1))
def test_zero_stages_on_two_processes_equal_one_process_without(tmp_path, tiny, clips, one_process, zero):
    run = train_in_processes(write_config(tmp_path / "config.yaml", tiny, "5b", clips, zero=zero), 2)
    assert metrics(run) == pytest.approx(metrics(one_process), rel=1e-5)
    assert_same(weights(run), weights(one_process), 1e-5)
    assert_same(weights(run, "-ema"), weights(one_process, "-ema"), 1e-5)


@pytest.mark.distributed
@pytest.mark.long
def test_an_adapter_under_zero_3_trains_as_without(tmp_path, tiny, clips):
    expected = train(write_config(tmp_path / "a.yaml", tiny, "5b_i2v", clips, lora=True, micro_batch=2, train_iters=3))
    save = str(tmp_path / "b")
    config = write_config(tmp_path / "b.yaml", tiny, "5b_i2v", clips, lora=True, zero=3, train_iters=3, save=save)
    run = train_in_processes(config, 2)
    assert metrics(run) == pytest.approx(metrics(expected), rel=1e-5)
    assert_same(weights(run), weights(expected), 1e-5)


@pytest.mark.long
def test_two_accumulated_batches_equal_one_of_twice_the_size(tmp_path, tiny, clips, one_process):
    config = write_config(
        tmp_path / "config.yaml", tiny, "5b", clips, deepspeed={"gradient_accumulation_steps": 2}, zero=1
    )
    run = train(config)
    assert metrics(run) == pytest.approx(metrics(one_process), rel=1e-5)
    assert_same(weights(run), weights(one_process), 1e-5)


@pytest.mark.distributed
def test_model_parallel_processes_equal_one(tmp_path, tiny, clips, one_process):
    """Both processes also encode a clip together, and a resumed run is equal."""
    config = write_config(
        tmp_path / "config.yaml",
        tiny,
        "5b",
        clips,
        micro_batch=2,
        model_parallel_size=2,
        save_interval=2,
        model={"first_stage_config": {"params": {"cp_size": 2}}},
    )
    run = train_in_processes(config, 2)
    assert metrics(run) == pytest.approx(metrics(one_process), rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one_process, "grad_norm"), rel=1e-4)
    shares = [torch.load(run / "4" / f"mp_rank_0{rank}_model_states.pt")["module"] for rank in range(2)]

    (run / "latest").write_text("2")
    shutil.rmtree(run / "4")
    train_in_processes(config, 2, "--resume", str(run))
    for rank, share in enumerate(shares):
        assert_same(torch.load(run / "4" / f"mp_rank_0{rank}_model_states.pt")["module"], share)


@pytest.mark.distributed
@pytest.mark.long
def test_an_adapter_that_processes_share_trains_as_on_one(tmp_path, tiny, clips):
    """A resumed run is equal to the bit, and one process can continue the parts of two."""
    settings = {"lora": True, "micro_batch": 2, "save_interval": 2, "zero": 1}
    one = train(write_config(tmp_path / "one.yaml", tiny, "2b", clips, save=str(tmp_path / "one"), **settings))
    config = write_config(tmp_path / "config.yaml", tiny, "2b", clips, model_parallel_size=2, **settings)
    run = train_in_processes(config, 2)
    losses, shares = metrics(run), shares_of(run / "4")
    assert losses == pytest.approx(metrics(one), rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    joined = recut(shares, cuts_by_name(shares[0]), 0, 1, "it")
    assert_same(joined, weights(one), 1e-5)
    averages = shares_of(run / "4-ema")
    assert_same(recut(averages, cuts_by_name(averages[0]), 0, 1, "it"), weights(one, "-ema"), 1e-5)

    shutil.rmtree(run / "4")
    (run / "latest").write_text("2")
    alone, apart = (shutil.copytree(run, tmp_path / name / run.name) for name in ("alone", "apart"))
    train_in_processes(config, 2, "--resume", str(run))
    assert metrics(run) == losses
    for rank, share in enumerate(shares_of(run / "4")):
        assert_same(share, shares[rank])

    train(config, "--resume", str(alone), "--model_parallel_size", "1")
    assert metrics(alone) == pytest.approx(losses, rel=1e-5)
    assert_same(weights(alone), joined, 1e-5)
    for file in (apart / "2" / "training_state").glob("optimizer-mp01-*"):
        file.unlink()
    with pytest.raises(AssertionError):
        train(config, "--resume", str(apart), "--model_parallel_size", "1")


def shares_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file)["module"] for file in sorted(folder.glob("mp_rank_*_model_states.pt"))]


@pytest.mark.parametrize(
    ("family", "lora", "cached"),
    others_long(("5b", False, False), ("2b", True, False), ("1.5_i2v", False, True), ("5b_i2v", True, True)),
)
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, tiny, clips, family, lora, cached):
    """Ten steps equal five, a kill -9 in the seventh, and five more from `latest`.

    Averages are included. If all weights are trained, the checkpoint is written in the background.
    """
    data = clips
    if cached:
        data = precomputed(tmp_path, tiny, family, clips)
    straight = write_config(tmp_path / "straight.yaml", tiny, family, data, lora, train_iters=10)
    expected = train_alone(straight)

    broken = write_config(
        tmp_path / "broken.yaml",
        tiny,
        family,
        data,
        lora,
        train_iters=10,
        save_interval=5,
        save=str(tmp_path / "broken"),
        background_checkpoints=not lora,
    )
    process = start(broken)
    for line in process.stdout:
        if line.startswith("step 7"):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = train_alone(broken, "--resume", "latest")

    assert metrics(run) == metrics(expected)
    assert_same(weights(run), weights(expected))
    assert_same(weights(run, "-ema"), weights(expected, "-ema"))


def conditioner_config(tiny: TinyModels, family: str) -> dict:
    return yaml.safe_load(tiny.config(family).read_text())["model"]["conditioner_config"]


def conditioner_without_files(tiny: TinyModels, family: str, folder: Path) -> dict:
    """Return the conditioner of a tiny model, with a text encoder that is not there."""
    config = conditioner_config(tiny, family)
    config["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "gone")
    return config


@pytest.mark.parametrize("family", others_long("1.5_i2v", "2b", "1.5", "5b_i2v"))
def test_cached_latents_give_the_losses_of_the_clips(tmp_path, tiny, clips, family):
    """Losses are equal in the first epoch, with the same clips, without VAE and T5."""
    expected = train(write_config(tmp_path / "clips.yaml", tiny, family, clips))
    data = precomputed(tmp_path, tiny, family, clips)
    without = {
        "first_stage_config": {"params": {"ckpt_path": str(tmp_path / "gone")}},
        "conditioner_config": conditioner_without_files(tiny, family, tmp_path),
    }
    run = train(
        write_config(tmp_path / "cached.yaml", tiny, family, data, save=str(tmp_path / "cached"), model=without)
    )
    assert metrics(run) == pytest.approx(metrics(expected), rel=1e-5)
    assert_same(weights(run), weights(expected), 1e-5)


@pytest.mark.long
def test_eight_clips_are_learnt_by_heart(tmp_path, tiny, clips):
    """The loss falls to a tenth.

    Latents are means and captions are kept, since a network cannot learn what it cannot know.
    """
    conditioner = conditioner_config(tiny, "5b")
    conditioner["params"]["emb_models"][0]["ucg_rate"] = 0.0
    regularizer = {"regularizer_config": {"params": {"sample": False}}}
    settings = {
        "model": {"conditioner_config": conditioner, "first_stage_config": {"params": regularizer}},
        "params": {"max_num_frames": 5, "video_size": [32, 48]},
    }
    data = precomputed(tmp_path, tiny, "5b", clips, **settings)
    config = write_config(
        tmp_path / "config.yaml",
        tiny,
        "5b",
        data,
        micro_batch=8,
        train_iters=300,
        log_interval=20,
        warmup=0.05,
        lr_decay_style="cosine",
        deepspeed={"optimizer": {"params": {"lr": 4e-3, "eps": 1e-8}}},
        **settings,
    )
    losses = list(metrics(train(config)).values())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("family", others_long("2b", "5b", "5b_i2v", "1.5", "1.5_i2v"))
def test_lora_changes_the_adapter_alone(tmp_path, tiny, clips, family):
    """The checkpoint has only the adapter, or with save_full also an unchanged base."""
    config = write_config(tmp_path / "config.yaml", tiny, family, clips, lora=True, train_iters=2, save_full=True)
    everything = weights(train(config))
    adapter = {name: tensor for name, tensor in everything.items() if is_adapter(name)}
    layers, projections, matrices = 2, 2, 2
    assert len(adapter) == layers * matrices * (3 + projections - 1)
    assert all(tensor.any() for tensor in adapter.values()), "the B matrices begin at zero"
    base = network_weights(checkpoint_file(tiny.folder / family))
    kept = {
        name.removeprefix(NETWORK_PREFIX).replace(".original.", "."): tensor
        for name, tensor in everything.items()
        if name not in adapter
    }
    assert_same(kept, base)

    alone = write_config(
        tmp_path / "alone.yaml", tiny, family, clips, lora=True, train_iters=2, save=str(tmp_path / "a")
    )
    assert_same(weights(train(alone)), adapter)


@pytest.mark.parametrize("family", ["2b", "5b_i2v", "1.5"])
def test_full_training_changes_what_is_trained(tmp_path, tiny, clips, family):
    run = train(write_config(tmp_path / "config.yaml", tiny, family, clips, train_iters=3, warmup=0.0))
    trained = weights(run)
    base = network_weights(checkpoint_file(tiny.folder / family))
    same = {name for name, tensor in base.items() if torch.equal(trained[NETWORK_PREFIX + name], tensor)}
    assert trained.keys() == {NETWORK_PREFIX + name for name in base}
    tables = {"mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight"}
    sincos = {"mixins.pos_embed.pos_embedding"} if family == "2b" else set()
    assert same - tables == sincos


def test_both_dialects_of_configurations_train_alike(tmp_path, tiny, clips):
    """Interpolation factors with the position embedding, or directly with the network."""
    usual = write_config(tmp_path / "usual.yaml", tiny, "2b", clips, train_iters=2)
    expected = metrics(train(usual))
    content = yaml.safe_load(tiny.config("2b").read_text())
    params = content["model"]["network_config"]["params"]
    embedding = params["modules"]["pos_embed_config"]["params"]
    for name in ("height_interpolation", "width_interpolation"):
        params[name] = embedding.pop(name)
    other = TinyModels(tmp_path)
    other.config("2b").write_text(yaml.safe_dump(content))
    run = train(write_config(tmp_path / "other.yaml", other, "2b", clips, train_iters=2, save=str(tmp_path / "other")))
    assert metrics(run) == expected


def test_sampling_with_a_trained_adapter(tmp_path, tiny, clips):
    """At `lora_scale` 0 exactly the base model's video, at 1 another."""
    import sample_video

    run = train(write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=3, warmup=0.0))
    (tmp_path / "prompts.txt").write_text("clip 3\n")
    lora = tmp_path / "sample.yaml"
    lora.write_text(yaml.safe_dump({"include": str(tiny.config("5b")), **LORA}))

    def sample(name: str, config: Path, *flags: str) -> torch.Tensor:
        size = ["--sampling_image_size", "64", "96", "--sampling_num_frames", "3", "--sampling_num_steps", "4"]
        out = ["--output_dir", str(tmp_path / name), "--input_file", str(tmp_path / "prompts.txt")]
        assert sample_video.main(["--base", str(config), *size, *out, *flags]) == 0
        return read_video(next((tmp_path / name).rglob("*.mp4")))[1]

    adapter = ["--lora_load", str(run)]
    base = sample("base", tiny.config("5b"))
    assert torch.equal(sample("off", lora, *adapter, "--lora_scale", "0"), base)
    assert not torch.equal(sample("on", lora, *adapter), base)
    assert not torch.equal(sample("average", lora, "--lora_load", f"{run}/3-ema"), base)


@pytest.mark.parametrize("number", others_long(signal.SIGTERM, signal.SIGINT))
def test_a_signal_finishes_the_step_and_saves(tmp_path, tiny, clips, number):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, train_iters=1000)
    process = start(config)
    for line in process.stdout:
        if line.startswith("step 3"):
            process.send_signal(number)
            break
    if number == signal.SIGTERM:  # some launchers send it twice
        process.send_signal(number)
    process.stdout.read()
    assert process.wait() == 0
    (run,) = runs_of(config)
    step = int((run / "latest").read_text())
    assert step >= 3
    assert max(metrics(run)) == step
    train(config, "--resume", "latest", "--train_iters", str(step + 1))
    assert max(metrics(run)) == step + 1


def test_resumed_from_an_earlier_step_its_checkpoints_are_the_last(tmp_path, tiny, clips):
    """Those of the future that was given up neither push them out nor stay."""
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, save_interval=2, keep_last=2)
    run = train(config)
    train(config, "--resume", str(run / "2"), "--keep_last", "1", "--train_iters", "3")
    assert (run / "latest").read_text() == "3"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"3", "3-ema"}
    assert set(metrics(run)) == {1, 2, 3}


def test_another_decoder_of_videos_is_reported_when_a_run_goes_on(tmp_path, tiny, clips, caplog):
    settings = {"lora": True, "train_iters": 1}
    run = train(write_config(tmp_path / "a.yaml", tiny, "2b", clips, **settings))
    state = json.loads((run / "1" / "training_state" / "state.json").read_text())
    assert state["reader"]["video_backend"] == "pyav"
    config = yaml.safe_load((run / "training_config.yaml").read_text())
    assert config["data"]["params"]["video_backend"] == "pyav"
    assert "videos were read with" not in caplog.text

    settings = {"lora": True, "train_iters": 2, "params": {"video_backend": "decord"}}
    other = write_config(tmp_path / "b.yaml", tiny, "2b", clips, **settings)
    train(other, "--resume", str(run))
    assert "resume: videos were read with pyav and are now read with decord" in caplog.text


def test_a_scheduler_of_deepspeed_goes_on_where_it_was(tmp_path, tiny, clips):
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    config = write_config(tmp_path / "a.yaml", tiny, "5b", clips, save_interval=2, deepspeed={"scheduler": scheduler})
    run = train(config)
    expected, rates = metrics(run), metrics(run, "lr")
    train(config, "--resume", str(run / "2"))
    assert metrics(run) == expected
    assert metrics(run, "lr") == rates


def test_adam_of_deepspeed_needs_no_compiler_on_a_cpu(tmp_path, tiny, clips):
    settings = {"params": {"video_size": [64, 96]}, "deepspeed": {"optimizer": {"type": "AdamW"}}}
    config = write_config(tmp_path / "a.yaml", tiny, "5b", clips, **settings)
    losses = metrics(train(config))
    assert losses[4] < losses[1]


def test_muon_learns_and_goes_on_to_the_bit(tmp_path, tiny, clips):
    optimizer = {"type": "sgm.muon.Muon", "params": {"lr": 0.01}}
    config = write_config(
        tmp_path / "a.yaml", tiny, "5b", clips, save_interval=2, train_iters=6, deepspeed={"optimizer": optimizer}
    )
    run = train(config)
    expected, result = metrics(run), weights(run)
    assert expected[6] < expected[1]
    train(config, "--resume", str(run / "2"))
    assert metrics(run) == expected
    assert_same(weights(run), result)


@pytest.mark.parametrize("background", others_long(True, False))
def test_a_process_killed_while_it_saves_leaves_a_checkpoint(tmp_path, tiny, clips, background):
    args = {"train_iters": 1000, "save_interval": 1, "keep_last": 2, "background_checkpoints": background}
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, **args)
    process = start(config)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        unfinished = [path.name for run in runs_of(config) for path in run.glob(".*.part")]
        if any(re.fullmatch(r"\.[3-9](-ema)?\.part", name) for name in unfinished):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    (run,) = runs_of(config)
    step = int((run / "latest").read_text())
    train(config, "--resume", "latest", "--train_iters", str(step + 2))
    assert max(metrics(run)) == step + 2
    assert not list(run.glob(".*.part"))
    assert {path.name for path in run.iterdir() if path.name.isdigit()} == {str(step + 1), str(step + 2)}
    assert {path.name for path in run.glob("*-ema")} == {f"{step + 1}-ema", f"{step + 2}-ema"}


@pytest.mark.slow
def test_a_run_is_refused_to_others_while_it_goes_on(tmp_path, tiny, clips, caplog):
    """Also after it has saved: a lock ends when its process closes any descriptor of the file."""
    from train_video import main

    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, train_iters=1000, save_interval=5)
    process = start(config)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((run / "latest").is_file() and int((run / "latest").read_text()) > 5 for run in runs_of(config)):
            break
    assert main(["--base", str(config), "--resume", "latest"]) == 2
    assert "resume: another process already continues" in caplog.text
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.distributed
@pytest.mark.long
def test_a_run_goes_on_with_other_processes_and_stages(tmp_path, tiny, clips, one_process):
    """One process at batch 2 is resumed by two at batch 1 with ZeRO-2, in the background."""
    behind = {"background_checkpoints": True}
    half = write_config(tmp_path / "half.yaml", tiny, "5b", clips, micro_batch=2, save_interval=2, **behind)
    run = train(half)
    (run / "latest").write_text("2")
    other = write_config(tmp_path / "other.yaml", tiny, "5b", clips, zero=2, save_interval=1, keep_last=2, **behind)
    train_in_processes(other, 2, "--resume", str(run))
    assert {path.name for path in run.iterdir() if path.name.isdecimal()} == {"3", "4"}
    assert metrics(run) == pytest.approx(metrics(one_process), rel=1e-5)
    assert_same(weights(run), weights(one_process), 1e-5)


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=needs_fp16), "bf16"])
def test_fp16_bf16_and_offload_train(tmp_path, tiny, clips, precision):
    sections = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, precision: {"enabled": True}}
    run = train(write_config(tmp_path / "config.yaml", tiny, "5b", clips, deepspeed=sections))
    assert all(loss < 5 for loss in metrics(run).values())
    assert {tensor.dtype for tensor in weights(run).values()} == {DTYPES[precision]}


@pytest.mark.skipif(FP16_PROCESSOR, reason="this processor computes in fp16")
def test_fp16_on_a_processor_without_it_trains_in_bf16(tmp_path, tiny, clips, caplog):
    """The losses are those of bf16, the log has one line, the run's configuration stays."""
    caplog.set_level("INFO")
    half, brain = (
        train(write_config(tmp_path / f"{name}.yaml", tiny, "5b", clips, deepspeed={name: {"enabled": True}}))
        for name in ("fp16", "bf16")
    )
    assert metrics(half) == metrics(brain)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    assert sum("so the arithmetic is bfloat16" in message for message in caplog.messages) == 1
    assert yaml.safe_load((half / "training_config.yaml").read_text())["deepspeed"]["fp16"]["enabled"]

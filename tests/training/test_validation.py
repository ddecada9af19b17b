"""The validation loss depends only on weights, clips and seed; videos are written."""

import logging
import random
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvideox_sat.clips.validation_clips import ValidationLoader, plan_batches, validation_key
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.runs import metrics as training_metrics
from cogvideox_sat.runs.videos import read_videos
from cogvideox_sat.training.validation import decodable, save_samples, validation_loss
from data_video import SFTDataset
from diffusion_video import SATVideoDiffusionEngine
from distributed import run_distributed
from long_cases import others_long
from videos import read_video

SMALL, WIDE = Bucket(9, 32, 64), Bucket(9, 32, 96)
SIZES = [SMALL[1:], WIDE[1:]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Write five clips of two shapes, with captions."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "labels").mkdir()
    for index, bucket in enumerate([SMALL, WIDE, SMALL, SMALL, WIDE]):
        generator = torch.Generator().manual_seed(index)
        with VideoWriter(folder / "videos" / f"{index}.mp4", 8, *bucket[1:]) as writer:
            colours = torch.rand(bucket.frames, 3, 1, 1, generator=generator) * 2 - 1
            writer.write(colours.expand(-1, -1, *bucket[1:]))
        (folder / "labels" / f"{index}.txt").write_text(f"clip {index}: grey/green?\n")
    return folder


def dataset_of(folder: Path, frames: int = 9) -> SFTDataset:
    return SFTDataset(str(folder), SIZES, fps=8, max_num_frames=frames, skip_frms_num=0, random_start=False)


@cache
def engine_of(config: Path) -> SATVideoDiffusionEngine:
    loaded = load_configs([config])
    torch.manual_seed(0)
    return SATVideoDiffusionEngine(Namespace(model_config=loaded["model"], load=loaded["args"]["load"]))


def loss_of(
    config: Path,
    folder: Path,
    batches: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 1,
    workers: int = 0,
) -> float:
    loader = ValidationLoader(
        dataset_of(folder),
        batches=batches,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world,
        num_workers=workers,
    )
    return validation_loss(engine_of(config), loader)


# ---------------------------------------------------------------- which clips


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_clip_counts_once_and_ranks_take_as_many_steps(batch_size, world):
    buckets = [SMALL, WIDE, SMALL, SMALL, WIDE]
    plans = [plan_batches(buckets, batch_size, 7, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    counted = [key.index for plan in plans for keys, weight in plan for key in keys if weight]
    assert sorted(counted) == list(range(5))
    for keys, weight in (batch for plan in plans for batch in plan):
        assert len({buckets[key.index] for key in keys}) == 1
        assert weight in (0, len(keys)) and 1 <= len(keys) <= batch_size
        assert all(key == validation_key(7, key.index) for key in keys)


def test_the_number_of_clips_is_limited_by_the_dataset(clips):
    def indices(batches: int, batch_size: int) -> list[int]:
        loader = ValidationLoader(dataset_of(clips), batches=batches, batch_size=batch_size, seed=0)
        assert len(list(loader)) == len(loader)
        return sorted(index for batch, _ in loader for index in batch["index"])

    assert indices(2, 2) == [0, 1, 2, 3]
    assert indices(100, 2) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- loss


@pytest.mark.slow
@pytest.mark.parametrize("family", ["2b", "1.5_i2v"])
@pytest.mark.long
def test_loss_does_not_depend_on_batches_or_on_when(tiny, clips, family):
    config = tiny.config(family)
    expected = loss_of(config, clips, 5, 1)
    torch.manual_seed(123)  # earlier random numbers do not matter
    random.seed(123)
    assert loss_of(config, clips, 5, 1, workers=1) == expected
    assert loss_of(config, clips, 3, 2) == pytest.approx(expected, rel=1e-5)
    assert loss_of(config, clips, 5, 1, seed=2) != pytest.approx(expected, rel=1e-3)
    assert loss_of(config, clips, 2, 1) != pytest.approx(expected, rel=1e-3)


def evaluation_of_rank(config: Path, folder: Path, output: Path) -> tuple[float, tuple[int, int], list[str]]:
    import torch.distributed as dist

    engine = engine_of(config)
    loss = loss_of(config, folder, 5, 1, dist.get_rank(), dist.get_world_size())
    written = save_samples(
        engine, dataset_of(folder), output, 1, count=1, seed=0, fps=8, only_latents=True, num_steps=1
    )
    return loss, engine.loss_fn.sigma_sampler.index_range(), [path.name for path in written]


@pytest.mark.distributed
@pytest.mark.slow
def test_loss_does_not_depend_on_the_number_of_processes(tiny, clips, tmp_path):
    """It is equal with stratified levels, and with five batches on two processes.

    The first process writes samples.
    """
    expected = loss_of(tiny.config("2b"), clips, 5, 1)
    assert engine_of(tiny.config("2b")).loss_fn.sigma_sampler.uniform_sampling
    losses, levels, written = zip(
        *run_distributed(evaluation_of_rank, 2, tiny.config("2b"), clips, tmp_path), strict=True
    )
    assert losses == pytest.approx([expected] * 2, rel=1e-5)
    assert levels == ((0, 500), (500, 1000)), "training goes on as before"
    assert written == (["0_clip_0_greygreen.safetensors"], [])


@pytest.mark.slow
def test_nothing_is_left_behind(tiny, clips, tmp_path):
    """Modes, gradients and the global random generators are as they were, also after an error."""
    engine = engine_of(tiny.config("5b"))
    loader = ValidationLoader(dataset_of(clips), batches=1, batch_size=1, seed=0)
    modes = []
    engine.network.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    for training in (True, False):
        engine.model.train(training)
        states = torch.get_rng_state(), random.getstate()
        validation_loss(engine, loader)
        save_samples(engine, dataset_of(clips), tmp_path, 1, count=1, seed=0, fps=8, only_latents=True, num_steps=2)
        with pytest.raises(KeyError):
            validation_loss(engine, [({"seed": [1]}, 1)])
        assert engine.model.training == training
        assert torch.is_grad_enabled()
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
    assert set(modes) == {(False, False)}


def test_stand_ins_are_named(clips, tmp_path, caplog):
    """A clip that has become unreadable since the dataset was made."""
    for path in clips.rglob("*.*"):
        copy = tmp_path / path.relative_to(clips)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    dataset = dataset_of(tmp_path)
    (tmp_path / "videos" / "0.mp4").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        batches = list(ValidationLoader(dataset, batches=1, batch_size=1, seed=0))
    assert "0.mp4" in caplog.text
    assert batches[0][0]["seed"] == [validation_key(0, 0).seed]


# ---------------------------------------------------------------- samples


@pytest.mark.slow
@pytest.mark.parametrize("family", others_long("1.5_i2v", "5b"))
def test_samples_are_videos(tiny, clips, tmp_path, family):
    engine = engine_of(tiny.config(family))
    metrics = training_metrics.MetricsWriter(tmp_path)
    settings = {"count": 2, "seed": 3, "fps": 8, "num_steps": 2}
    first = save_samples(engine, dataset_of(clips), tmp_path, 20, writer=metrics, **settings)
    names = ["0_clip_0_greygreen.mp4", "1_clip_1_greygreen.mp4"]
    assert first == [tmp_path / "samples" / "20" / name for name in names]
    for path, bucket in zip(first, (SMALL, WIDE), strict=True):
        meta, frames = read_video(path)
        assert meta["fps"] == 8
        assert frames.shape == (9, 3, *bucket[1:])
    torch.manual_seed(9)  # the noise is the same at the next evaluation
    again = save_samples(engine, dataset_of(clips), tmp_path, 40, **settings)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    tags = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"samples/0" in tags and b"samples/1" in tags
    listed = {video.name: video for video in read_videos(tmp_path)}
    assert listed.keys() == {f"{name}{index}" for name in ("samples/", "comparisons/clip_") for index in (0, 1)}
    beside = listed["comparisons/clip_1"]
    assert (beside.prompt, beside.shows) == ("clip 1: grey/green?", ("clip", "reconstruction", "sample"))
    clip, _, sample = read_video(beside.path)[1].chunk(3, dim=-1)
    assert (sample - read_video(first[1])[1]).abs().mean() < 0.04
    assert (clip - read_video(clips / "videos" / "1.mp4")[1][:9]).abs().mean() < 0.04


@pytest.mark.slow
def test_samples_have_a_number_of_frames_that_the_vae_decodes(tiny, clips, tmp_path):
    """A clip of 5 frames has two latent frames, which are fine for training."""
    dataset = dataset_of(clips, frames=5)
    assert dataset[validation_key(0, 0)]["num_frames"] == 5
    (path,) = save_samples(engine_of(tiny.config("5b")), dataset, tmp_path, 1, count=1, seed=0, fps=8, num_steps=1)
    assert len(read_video(path)[1]) == 1
    assert decodable({"moments": torch.zeros(1, 32, 4, 2, 2)})["moments"].shape[2] == 3
    assert decodable({"moments": torch.zeros(1, 32, 3, 2, 2)})["moments"].shape[2] == 3


def test_samples_as_latents(tiny, clips, tmp_path):
    engine = engine_of(tiny.config("5b"))
    (path,) = save_samples(
        engine, dataset_of(clips), tmp_path, 1, count=1, seed=3, fps=8, only_latents=True, num_steps=2
    )
    assert path.name == "0_clip_0_greygreen.safetensors"
    assert load_file(path)["latents"].shape == (3, 16, 4, 8)


def test_samples_that_cannot_be_written_stop_nothing(tiny, clips, tmp_path, caplog):
    (tmp_path / "samples").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert save_samples(
            engine_of(tiny.config("5b")), dataset_of(clips), tmp_path, 1, count=1, seed=3, fps=8, num_steps=1
        ) == []  # fmt: skip
    assert "sample left out: cannot write" in caplog.text

"""Videos of `valid_prompts` are made while a run trains, and the run does not notice."""

import json
import logging
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample_video
from cogvideox_sat.python_api.training import TrainingRun
from cogvideox_sat.runs.step_clock import StepClock
from cogvideox_sat.runs.videos import read_videos
from cogvideox_sat.training import prompt_videos
from diffusion_video import SATVideoDiffusionEngine
from distributed import run_distributed
from long_cases import others_long
from sgm.errors import UserError
from train_video import main
from training_clips import write_clip, write_dataset
from training_runs import (
    assert_same,
    metrics,
    precomputed,
    runs_of,
    train,
    train_in_processes,
    weights,
    write_config,
)
from videos import read_video

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Learning rates that do not depend on `train_iters`.
FEW_STEPS = {
    **{"sampling_num_steps": 2, "eval_interval": 2, "train_iters": 2, "lr_decay_style": "constant", "warmup": 0.0},
    "params": {"video_size": [32, 48]},
}
BOATS = ("a red boat", "a blue boat", "a green boat")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=4, frames=12, sizes=[(32, 48)])


def write_prompts(folder: Path, *lines: str | dict) -> str:
    path = folder / ("prompts.jsonl" if isinstance(lines[0], dict) else "prompts.txt")
    path.write_text("".join((json.dumps(line) if isinstance(line, dict) else line) + "\n" for line in lines))
    return str(path)


def picture(path: Path, colour: str) -> str:
    Image.new("RGB", (48, 32), colour).save(path)
    return path.name


def made(run: Path) -> dict[str, list[int]]:
    """Return the steps of the videos of a run, by name."""
    steps: dict[str, list[int]] = {}
    for video in read_videos(run):
        steps.setdefault(video.name, []).append(video.step)
    return steps


def videos_of(step: int, *numbers: int) -> dict[str, list[int]]:
    return {f"valid_prompts/{number}": [0, step] for number in numbers}


def test_the_run_is_the_same_to_the_bit_and_its_videos_are_those_of_inference(tmp_path, tiny, clips):
    """Also when it is resumed: then the first videos are not made again."""
    prompts = write_prompts(tmp_path, *BOATS[:2])
    settings = {**FEW_STEPS, "save_interval": 2}
    plain = write_config(tmp_path / "plain.yaml", tiny, "5b", clips, save=str(tmp_path / "plain"), **settings)
    watched = write_config(tmp_path / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, tensorboard=True, **settings)
    expected = train(plain, "--train_iters", "4")
    run = train(watched)
    before = {video.path: video.path.stat().st_mtime_ns for video in read_videos(run)}
    train(watched, "--resume", "latest", "--train_iters", "4")
    assert metrics(run) == metrics(expected)
    assert_same(weights(run), weights(expected))
    assert made(run) == {"valid_prompts/0": [0, 2, 4], "valid_prompts/1": [0, 2, 4]}
    assert before == {path: path.stat().st_mtime_ns for path in before}
    events = b"".join(path.read_bytes() for path in run.glob("events*"))
    assert events.count(b"valid_prompts/1") == 3

    sampled = ["--input_file", prompts, "--output_dir", str(tmp_path / "sampled"), "--sampling_num_steps", "2"]
    sampled += ["--sampling_image_size", "32", "48", "--sampling_num_frames", "3", "--load", str(run)]
    assert sample_video.main(["--base", str(tiny.config("5b")), *sampled]) == 0
    ours = [video.path.read_bytes() for video in read_videos(run) if video.step == 4]
    assert ours == [path.read_bytes() for path in sorted((tmp_path / "sampled").rglob("*.mp4"))]


@pytest.mark.long
def test_inputs_are_beside_samples(tmp_path, tiny, clips):
    """They are beside samples of prompts, and of validation clips with a reconstruction."""
    red, blue = (picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    clip = str(write_clip(tmp_path / "clip.mp4", 12, size=(32, 48)))
    prompts = write_prompts(
        tmp_path,
        {"prompt": "a", "image": red, "keyframes": [{"image": blue, "at": -1}], "steps": 1, "fps": 4},
        {"prompt": "b", "video": clip, "steps": 1},
        {"prompt": "c", "image": blue, "size": [48, 32], "extend": ["d"], "guidance_scale": 1.5, "seed": 3},
    )
    config = write_config(
        tmp_path / "a.yaml", tiny, "5b_i2v", clips, True, valid_prompts=prompts, valid_data=[str(clips)], **FEW_STEPS
    )
    run = TrainingRun(train(config))
    at_end = {video.name: video for video in run.videos() if video.step == 2}
    assert {name: video.shows for name, video in at_end.items() if name.startswith("comparisons")} == {
        "comparisons/clip_0": ("clip", "reconstruction", "sample"),
        "comparisons/prompt_0": ("image", "sample"),
        "comparisons/prompt_1": ("clip", "sample"),
        "comparisons/prompt_2": ("image", "sample"),
    }
    assert [video.step for video in run.videos("comparisons/prompt_0")] == [0, 2]
    assert [video.prompt for video in run.videos("valid_prompts")] == ["a", "b", "c"] * 2

    def panels(name: str, count: int) -> tuple[torch.Tensor, ...]:
        return read_video(at_end[name].path)[1].chunk(count, dim=-1)

    shown, sample = panels("comparisons/prompt_0", 2)
    assert [frame.mean(dim=(1, 2)).argmax().item() for frame in shown] == [0] * 8 + [2], "red, at last blue"
    alone = read_video(at_end["valid_prompts/0"].path)
    assert alone[0]["fps"] == 4 and (alone[1] - sample).abs().mean() < 0.04
    assert panels("comparisons/prompt_2", 2)[1].shape[2:] == (48, 32)
    assert len(panels("comparisons/prompt_2", 2)[0]) > 9, "the windows that follow too"
    clip, reconstruction, _ = panels("comparisons/clip_0", 3)
    assert clip.shape == reconstruction.shape == (9, 3, 32, 48)


def test_cached_latents_need_the_text_encoder_once_and_keep_no_vae(tmp_path, tiny, clips, monkeypatch):
    data = precomputed(tmp_path, tiny, "5b_i2v", clips)
    prompts = write_prompts(tmp_path, f"a boat@@{picture(tmp_path / 'red.png', 'red')}")
    built, left = [], []
    build, make = SATVideoDiffusionEngine.build, prompt_videos.PromptVideos.make

    def noting(engine, part, **options):
        if getattr(engine, part) is None:
            built.append(part)
        return build(engine, part, **options)

    def checking(self, *given):
        make(self, *given)
        left.append((self.engine.first_stage_model, type(self.engine.conditioner.embedders[0]).__name__))

    monkeypatch.setattr(SATVideoDiffusionEngine, "build", noting)
    monkeypatch.setattr(prompt_videos.PromptVideos, "make", checking)
    settings = {"save": str(tmp_path / "cached"), **FEW_STEPS}
    plain = train(write_config(tmp_path / "plain.yaml", tiny, "5b_i2v", data, lora=True, **settings))
    built.clear()
    run = train(write_config(tmp_path / "a.yaml", tiny, "5b_i2v", data, True, valid_prompts=prompts, **settings))
    assert built == ["conditioner", "conditioner", "model", "first_stage_model", "first_stage_model"]
    assert left == [(None, "PrecomputedEmbedder")] * 2
    assert made(run) == {**videos_of(2, 0), "comparisons/prompt_0": [0, 2]}
    assert metrics(run) == metrics(plain)


def test_latents_alone(tmp_path, tiny, clips, monkeypatch):
    monkeypatch.setattr(SATVideoDiffusionEngine, "decode_stream", None)
    prompts = write_prompts(tmp_path, *BOATS[:1])
    config = write_config(
        tmp_path / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, only_log_video_latents=True, **FEW_STEPS
    )
    run = train(config)
    files = sorted(path.relative_to(run).as_posix() for path in (run / "valid_prompts").rglob("*.*"))
    assert files == [f"valid_prompts/{step}/0_a_red_boat.safetensors" for step in (0, 2)]
    assert load_file(run / files[0])["latents"].shape == (3, 16, 4, 6)
    assert not (run / "videos.jsonl").exists()


def test_nothing_is_compiled_for_videos(tmp_path, tiny, clips, monkeypatch):
    """Graphs that a run compiles for its clips would be others after those of videos."""
    graphs = []
    make, sample = prompt_videos.PromptVideos.make, prompt_videos.BorrowedSession.sample
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def make_compiled(self, *given):
        self.engine.compiled = True
        make(self, *given)
        self.engine.compiled = False

    def calling(self, request):
        compiled(torch.ones(2))
        return sample(self, request)

    monkeypatch.setattr(prompt_videos.PromptVideos, "make", make_compiled)
    monkeypatch.setattr(prompt_videos.BorrowedSession, "sample", calling)
    prompts = write_prompts(tmp_path, *BOATS[:1])
    run = train(write_config(tmp_path / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, **FEW_STEPS))
    assert made(run) == videos_of(2, 0) and not graphs
    compiled(torch.ones(2))
    assert len(graphs) == 1


# ---------------------------------------------------------------- several processes


@pytest.mark.distributed
@pytest.mark.parametrize("zero", others_long(3, 0))
def test_two_processes_make_three_videos(tmp_path, tiny, clips, zero):
    """Each process makes its own, or all together make each, with unchanged losses."""
    prompts = write_prompts(tmp_path, *BOATS)
    settings = {"zero": zero, **FEW_STEPS}
    plain = write_config(tmp_path / "plain.yaml", tiny, "5b", clips, save=str(tmp_path / "plain"), **settings)
    watched = write_config(tmp_path / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, **settings)
    run = train_in_processes(watched, 2)
    assert made(run) == videos_of(2, 0, 1, 2)
    assert len(list((run / "valid_prompts").rglob("*.mp4"))) == 6
    if zero:
        assert metrics(run) == metrics(train_in_processes(plain, 2))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny, clips) -> Path:
    """Return the run of one process that makes a video."""
    folder = tmp_path_factory.mktemp("alone")
    prompts = write_prompts(folder, BOATS[0])
    return train(write_config(folder / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, **FEW_STEPS))


@pytest.mark.distributed
@pytest.mark.parametrize("size", ["model_parallel_size", "sequence_parallel_size"])
@pytest.mark.long
def test_processes_that_share_the_network_or_a_clip_make_a_video_together(tmp_path, tiny, clips, alone, size):
    settings = {"valid_prompts": write_prompts(tmp_path, BOATS[0]), size: 2, **FEW_STEPS}
    together = train_in_processes(write_config(tmp_path / "a.yaml", tiny, "5b", clips, **settings), 2)
    assert made(together) == made(alone) == videos_of(2, 0)
    (ours, *_), (theirs, *_) = read_videos(together), read_videos(alone)
    difference = read_video(ours.path)[1] - read_video(theirs.path)[1]
    assert difference.abs().mean() < 0.01


def train_with_failures(config: str, picture: str) -> None:
    """Run the command as one of two processes, with two failures at step 2.

    A picture no longer exists, and one video cannot be written.
    """
    import torch.distributed as dist

    make, files = prompt_videos.PromptVideos.make, prompt_videos.video_files

    def make_without(self, step, *given):
        if step == 2 and dist.get_rank() == 0:
            Path(picture).unlink()
        make(self, step, *given)

    def failing(path, *given):
        if path.match("2/1_*"):
            raise UserError(f"cannot write {path}: the disk is full")
        return files(path, *given)

    prompt_videos.PromptVideos.make, prompt_videos.video_files = make_without, failing
    os.environ.update(WORLD_SIZE="2", RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()))
    try:
        assert main(["--base", config]) == 0
    finally:
        prompt_videos.PromptVideos.make, prompt_videos.video_files = make, files


@pytest.mark.distributed
@pytest.mark.long
def test_a_failure_of_one_of_the_processes_that_make_a_video_together_stops_none(tmp_path, tiny, clips):
    red, blue = (picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    prompts = write_prompts(tmp_path, f"a@@{red}", f"b@@{blue}", f"c@@{blue}")
    config = write_config(tmp_path / "a.yaml", tiny, "5b_i2v", clips, valid_prompts=prompts, zero=3, **FEW_STEPS)
    run_distributed(train_with_failures, 2, str(config), str(tmp_path / red))
    (run,) = runs_of(config)
    videos = made(run)
    assert [videos[f"valid_prompts/{number}"] for number in range(3)] == [[0], [0], [0, 2]]
    assert list(metrics(run)) == [1, 2]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a boat@@gone.png", "line 1: image gone.png does not exist"),
        ("a boat@@torn.png", "prompt 1 ('a boat'): cannot read the image"),
    ],
)
def test_a_picture_that_is_missing_or_damaged_is_one_line_before_anything_is_loaded(
    tmp_path, tiny, clips, caplog, monkeypatch, line, says
):
    monkeypatch.setattr(SATVideoDiffusionEngine, "build", None)
    picture(tmp_path / "torn.png", "red")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:60])
    config = write_config(
        tmp_path / "a.yaml", tiny, "5b_i2v", clips, valid_prompts=write_prompts(tmp_path, line), **FEW_STEPS
    )
    assert main(["--base", str(config)]) == 2
    (error,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "valid_prompts: " in error and says in error
    assert not runs_of(config)


def test_a_prompt_that_fails_while_training_is_a_warning_alone(tmp_path, tiny, clips, caplog, monkeypatch):
    """The failures are a missing picture, a read-only folder, and a user's exception.

    The time does not count as that of steps.
    """
    red, blue = (picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    prompts = write_prompts(tmp_path, f"a@@{red}", f"b@@{blue}")
    steps, pauses = [], []
    raised = [MemoryError(), ZeroDivisionError("a bug")]
    pause = StepClock.paused

    @contextmanager
    def pausing(clock):
        with pause(clock):
            pauses.append(True)
            yield
            pauses.pop()

    make, going_on = prompt_videos.PromptVideos.make, prompt_videos.PromptVideos._going_on

    def make_with_failures(self, step, *given):
        steps.append(step)
        assert pauses
        if step == 2:
            (tmp_path / "red.png").unlink()
        if step == 4:
            picture(tmp_path / "red.png", "red")
            (self.folder / "valid_prompts" / "4").write_text("in the way")
        make(self, step, *given)

    def failing(self, events, stopping):
        yield from going_on(self, events, stopping)
        if steps[-1] == 5:
            raise raised.pop()

    monkeypatch.setattr(StepClock, "paused", pausing)
    monkeypatch.setattr(prompt_videos.PromptVideos, "make", make_with_failures)
    monkeypatch.setattr(prompt_videos.PromptVideos, "_going_on", failing)
    settings = {**FEW_STEPS, "train_iters": 5, "valid_prompts": prompts}
    run = train(write_config(tmp_path / "a.yaml", tiny, "5b_i2v", clips, True, **settings))
    warnings = [record.message for record in caplog.records if "left out: " in record.message]
    assert [line.partition(" left out: ")[0] for line in warnings] == [
        f"step {step}: valid_prompts:" for step in (2, 4, 4, 5, 5)
    ]
    assert "red.png does not exist" in warnings[0]
    assert "prompt 1 ('a'): cannot write" in warnings[1]
    assert "prompt 1 ('a'): ZeroDivisionError: a bug" in warnings[3]
    assert "prompt 2 ('b'): evaluation: host memory is full" in warnings[4] and "fewer valid_prompts" in warnings[4]
    assert made(run)["valid_prompts/1"] == [0, 2]
    assert len(metrics(run)) == 5
    assert not list((run / "valid_prompts" / "5").iterdir()), "no part of a video is left"


def test_a_signal_gives_up_the_video_at_hand(tmp_path, tiny, clips, monkeypatch):
    """Its files are complete or not there; the run saves, and goes on."""
    prompts = write_prompts(tmp_path, *BOATS)
    write = prompt_videos.video_files
    opened = []

    def noting(path, *given):
        opened.append(path)
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, *given)

    monkeypatch.setattr(prompt_videos, "video_files", noting)
    run = train(write_config(tmp_path / "a.yaml", tiny, "5b", clips, valid_prompts=prompts, **FEW_STEPS))
    assert made(run) == {"valid_prompts/0": [0]}
    assert [path.name for path in (run / "valid_prompts" / "0").iterdir()] == ["0_a_red_boat.mp4"]
    assert (run / "latest").read_text() == "1"

"""A loaded model makes the command's videos, reads weights once, and reports errors."""

import inspect
import json
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogvideox_sat as cv
from cogvideox_sat.configuration.request_fields import FIELDS
from cogvideox_sat.configuration.video_records import read_record
from cogvideox_sat.python_api.call_progress import Update
from cogvideox_sat.python_api.pictures import first_frame
from cogvideox_sat.python_api.pipeline import Pipeline
from cogvideox_sat.sampling.open_sessions import sessions_of_process
from diffusion_video import SATVideoDiffusionEngine
from sample_video import main
from videos import read_video

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

BOAT, KITE = "a paper boat on a pond", "a red kite over the hills"
FEW = {"size": (32, 48), "frames": 9, "steps": 2}


@pytest.fixture(scope="module", autouse=True)
def hash_memory(tmp_path_factory):
    """Keep remembered hashes in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pipe(tiny):
    with cv.load(tiny.config("5b")) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def of_images(tiny):
    with cv.load(tiny.config("5b_i2v")) as pipe:
        yield pipe


def command(config: Path, folder: Path, lines: list[dict], *flags: str) -> list[Path]:
    """Return the videos that the command writes for lines of a .jsonl file."""
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    given = ["--base", config, "--input_file", file, "--output_dir", folder / "videos", *flags]
    given += ["--sampling_num_frames", "3", "--sampling_image_size", "32", "48", "--offload", "none"]
    assert main([str(word) for word in given]) == 0
    return sorted((folder / "videos").rglob("*.mp4"))


def test_a_call_takes_all_fields_of_a_line_by_name():
    own = {"self", "prompt", "progress", "misspelt"}
    assert set(inspect.signature(Pipeline.__call__).parameters) - own | {"prompt"} == set(FIELDS)


def test_the_bytes_and_the_record_are_those_of_the_command(tiny, pipe, tmp_path):
    """Bytes and records are equal for a request with knobs, and for two prompts of a seed.

    Missing values are those of the arguments.
    """
    knobs = {
        "sampler": "ddim",
        "guidance_scale": 3,
        "guidance_interval": [0, 0.5],
        "fps": 16,
        "negative_prompt": "dull",
    }
    line = {"prompt": BOAT, "seed": 7, **FEW, **knobs}
    first, second = command(tiny.config("5b"), tmp_path, [line, {"prompt": KITE, **FEW}], "--seed", "42")
    video = pipe(**line)
    assert video.save(tmp_path / "own.mp4").read_bytes() == first.read_bytes()
    record, expected = (json.loads(path.with_suffix(".json").read_text()) for path in (tmp_path / "own.mp4", first))
    assert record == expected
    alone, kite = pipe([BOAT, KITE], seed=42, **FEW)
    assert kite.save(tmp_path / "kite.mp4").read_bytes() == second.read_bytes()
    assert (kite.frames == pipe(**kite.request).frames).all() and (alone.frames != kite.frames).any()
    assert (pipe(BOAT, seed=42, **FEW).frames == alone.frames).all()
    assert (pipe(**read_record(tmp_path / "own.json").request()).frames == video.frames).all()
    again = ["--input_file", str(tmp_path / "own.json"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert next((tmp_path / "again").rglob("*.mp4")).read_bytes() == first.read_bytes()


def test_what_a_video_is(pipe, tmp_path):
    video = pipe(BOAT, seed=3, **FEW)
    assert (video.frames.shape, video.frames.dtype, video.fps) == ((9, 32, 48, 3), np.uint8, 8)
    assert (tuple(video.latents.shape), video.latents.dtype) == ((1, 3, 16, 4, 6), torch.float32)
    assert {name: video.request[name] for name in ("prompt", "seed", "size", "num_frames", "steps", "fps")} == {
        "prompt": BOAT,
        "seed": 3,
        "size": (32, 48),
        "num_frames": 3,
        "steps": 2,
        "fps": 8,
    }
    shown = np.asarray(read_video(video.save(tmp_path / "a.mp4", record=False))[1])
    assert shown.shape == (9, 3, 32, 48) and not (tmp_path / "a.json").exists()


def test_no_weights_are_read_by_calls(tiny, tmp_path, monkeypatch):
    """Not even by the first one: the files may be gone, and nothing is built."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    config = folder / "5b.yaml"
    config.write_text(config.read_text().replace(str(tiny.folder), str(folder)))
    with cv.load(config) as pipe:
        shutil.rmtree(folder)
        monkeypatch.setattr(SATVideoDiffusionEngine, "_build_network", None)
        monkeypatch.setattr(SATVideoDiffusionEngine, "_build_first_stage", None)
        for sampler in (None, "ddim", "ddpm"):
            pipe(KITE, sampler=sampler, **FEW)
    assert sessions_of_process.count == 0 or pipe.session.closed


@pytest.mark.long
def test_memory_stays_what_it_is_over_a_hundred_calls(pipe):
    few = {"size": (32, 32), "frames": 1, "steps": 1}

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for seed in range(10):
        pipe(BOAT, seed=seed, **few)
    before = resident()
    for seed in range(100):
        pipe(BOAT if seed % 10 else KITE, seed=seed, progress=lambda update: update.denoised, **few)
    assert resident() - before < 8 * 2**20


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"guidance_scal": 3}, "unknown key 'guidance_scal'; did you mean 'guidance_scale'"),
        ({"frames": 5}, "frames: got 5; this model makes 1 frame, and 8k.1 up to 17, for example 9"),
        ({"num_frames": 2}, "num_frames: got 2; this model takes an odd number"),
        ({"frames": 9, "num_frames": 3}, "'frames' and 'num_frames' are both given"),
        ({"size": (31, 48)}, "size: height 31 does not fit"),
        ({"size": 32}, r"'size' must be \[height, width\] in pixels, got 32"),
        ({"steps": 2000}, "steps: got 2000; this model's noise schedule has 1 to 1000"),
        ({"sampler": "dimm"}, "sampler: got 'dimm'; did you mean ddim"),
        ({"sampler": "heun"}, "sampler is 'HeunEDMSampler', which needs a noise schedule of sigma"),
        ({"image": "first.png"}, "image: this is a text-to-video model; leave out"),
        ({"seed": -1}, "seed: got -1; expected a whole number"),
        ({"guidance_interval": (1, 0)}, "'guidance_interval' must be two shares"),
        ({"prompt": ""}, "prompt: got ''; say what the video shows"),
        ({"prompt": 5}, "'prompt' must be a string, got 5"),
        ({"progress": 5}, "progress: got 5; give a function"),
        ({"prompt": []}, "prompt: the list is empty"),
        ({"prompt": [BOAT, KITE], "seed": [1]}, "seed: got 1 values for 2 prompts"),
        ({"prompt": [BOAT, {"prompt": KITE, "sede": 2}]}, "prompt 2: unknown key 'sede'; did you mean 'seed'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sampled(pipe, fields, says, monkeypatch):
    monkeypatch.setattr(pipe.session, "sample", None)
    with pytest.raises(cv.UserError, match=says) as caught:
        pipe(**{"prompt": BOAT, **fields})
    assert "\n" not in str(caught.value)


def test_lists_give_each_prompt_its_own(pipe):
    videos = pipe([BOAT, {"prompt": KITE, "frames": 1}], seed=[1, 2], size=[(32, 48), (48, 32)], frames=9, steps=1)
    assert [video.frames.shape for video in videos] == [(9, 32, 48, 3), (1, 48, 32, 3)]
    assert [video.request["seed"] for video in videos] == [1, 2]
    few = {"size": np.array([32, 48]).tolist(), "frames": np.int64(9), "steps": torch.tensor(1)}
    assert (pipe(BOAT, seed=np.int32(1), **few).frames == videos[0].frames).all(), "numbers of other libraries"


def test_progress_is_told_and_previews_are_there(pipe, capsys):
    seen: list[Update] = []
    previews = []
    video = pipe(BOAT, progress=lambda update: (seen.append(update), previews.append(pipe.preview(update))), **FEW)
    told = [(update.stage, update.step) for update in seen]
    assert told == [("text", 0), ("sampling", 0), ("sampling", 1), ("sampling", 2), ("decoding", 2), ("done", 2)]
    assert {(update.steps, update.video, update.videos) for update in seen} == {(2, 0, 1)}
    shapes = [None if preview is None else preview.shape for preview in previews]
    assert shapes == [None, None, (32, 48, 3), (32, 48, 3), None, None]
    assert np.abs(previews[3].astype(int) - video.frames[0]).mean() < 10, "norms see one frame rather than three"
    assert (pipe(BOAT, progress=False, **FEW).frames == video.frames).all(), "what is watched stays the same"
    pipe([BOAT, KITE], progress=True, **FEW)
    assert "4/4" in capsys.readouterr().err


def test_a_call_ends_when_it_is_cancelled_or_its_progress_fails(pipe):
    with pytest.raises(cv.SamplingCancelled):
        pipe(BOAT, progress=lambda update: pipe.cancel() if update.step == 1 else None, **FEW)

    def fail(update):
        if update.step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe([BOAT, KITE], progress=fail, **FEW)
    assert pipe(BOAT, seed=1, **FEW).frames.shape == (9, 32, 48, 3)


def test_calls_from_several_threads_take_turns_and_are_cancelled_together(pipe):
    expected = [pipe(text, seed=1, **FEW).frames for text in (BOAT, KITE)]
    found: dict[str, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: pipe(text, seed=1, **FEW).frames}))
        for text in (BOAT, KITE)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[text] == frames).all() for text, frames in zip((BOAT, KITE), expected, strict=True))

    cancelled, started = [], threading.Event()

    def call(**keywords) -> None:
        try:
            pipe(BOAT, size=(32, 48), frames=9, steps=200, **keywords)
        except cv.SamplingCancelled:
            cancelled.append(True)

    running = threading.Thread(target=call, kwargs={"progress": lambda update: started.set()})
    running.start()
    assert started.wait(60)
    waiting = threading.Thread(target=call)
    waiting.start()
    while not pipe._turn.locked():
        pass
    pipe.cancel()
    for thread in (running, waiting):
        thread.join(60)
    assert len(cancelled) >= 1 and not running.is_alive() and not waiting.is_alive()


def test_first_frames_of_all_kinds_are_the_same_video(of_images, tmp_path):
    pixels = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    path = tmp_path / "first.png"
    Image.fromarray(pixels).save(path)
    from cogvideox_sat.media.image_inputs import load_condition_image

    tensor = load_condition_image(path, FEW["size"])
    videos = [of_images(BOAT, image=image, **FEW) for image in (path, str(path), pixels, Image.open(path), tensor)]
    assert all((video.frames == videos[0].frames).all() for video in videos[1:])
    for video in videos:
        assert (of_images(**video.request).frames == videos[0].frames).all()


def test_first_frames_that_are_none(of_images):
    for image, says in (
        (None, "image: this is an image-to-video model; give its first frame"),
        ("gone.png", "image: image gone.png does not exist"),
        (np.zeros((4, 4)), "image is an array of float64"),
        (5, "image: got 5; give a path"),
        (torch.zeros(3, 8, 8), "image: got float32 of shape"),
    ):
        with pytest.raises(cv.UserError, match=says):
            of_images(BOAT, image=image, **FEW)


def test_transparent_pictures_are_laid_on_white():
    assert first_frame(np.zeros((2, 2, 4), np.uint8), "image").getpixel((0, 0)) == (255, 255, 255)


def test_what_a_model_offers_is_what_it_takes(pipe):
    fields = pipe.fields
    usual = {name: field.usual for name, field in fields.items() if field.usual is not None and name != "size"}
    video = pipe(BOAT, **{**usual, **FEW})
    assert (video.frames == pipe(BOAT, **FEW).frames).all()
    assert fields["frames"].usual in fields["frames"].choices and "image" not in fields


def test_a_closed_pipeline_says_so(tiny):
    with cv.load(tiny.config("5b"), offload="sequential") as pipe:
        assert repr(pipe) == "Pipeline(5b, cpu, float32)"
        assert pipe(BOAT, **FEW).frames.shape == (9, 32, 48, 3)
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipe(BOAT, **FEW)

"""The page makes the command's videos at the same cost and cleans up after failures."""

import io
import json
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest
from PIL import Image

from cogvideox_sat.configuration.video_records import read_record
from cogvideox_sat.web import sampling_process
from cogvideox_sat.web.jobs import Cancelled
from cogvideox_sat.web.models import offered_models
from cogvideox_sat.web.sampling_process import VideoTask, Workshop, kept_inputs, make_video, named_briefly
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
FIELDS = {"prompt": "a small red circle", "seed": 3, "size": (32, 32), "frames": 9, "steps": 4}
NEVER = lambda: False  # noqa: E731


def task_for(folder: Path, model: str = "tiny", **fields) -> VideoTask:
    return VideoTask(model, {**FIELDS, **fields}, folder / "videos" / "a.mp4", {}, folder / "videos" / "inputs")


class Counted:
    """Counts the evaluations of networks."""

    def __init__(self, monkeypatch):
        from dit_video_concat import DiffusionTransformer

        self.count, forward = 0, DiffusionTransformer.forward

        def counted(*args, **kwargs):
            self.count += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(DiffusionTransformer, "forward", counted)


@pytest.fixture(scope="module")
def pipe():
    import cogvideox_sat as cv

    with cv.load("tiny", device="cpu") as pipe:
        yield pipe


@pytest.mark.slow
def test_videos_and_evaluations_are_those_of_the_command(pipe, tmp_path, monkeypatch, one_thread):
    from sample_video import main

    monkeypatch.setattr(sampling_process, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(sampling_process, "PREVIEW_SHARE", 1e9)
    counted, seen = Counted(monkeypatch), []
    name = make_video(pipe, task_for(tmp_path), {}, lambda **changes: seen.append(changes), NEVER)
    evaluations, counted.count = counted.count, 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(FIELDS) + "\n")
    base = ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"
    given = ["--base", base, "--input_file", prompts, "--output_dir", tmp_path / "command", "--device", "cpu"]
    assert main([str(word) for word in given]) == 0
    (video,) = (tmp_path / "command").rglob("*.mp4")
    assert (tmp_path / "videos" / name).read_bytes() == video.read_bytes()
    assert 0 < evaluations <= counted.count
    assert [each["step"] for each in seen if each["stage"] == "sampling"][-1] == 4
    previews = [each["preview"] for each in seen if each["preview"]]
    assert len(previews) == 3, "each step but the last, whose video is about to come"
    assert Image.open(io.BytesIO(previews[0])).size == (32, 32)


@pytest.mark.slow
def test_one_that_is_cancelled_leaves_nothing(pipe, tmp_path):
    steps = []

    def update(step, **_):
        steps.append(step)

    with pytest.raises(Cancelled):
        make_video(pipe, task_for(tmp_path, steps=50), {}, update, lambda: 2 in steps)
    assert max(steps) == 2
    assert not list(tmp_path.iterdir())
    make_video(pipe, task_for(tmp_path), {}, lambda **_: None, NEVER)
    assert read_record(tmp_path / "videos" / "a.json").request()["prompt"] == FIELDS["prompt"]


@pytest.mark.slow
def test_one_that_fails_leaves_nothing_and_names_no_folder(pipe, tmp_path):
    upload = tmp_path / "hash" / "clip.mp4"
    upload.parent.mkdir()
    upload.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"clip\.mp4|\.mp4") as error:
        make_video(pipe, task_for(tmp_path, video=str(upload)), {}, lambda **_: None, NEVER)
    assert str(upload.parent) not in str(error.value)
    assert not (tmp_path / "videos").exists() or not list((tmp_path / "videos").rglob("*.*"))


@pytest.mark.slow
def test_a_damaged_upload_is_called_by_its_own_name(pipe, tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"no video")
    task = task_for(tmp_path, video=str(tmp_path / "holiday.mp4"), strength=0.5)
    with pytest.raises(UserError, match=r"holiday\.mp4") as error:
        make_video(pipe, task, {}, lambda **_: None, NEVER)
    assert str(tmp_path) not in str(error.value)
    assert not (tmp_path / "videos").exists() or not list((tmp_path / "videos").iterdir())


def test_inputs_are_kept_with_the_video_alone(tmp_path):
    upload = tmp_path / "a.png"
    upload.write_bytes(b"picture")
    task = task_for(tmp_path, image=str(upload))
    with pytest.raises(RuntimeError), kept_inputs(task):
        raise RuntimeError
    assert not task.inputs.exists()
    with kept_inputs(task) as fields:
        pass
    assert Path(fields["image"]).read_bytes() == b"picture"
    assert Path(fields["image"]).parent == task.inputs
    with pytest.raises(RuntimeError), kept_inputs(task):
        raise RuntimeError
    assert Path(fields["image"]).exists(), "another video needs it"


def test_messages_name_uploads_without_their_folders():
    with pytest.raises(UserError) as error, named_briefly({"/tmp/x/a.png": "a.png"}):
        raise UserError("image: cannot read /tmp/x/a.png")
    assert str(error.value) == "image: cannot read a.png"


@pytest.fixture
def workshop(monkeypatch):
    """Return the other end of the connection of a workshop whose models are made of air."""
    models = list(offered_models([["tiny"], ["tiny_i2v"]], {}).values())
    ours, theirs = Pipe()
    workshop = Workshop(theirs, models)

    class Air:
        lora = None

    def load(name):
        workshop.waiting.pop(name)
        if name == "tiny_i2v":
            workshop.broken[name] = "tiny_i2v: it is broken"
        workshop.pipes[name] = Air(), {}
        theirs.send(("model", name, workshop.broken.get(name, "")))

    monkeypatch.setattr(workshop, "load", load)
    threads = [threading.Thread(target=target, daemon=True) for target in (workshop.listen, workshop.work)]
    for thread in threads:
        thread.start()
    yield ours
    ours.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive(), "it ends when the other end is closed"


def answers(connection, number):
    found = []
    while True:
        assert connection.poll(5)
        kind, *rest = connection.recv()
        found.append((kind, rest[0]))
        if rest[0] == number and kind != "update":
            return found, rest


def test_the_workshop_answers_each_task(workshop, monkeypatch, tmp_path):
    def make(pipe, task, own, update, is_cancelled):
        update(stage="sampling", step=1, steps=2)
        if task.fields["seed"] == 1:
            raise UserError("prompt: it is\nempty")
        if task.fields["seed"] == 2:
            raise ZeroDivisionError("secret")
        if is_cancelled():
            raise Cancelled
        return "a.mp4"

    monkeypatch.setattr(sampling_process, "make_video", make)
    workshop.send(("cancel", 4))
    for number in range(5):
        workshop.send(("make", number, task_for(tmp_path, seed=number)))
    workshop.send(("make", 5, task_for(tmp_path, "tiny_i2v")))
    assert answers(workshop, 0)[1][1] == "a.mp4"
    assert answers(workshop, 1)[1] == [1, "prompt: it is empty"]
    broken = answers(workshop, 2)[1][1]
    assert "ZeroDivisionError" in broken
    assert "secret" not in broken
    assert answers(workshop, 4)[0][-1] == ("cancelled", 4)
    assert answers(workshop, 5)[1] == [5, "tiny_i2v: it is broken"]

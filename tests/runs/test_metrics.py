"""Metrics reach their files once, also after a kill; clocks and memory are right."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.runs import metrics as training_metrics
from cogvideox_sat.runs import step_clock
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.runs.progress import format_values, progress_bar
from cogvideox_sat.runs.step_clock import StepClock, peak_memory
from sgm.errors import UserError


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path) -> list:
    """Return all TensorBoard events of a folder, file by file."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "video.mp4"
    with VideoWriter(path, 8, 32, 48) as writer:
        writer.write(torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 32, 48))
    return path


def test_metrics_are_json_lines(tmp_path):
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.write(1, {"loss": 0.5, "lr": 1e-4})
    assert lines_of(tmp_path / "run") == [{"step": 1, "loss": 0.5, "lr": 1e-4}], "a line is there once it is written"
    writer.write(2, {"loss": math.nan, "grad_norm": math.inf})
    assert lines_of(tmp_path / "run")[1] == {"step": 2, "loss": None, "grad_norm": None}
    writer.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_takes_the_place_of_the_killed_one(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    writer = MetricsWriter(tmp_path, tensorboard=False, start_step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    writer.write(4, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_videos_are_listed_in_the_folder_and_a_resumed_run_goes_on_there(tmp_path, video):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert not (tmp_path / "videos.jsonl").exists()
    for step in (0, 2, 4):
        writer.write_video(step, "samples/0", video, {"prompt": "a boat"})
    with (tmp_path / "videos.jsonl").open("a") as file:
        file.write('{"step": 4, "na')
    MetricsWriter(tmp_path, tensorboard=False, start_step=2).write_video(3, "samples/1", tmp_path.parent / "other.mp4")
    lines = [json.loads(line) for line in (tmp_path / "videos.jsonl").read_text().splitlines()]
    named = {"name": "samples/0", "file": "video.mp4", "prompt": "a boat"}
    assert lines[:2] == [{"step": 0, **named}, {"step": 2, **named}]
    assert lines[2:] == [{"step": 3, "name": "samples/1", "file": str(tmp_path.parent / "other.mp4")}]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard(tmp_path, video):
    writer = MetricsWriter(tmp_path)
    writer.write(7, {"loss": 0.25, "lr": 1e-4})
    writer.write_video(7, "samples/0", video)
    written = [event for event in events_of(tmp_path) if event.HasField("summary")]
    scalars = {value.tag: value.simple_value for value in written[0].summary.value}
    assert scalars == pytest.approx({"loss": 0.25, "lr": 1e-4})
    assert [event.step for event in written] == [7, 7]
    image = written[1].summary.value[0].image
    assert (image.width, image.height) == (48, 32)
    assert image.encoded_image_string.startswith(b"GIF89a")
    writer.close()


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    MetricsWriter(tmp_path, start_step=3)
    starts = [event.step for event in events_of(tmp_path) if event.HasField("session_log")]
    assert starts == [4]


def test_the_gif_keeps_frames_and_rate(video):
    from io import BytesIO

    from PIL import Image

    gif, width, height = training_metrics.video_as_gif(video, max_side=24)
    image = Image.open(BytesIO(gif))
    assert (image.n_frames, image.size) == (5, (24, 16)) == (5, (width, height))
    assert image.info["duration"] == pytest.approx(125, abs=10)  # a GIF counts in hundredths of a second


def test_a_failing_target_is_named_once_and_stops_nothing(tmp_path, caplog):
    folder = tmp_path / "run"
    writer = MetricsWriter(folder, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    (folder / "metrics.jsonl").rename(folder / "away")
    (folder / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            writer.write(step, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert "JsonLines" in caplog.text
    (folder / "metrics.jsonl").rmdir()
    (folder / "away").write_text((folder / "away").read_text() + '{"step": 3, "l')  # as a full disk leaves it
    (folder / "away").rename(folder / "metrics.jsonl")
    writer.write(4, {"loss": 1.0})
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 4, "loss": 1.0}, "a line of its own, after what was torn"


def test_an_impossible_folder_is_reported_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)


WANDB_RUN = """
import sys
from cogvideox_sat.runs.metrics import MetricsWriter
folder, start, video = sys.argv[1], int(sys.argv[2]), sys.argv[3]
writer = MetricsWriter(folder, tensorboard=False, wandb=True, wandb_project="tiny", name="run", start_step=start)
writer.write(start + 1, {"loss": 0.5})
writer.write_video(start + 1, "sample", video)
writer.close()
"""


def run_wandb(folder: Path, start: int, video: Path, **environment: str) -> str:
    """Run a process that reports to wandb, without a login; what it says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WANDB_RUN, str(folder), str(start), str(video)]
    done = subprocess.run(
        command, env={**kept, **home, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_wandb_offline_and_resumed(tmp_path, video):
    """Both runs have one id, so that wandb joins them; without a login the second is offline."""
    run_wandb(tmp_path, 0, video, WANDB_MODE="offline")
    said = run_wandb(tmp_path, 5, video)
    assert "kept offline" in said
    identity = (tmp_path / "wandb_id").read_text()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert {run.name.rpartition("-")[2] for run in runs} == {identity}
    assert all(list(run.glob("**/*.mp4")) for run in runs)


@pytest.mark.slow
def test_without_wandb_it_is_not_imported(tmp_path):
    program = "import sys; from cogvideox_sat.runs.metrics import MetricsWriter; "
    program += f"MetricsWriter({str(tmp_path)!r}); print('wandb' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_clock():
    clock = StepClock()
    assert clock.rates() == {}
    for _ in range(2):
        with clock.waiting():
            time.sleep(0.02)
        clock.step(samples=3)
    with clock.paused():
        time.sleep(0.2)
    rates = clock.rates()
    assert rates["samples_per_second"] * rates["seconds_per_step"] == pytest.approx(3)
    assert rates["seconds_per_step"] >= 0.02
    assert 0 < rates["data_wait_share"] <= 1
    assert rates["data_wait_share"] * rates["seconds_per_step"] >= 0.02 * 0.99
    assert clock.rates() == {}, "each call covers what came since the last one"


def test_pauses_do_not_count(monkeypatch):
    now = 0.0
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now)
    clock = StepClock()
    now = 1.0
    with clock.waiting():
        now = 2.0
    clock.step(samples=4)
    with clock.paused():
        now = 100.0
    assert clock.rates() == {"samples_per_second": 2.0, "seconds_per_step": 2.0, "data_wait_share": 0.5}


def test_peak_memory_of_a_process():
    held = torch.ones(2**28 // 4)  # 256 MiB
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert peak_memory("cpu") >= 0.99 * resident > 0.25, "the kernel counts pages lazily"
    del held
    assert peak_memory("cpu") >= 0.99 * resident, "a peak does not fall"


@pytest.mark.gpu
def test_peak_memory_of_a_device():
    held = torch.ones(2**28, device="cuda")
    assert peak_memory("cuda") >= 1.0
    del held


def test_values_for_people():
    values = {"loss": 0.12345, "lr": 1e-4, "grad_norm": 1.5, "samples_per_second": 2.0, "data_wait_share": 0.031}
    values |= {"peak_memory_gib": 21.34, "seconds_per_step": 0.5}
    expected = "loss 0.1235, lr 1.00e-04, grad norm 1.500, 2.00 samples/s, 3% waiting for data, 21.3 GiB"
    assert format_values(values) == expected
    assert format_values({"loss": math.nan}) == "loss nan"


def test_progress_bar(capsys):
    bar = progress_bar(total=10, initial=4)
    bar.show({"loss": 0.5})
    bar.update()
    bar.close()
    shown = capsys.readouterr().err
    assert "5/10" in shown and "loss 0.5" in shown
    silent = progress_bar(total=10, disabled=True)
    silent.show({"loss": 0.5})
    silent.update()
    silent.close()
    assert capsys.readouterr().err == ""

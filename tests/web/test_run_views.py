"""Runs are shown by metrics and videos from their folder, also while they are written."""

import json

import pytest

from cogvideox_sat.web import run_views
from cogvideox_sat.web.run_views import curve, curves, is_run, read_metrics, thinned, videos
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.texts import LANGUAGES

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "spirals"
    (folder / "samples" / "4").mkdir(parents=True)
    (folder / "samples" / "4" / "0.mp4").write_bytes(b"video")
    lines = [{"step": 1, "loss": 0.5, "lr": 1e-3}, {"step": 2, "loss": 0.25}, {"step": 2, "validation_loss": 0.4}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + '{"step": 3, "lo')
    return folder


def test_numbers_are_read_while_they_are_written(run):
    assert read_metrics(run / "metrics.jsonl") == {
        "loss": [(1, 0.5), (2, 0.25)],
        "lr": [(1, 1e-3)],
        "validation_loss": [(2, 0.4)],
    }


@pytest.mark.parametrize(
    "line",
    ["[]", "7", '{"step": "1", "loss": 1}', '{"step": 1, "loss": null}', '{"step": 1, "loss": "1"}', "\xff", "["],
)
def test_other_lines_are_left_out(run, line):
    (run / "metrics.jsonl").write_text(line + '\n{"step": 1, "loss": 2.0}\n')
    assert read_metrics(run / "metrics.jsonl") == {"loss": [(1, 2.0)]}


def test_long_files_are_read_from_their_end(run, monkeypatch):
    monkeypatch.setattr(run_views, "LARGEST", 60)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(100)))
    assert [step for step, _ in read_metrics(run / "metrics.jsonl")["loss"]] == [98, 99]


def test_curves_are_thinned_to_their_ends():
    series = [(i, float(i)) for i in range(1000)]
    assert len(thinned(series)) == run_views.POINTS
    assert (thinned(series)[0], thinned(series)[-1]) == (series[0], series[-1])
    assert thinned(series[:3]) == series[:3]


def test_a_curve_stays_within_its_frame():
    text = curve("loss", [(0, 1.0), (10, 3.0)])
    assert 'points="8.0,152.0 472.0,8.0"' in text
    assert "loss: 3 (step 10; 1 – 3)" in text
    assert 'points="8.0,152.0"' in curve("loss", [(5, 2.0)]), "a single point, and a flat one"


def test_only_what_is_worth_looking_at_is_drawn():
    shown = curves({"loss": [(1, 1.0)], EVIL: [(1, 1.0)], "lr": []})
    assert shown.count("<svg") == 1
    assert EVIL not in shown


def entry(**values) -> str:
    return json.dumps({"step": 4, "name": "samples/0", "file": "samples/4/0.mp4", **values}) + "\n"


def test_videos_are_shown_by_step(run):
    (run / "videos.jsonl").write_text(entry(prompt=EVIL) + entry(step=0, name="b"))
    shown = videos(Shelf(run.parent, "run", is_run), "spirals", LANGUAGES["en"])
    assert shown.index("Videos after step 4") < shown.index("Videos after step 0")
    assert 'src="/media/run/spirals/samples/4/0.mp4"' in shown
    assert EVIL not in shown


def test_videos_outside_are_not_shown(run, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (run / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    files = ["../../secret.mp4", str(tmp_path / "secret.mp4"), "link.mp4", "samples/../../../secret.mp4"]
    (run / "videos.jsonl").write_text("".join(entry(file=file, name=file) for file in files))
    assert videos(Shelf(run.parent, "run", is_run), "spirals", LANGUAGES["en"]) == ""


def test_metrics_that_are_a_link_are_not_read(run, tmp_path):
    (tmp_path / "secret").write_text('{"step": 1, "loss": 7}\n')
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "secret")
    assert read_metrics(run / "metrics.jsonl") == {}


def test_folders_of_runs_are_known(run, tmp_path):
    assert is_run(run)
    assert not is_run(tmp_path)
    assert not is_run(run / "metrics.jsonl")


def test_what_a_program_says_is_escaped():
    assert EVIL not in run_views.log([EVIL])
    assert run_views.log([]) == ""

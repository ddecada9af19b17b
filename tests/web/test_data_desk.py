"""The page shows a data set as training reads it and its mistakes without paths."""

import json
import sys

import pytest

from cogvideox_sat.web import data_desk
from cogvideox_sat.web.data_desk import DataDesk, Report, shown_report
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.texts import LANGUAGES
from cogvideox_sat.web.training_desk import is_data
from sgm.errors import UserError

EVIL = "<img src=x onerror=alert(1)>"
# Does as `--inspect_data --json` does, for a data set that lies where `sys.argv` says.
PRETENDED = """
import json, pathlib, sys
words = sys.argv[1:]
place, sheet = words[words.index("--train_data") + 1], words[words.index("--contact_sheet") + 1]
if place.endswith("bad"):
    sys.stderr.write(f"error: train_data: {place} holds no clips\\n")
    sys.exit(2)
pathlib.Path(sheet).write_bytes(b"png")
print(json.dumps({"train_data": {"samples": 3, "places": [{"location": place}]}, "contact_sheet": sheet}))
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    for name in ("data/clips", "data/bad", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(data_desk, "training_words", lambda processes: [sys.executable, "-c", PRETENDED])
    desk = DataDesk({"tiny": ["tiny.yaml"]}, Shelf(tmp_path / "data", "train_data", is_data))
    yield desk
    desk.close()
    assert not desk.folder.exists()


def test_a_data_set_is_looked_at(desk, tmp_path):
    report = desk.look("tiny", "clips")
    assert report.content["train_data"]["samples"] == 3
    assert desk.sheets.file(report.sheet).read_bytes() == b"png"
    assert str(tmp_path) not in json.dumps(report.content)
    assert not report.problem


@pytest.mark.parametrize(
    ("recipe", "name", "line"),
    [
        ("tiny", "bad", "train_data: bad holds no clips"),
        ("tiny", "", "train_data: nothing is chosen; choose a data set"),
        ("tiny", "../outside", "train_data: '../outside' does not exist; choose one of the list"),
        ("tiny", "link", "train_data: 'link' does not exist; choose one of the list"),
        ("/etc/passwd", "clips", "recipe: got '/etc/passwd'; it can be tiny"),
    ],
)
def test_mistakes_are_one_line(desk, recipe, name, line):
    with pytest.raises(UserError) as error:
        desk.look(recipe, name)
    assert str(error.value) == line


def test_a_report_is_shown_and_escaped():
    content = {"train_data": {
        "samples": 3, "captions_missing": 1, "shapes": {"9 frames of 64x64": 2, EVIL: 1}, "unreadable": [EVIL],
        "places": [{"left_out": {EVIL: {"count": 1, "examples": [EVIL]}}, "hints": [EVIL]}],
    }}  # fmt: skip
    for texts in LANGUAGES.values():
        text = shown_report(Report(content, None, EVIL), texts)
        assert "<img src=x" not in text
        assert "2 × 9 frames of 64x64" in text
        assert texts["data_no_sheet"] in text
    assert 'src="/media/sheet/a.png"' in shown_report(Report(content, "a.png", ""), LANGUAGES["en"])

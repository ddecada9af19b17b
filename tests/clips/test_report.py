"""Test the report about a place of clips: left-out files, crops, and JSON."""

import json
import logging

import pytest

from cogvideox_sat.clips.report import EXAMPLES, SourceReport, counted


@pytest.mark.parametrize(
    ("count", "reason", "text"),
    [
        (3, "videos are shorter", "3 videos are shorter"),
        (1, "videos are shorter", "1 video is shorter"),
        (1, "clips could not be read", "1 clip could not be read"),
        (1, "captions say nothing", "1 caption says nothing"),
        (0, "files look like captions", "0 files look like captions"),
        (1, "without a rule", "1 without a rule"),
    ],
)
def test_one_and_several(count, reason, text):
    assert counted(count, reason) == text


def test_left_out_files_are_counted_and_a_few_are_named():
    report = SourceReport("clips")
    for number in range(EXAMPLES + 3):
        report.leave_out("videos are shorter", f"{number}\n.mp4")
    left = report.left_out["videos are shorter"]
    assert left.count == EXAMPLES + 3
    assert left.examples == [rf"{number}\n.mp4" for number in range(EXAMPLES)]
    assert report.lines() == [
        (logging.WARNING, rf"clips: left out: {EXAMPLES + 3} videos are shorter; the first: 0\n.mp4")
    ]


@pytest.mark.parametrize(
    ("shares", "lines"),
    [
        ([], []),
        ([0.0, 0.004], []),
        ([0.0, 0.2], [(logging.INFO, "clips: crops cut away 10% of the picture on average, 20% at most")]),
        ([1 / 3], [(logging.INFO, "clips: crops cut away 33% of the picture on average, 33% at most")]),
        (
            [0.1, 0.5],
            [
                (
                    logging.WARNING,
                    "clips: crops cut away 30% of the picture on average, 50% at most; 1 of 2 lose more than a third: "
                    "add a size of their shape to video_size",
                )
            ],
        ),
    ],
)
def test_crops_are_warned_about_from_a_third_on(shares, lines):
    assert SourceReport("clips", cut_away=shares).lines() == lines


def test_labels_of_several_lines_and_unread_files_are_told():
    report = SourceReport("clips", long_labels=1, label_lines="all", unread={".wmv": 2, ".avs": 1})
    assert [line for _, line in report.lines()] == [
        "clips: 3 files look like media, not read: 1 .avs, 2 .wmv",
        "clips: 1 label has several lines; all are joined",
    ]


def test_all_of_it_is_json():
    report = SourceReport("clips", seconds=[1.0, 4.0, 2.00049], cut_away=[0.25, 0.5])
    report.shapes["49x480x720"] += 2
    content = json.loads(json.dumps(report.as_json()))
    assert content["shapes"] == {"49x480x720": 2}
    assert content["seconds"] == {"min": 1.0, "median": 2.0, "max": 4.0}
    assert content["cut_away"] == {"mean": 0.375, "max": 0.5}
    empty = SourceReport("clips").as_json()
    assert empty["seconds"] is None and empty["cut_away"] is None

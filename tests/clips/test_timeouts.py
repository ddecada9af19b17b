"""Test that the record of slow clips tells each sample which clips not to use."""

from pathlib import Path

import pytest

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.timeouts import ClipTimeouts, TimedOutClip, left_out, read_record, record_file
from sgm.errors import UserError


def entry(step: int, epoch: int = 0, sample: int = 2, clip: str = "a.mp4", data: str = "train_data") -> TimedOutClip:
    return TimedOutClip(data, step, epoch, sample, clip, "slow", "b.mp4")


def test_samples_do_without_what_is_recorded_for_them_and_for_earlier_steps():
    timeouts = ClipTimeouts("train_data", known=[entry(4), entry(9, clip="c.mp4"), entry(1, data="valid_data")])
    same, other, next_epoch = SampleKey(2, 0), SampleKey(3, 0), SampleKey(2, 0, epoch=1)
    assert timeouts.refused(same, 4).keys() == {"a.mp4", "c.mp4"}
    assert timeouts.refused(other, 4) == {}
    assert timeouts.refused(other, 5) == {"a.mp4": "slow"}
    assert timeouts.refused(next_epoch, 4) == {}
    assert timeouts.refused(other, 10).keys() == {"a.mp4", "c.mp4"}


def test_an_evaluation_repeats_its_samples_at_each_step():
    timeouts = ClipTimeouts("valid_data", known=[entry(4, epoch=4, data="valid_data")], repeats=True)
    assert [bool(timeouts.refused(SampleKey(2, 0), step)) for step in (3, 4, 5)] == [False, True, True]
    assert timeouts.refused(SampleKey(3, 0), 4) == {}


def test_the_record_is_written_when_the_substitute_is_known_and_read_from_all_processes(tmp_path):
    key = SampleKey(2, 0, epoch=1)
    for rank in range(2):
        timeouts = ClipTimeouts("train_data", record_file(tmp_path, rank))
        timeouts.note(key, 7, f"{rank}.mp4", "slow")
        assert timeouts.refused(key, 7) == {f"{rank}.mp4": "slow"}
        assert not record_file(tmp_path, rank).exists()
        timeouts.settle(key, 7, "b.mp4")
        timeouts.settle(key, 7, "b.mp4")
        assert [found.clip for found in timeouts.take_news()] == [f"{rank}.mp4"]
        assert timeouts.take_news() == []
    expected = [TimedOutClip("train_data", 7, 1, 2, f"{rank}.mp4", "slow", "b.mp4") for rank in range(2)]
    assert read_record(tmp_path) == expected
    assert left_out({"x.mp4": "slow"}, "valid_data") == [TimedOutClip("valid_data", 0, -1, -1, "x.mp4", "slow", None)]


def test_a_line_that_was_cut_off_is_left_out_and_a_damaged_one_is_an_error(tmp_path):
    file = record_file(tmp_path, 0)
    ClipTimeouts("train_data", file).record([entry(1), entry(2)])
    whole = file.read_text()
    file.write_text(whole[:-20])
    assert read_record(tmp_path) == [entry(1)]
    # A resumed run appends on a new line.
    ClipTimeouts("train_data", file).record([entry(3)])
    assert read_record(tmp_path) == [entry(1), entry(3)]
    file.write_text("nonsense\n" + whole)
    with pytest.raises(UserError, match=r"clip_timeouts-0000\.jsonl, line 1: not valid"):
        read_record(tmp_path)


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        ClipTimeouts("train_data", Path(tmp_path, "file", "record.jsonl")).record([entry(1)])

"""Test that runs and caches record the decoder of their videos, and warn if it changes."""

import logging

import pytest

from cogvideox_sat.clips.reader_record import KEY, describe_reader, recorded_backend, warn_of_other_reader, with_backend


def test_the_record_names_the_backend_and_its_version():
    record = describe_reader("pyav")
    assert record["video_backend"] == "pyav"
    assert int(record["version"].split(".")[0]) >= 15
    assert recorded_backend({KEY: record}) == "pyav"


def test_before_there_were_records_decord_read_everything():
    assert recorded_backend({}) == recorded_backend({KEY: None}) == "decord"


@pytest.mark.parametrize(("before", "warns"), [({}, True), ({KEY: {"video_backend": "pyav", "version": "1"}}, False)])
def test_another_backend_warns_and_another_version_does_not(caplog, before, warns):
    with caplog.at_level(logging.WARNING):
        warn_of_other_reader("resume", before, describe_reader("pyav"))
    assert bool(caplog.messages) == warns
    if warns:
        assert caplog.messages[0].startswith("resume: videos were read with decord and are now read with pyav")
        assert "data.params.video_backend: decord" in caplog.messages[0]


def test_data_without_a_reader_warns_of_nothing(caplog):
    warn_of_other_reader("resume", {}, None)
    assert not caplog.messages


def test_the_configuration_of_a_run_names_the_backend():
    config = {"args": {"seed": 1}, "data": {"target": "data_video.SFTDataset", "params": {"fps": 8}}}
    named = with_backend(config, describe_reader("pyav"))
    assert named["data"]["params"] == {"fps": 8, "video_backend": "pyav"}
    assert config["data"]["params"] == {"fps": 8}
    config["data"]["params"]["video_backend"] = "decord"
    assert with_backend(config, describe_reader("decord"))["data"]["params"]["video_backend"] == "decord"
    assert with_backend(config, None) == config
    assert with_backend({"args": {}}, describe_reader("pyav")) == {"args": {}}

"""Test that DeepSpeed's own file is merged over the section of a configuration."""

import pytest

from cogvideox_sat.configuration.deepspeed_file import merged_with_file
from sgm.errors import UserError

SECTION = {"zero_optimization": {"stage": 1, "contiguous_gradients": True}, "fp16": {"enabled": True}, "steps": 4}


def test_mappings_are_merged_and_other_values_replaced(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "fp16": null, "steps": 1e-5}')
    assert merged_with_file(SECTION, path) == {
        "zero_optimization": {"stage": 2, "contiguous_gradients": True},
        "fp16": None,
        "steps": 1e-5,
    }
    assert SECTION["zero_optimization"]["stage"] == 1


def test_yaml_is_read_too(tmp_path):
    path = tmp_path / "ds.yaml"
    path.write_text("zero_optimization:\n  stage: 2\n")
    assert merged_with_file({}, path) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"3", b""])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="deepspeed_config"):
        merged_with_file({}, path)


def test_files_that_are_missing_or_folders_are_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=f"deepspeed_config.*{path.name}"):
            merged_with_file({}, path)

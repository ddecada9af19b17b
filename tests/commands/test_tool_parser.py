"""Command lines of tools: mistakes are UserErrors, and what exists is replaced only when that was asked for."""

import argparse
import logging
from argparse import Namespace
from pathlib import Path

import pytest

from cogvideox_sat.commands.tool_parser import (
    ToolParser,
    check_output,
    check_safetensors_name,
    check_sources,
    positive,
    run_tool,
)
from sgm.errors import UserError

KEEP, REPLACE, TRY = (
    Namespace(overwrite=overwrite, dry_run=dry) for overwrite, dry in [(False, False), (True, False), (False, True)]
)


def test_a_wrong_flag_is_a_user_error_and_no_exit():
    parser = ToolParser("turns files into files")
    parser.add_writing_arguments()
    assert parser.parse_args(["--dry-run", "--overwrite"]) == Namespace(debug=False, dry_run=True, overwrite=True)
    for line in (["--nothing"], ["--over"]):
        with pytest.raises(UserError, match=line[0]):
            parser.parse_args(line)


def test_what_exists_is_kept(tmp_path):
    path = tmp_path / "weights.safetensors"
    check_output(path, KEEP)
    path.touch()
    with pytest.raises(UserError, match="--overwrite"):
        check_output(path, KEEP)
    check_output(path, REPLACE)
    check_output(path, TRY)


@pytest.mark.parametrize("options", [REPLACE, TRY])
def test_what_is_read_is_never_replaced(tmp_path, options):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="is read from"):
        check_output(tmp_path, options, [None, tmp_path / "run"])
    check_output(tmp_path / "run", options, [tmp_path / "other"])


def test_names_and_sources_are_checked(tmp_path):
    check_safetensors_name(Path("a.safetensors"))
    with pytest.raises(UserError, match=r"--output a\.pt"):
        check_safetensors_name(Path("a.pt"))
    check_sources([None, tmp_path])
    with pytest.raises(UserError, match="missing"):
        check_sources([tmp_path, tmp_path / "missing"])


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan"])
def test_positive_numbers(text):
    assert positive("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        positive(text)


def test_exit_codes_of_tools(caplog):
    def refuse(_):
        raise UserError("no file")

    def interrupt(_):
        raise KeyboardInterrupt

    seen: list[list[str]] = []
    assert run_tool(seen.append, ["--x"], "tool") == 0 and seen == [["--x"]]
    with caplog.at_level(logging.ERROR):
        assert run_tool(refuse, [], "tool") == 2
        assert run_tool(interrupt, [], "tool") == 130
    assert [record.getMessage() for record in caplog.records] == ["error: no file", "interrupted"]

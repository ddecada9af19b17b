"""Test command lines of tools: mistakes are UserErrors, and nothing is replaced unasked."""

import argparse
import logging
from argparse import Namespace
from pathlib import Path

import pytest

from cogvideox_sat.commands import input_paths
from cogvideox_sat.commands.tool_parser import (
    ToolParser,
    check_output,
    check_output_folder,
    check_safetensors_name,
    locate_image,
    locate_inputs,
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
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_output(path, REPLACE)


@pytest.mark.parametrize("options", [REPLACE, TRY])
def test_what_is_read_is_never_replaced(tmp_path, options):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="is read from"):
        check_output_folder(tmp_path, options, ["run"], [None, tmp_path / "run"])
    check_output_folder(tmp_path / "run", options, ["latest"], [tmp_path / "other"])


@pytest.mark.parametrize("options", [REPLACE, TRY])
def test_a_folder_of_other_content_is_never_replaced(tmp_path, monkeypatch, options):
    folder = tmp_path / "thesis"
    folder.mkdir()
    check_output_folder(folder, options, ["latest"])  # nothing is lost
    (folder / "chapter.tex").touch()
    with pytest.raises(UserError, match="thesis was not written by this tool and is not replaced; choose another name"):
        check_output_folder(folder, options, ["latest"])
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_output_folder(folder / "chapter.tex", options, ["latest"])
    (folder / "latest").touch()
    check_output_folder(folder, options, ["latest"])
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    for path in (folder, Path(".."), Path()):
        with pytest.raises(UserError, match="holds the current working directory and is not replaced"):
            check_output_folder(path, options, ["latest"])


@pytest.mark.parametrize("check", [check_output, lambda path, options: check_output_folder(path, options, ["latest"])])
def test_an_output_that_cannot_be_written_is_named_before_any_work(tmp_path, check):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: .*below: .*file is not a folder"):
        check(tmp_path / "file" / "below" / "model", KEEP)
    with pytest.raises(UserError, match=r"output: .*a: File name too long; shorten it"):
        check(tmp_path / ("a" * 300), KEEP)


def test_names_and_sources_are_checked(tmp_path):
    check_safetensors_name(Path("a.safetensors"))
    with pytest.raises(UserError, match=r"--output a\.pt"):
        check_safetensors_name(Path("a.pt"))


def test_inputs_are_put_where_they_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(input_paths, "ROOT", tmp_path)
    monkeypatch.setattr(input_paths, "_notes", [])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    options = Namespace(load=Path("a"), base=[Path("b"), Path("a")], near=None, image=Path("a"), gone=Path("gone"))
    assert locate_inputs(options, "load", "base", "near") == [tmp_path / name for name in ("a", "b", "a")]
    assert (options.load, options.base, options.near) == (tmp_path / "a", [tmp_path / "b", tmp_path / "a"], None)
    with pytest.raises(UserError, match=f"--gone: gone does not exist, neither in {tmp_path}/here nor in {tmp_path}"):
        locate_inputs(options, "gone")
    with pytest.raises(UserError, match="--image: a is not a file"):
        locate_image(options, "image")


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

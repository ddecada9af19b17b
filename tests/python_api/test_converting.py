"""Conversions as a function are those of the command, with errors that are raised."""

import logging
from typing import get_args

import pytest

import cogvideox_sat as cv
from cogvideox_sat.commands.program_names import TOOLS
from cogvideox_sat.python_api.converting import Conversion, flag
from sgm.errors import UserError


def test_all_conversions_have_their_name():
    assert get_args(Conversion) == tuple(TOOLS)


def test_options_become_words():
    assert flag("overwrite", True) == ["--overwrite"] and flag("overwrite", False) == flag("dtype", None) == []
    assert flag("lora", {"a": 0.8, "b": -1}) == ["--lora", "a:0.8", "b:-1"]
    assert flag("lora", ["a", "b"]) == ["--lora", "a", "b"] and flag("lora_alpha", 2.0) == ["--lora_alpha=2.0"]


@pytest.mark.slow
def test_a_conversion_writes_what_the_command_writes(tiny, tmp_path):
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    weights = tiny.folder / "5b"
    cv.convert("export_weights", input=weights, output=tmp_path / "own.safetensors", dtype="bfloat16")
    from tools.export_weights import main

    given = ["--input", str(weights), "--output", str(tmp_path / "command.safetensors"), "--dtype", "bfloat16"]
    assert main(given) == 0
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "command.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists; give --overwrite"):
        cv.convert("export-weights", input=weights, output=tmp_path / "own.safetensors")
    cv.convert("export_weights", input=weights, output=tmp_path / "own.safetensors", overwrite=True)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("merge_lora", {"loads": "x"}, "unrecognized arguments: --loads; did you mean --load?"),
        ("merge_lora", {"load": "/nowhere", "output": "x"}, "--load: /nowhere does not exist"),
        ("merge_lra", {}, "name: the conversion 'merge_lra' does not exist; did you mean merge_lora?"),
        ("xyz", {}, "name: the conversion 'xyz' does not exist; it can be convert_weight_hf2sat, "),
        ("decode_latents", {}, "PATH"),
    ],
)
def test_mistakes_are_one_line(name, options, says):
    with pytest.raises(UserError) as caught:
        cv.convert(name, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)

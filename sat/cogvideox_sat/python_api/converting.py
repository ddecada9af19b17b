"""`convert`: the conversions of `cogvideox convert` as a function."""

import difflib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from cogvideox_sat.commands.program_names import TOOLS
from sgm.errors import UserError, shown
from sgm.exit_codes import errors_raised

Conversion = Literal[
    "convert_weight_hf2sat",
    "convert_weight_sat2hf",
    "export_sat_lora_weight",
    "import_hf_lora",
    "merge_lora",
    "export_weights",
    "precompute_latents",
    "decode_latents",
]
assert get_args(Conversion) == tuple(TOOLS)


def convert(name: Conversion, *paths: str | Path, **options: Any) -> None:
    """Convert weights, adapters or latents, as `cogvideox convert NAME` does.

    `convert("merge_lora", load="checkpoints/cogvideox_5b/transformer", lora={"style": 0.8}, output="merged")`

    Args:
        name: the conversion. `convert_weight_hf2sat`: a pipeline of diffusers to checkpoints and configurations;
            `convert_weight_sat2hf`: a checkpoint to such a pipeline; `export_sat_lora_weight`: a trained adapter to a
            LoRA file of diffusers; `import_hf_lora`: such a file to an adapter; `merge_lora`: a checkpoint and adapters
            to one checkpoint; `export_weights`: a checkpoint to one safetensors file; `precompute_latents`: clips and
            captions to latents; `decode_latents`: latents to videos.
        paths: arguments without a flag: the files for `decode_latents`.
        options: the flags of the command by name; a list for several values, a mapping for values `PATH:WEIGHT`, True
            for a switch. None and False leave out a flag. `cogvideox convert NAME --help` lists them.

    Raises:
        UserError: the conversion or an option does not exist, or a value or a file is wrong; nothing is written then.
    """
    plain = str(name).replace("-", "_")
    if plain not in TOOLS:
        near = difflib.get_close_matches(plain, TOOLS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it can be {', '.join(TOOLS)}"
        raise UserError(f"name: the conversion {shown(name)} does not exist; {advice}")
    words = [os.fspath(path) for path in paths]
    for option, value in options.items():
        words += flag(option, value)
    module = importlib.import_module(f"cogvideox_sat.tool_commands.{plain}")
    with errors_raised(), logging_left_alone():
        module.main(words)


def flag(name: str, value: Any) -> list[str]:
    """Return the words of a command line that set an option.

    Args:
        value: None and False leave it out; True is a switch; a list has several values; a mapping has values by path.
    """
    if value is None or value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, Mapping):
        value = [f"{os.fspath(path)}:{weight!r}" for path, weight in value.items()]
    if isinstance(value, list | tuple):
        return [f"--{name}", *(os.fspath(item) if isinstance(item, Path) else str(item) for item in value)]
    return [f"--{name}={value}"]


@contextmanager
def logging_left_alone() -> Iterator[None]:
    """Undo a command's changes to the logging setup after the block."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

"""Parse and check the command lines of tools that turn files into files."""

import argparse
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.flag_spellings import StrictParser
from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.commands.launchers import check_alone
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.files.output_paths import check_file, check_folder, nearest_existing
from sgm.errors import UserError
from sgm.exit_codes import exit_code


class ToolParser(StrictParser):
    """Parser whose help is the tool's docstring."""

    def __init__(self, description: str):
        super().__init__(
            description=as_started(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error too")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # typeshed has an overload for each kind of namespace
        """Return the options of a command line.

        A flag that does not exist is reported before one that is missing.
        """
        given = sys.argv[1:] if args is None else list(args)
        for word in given[: given.index("--") if "--" in given else None]:
            flag = word.partition("=")[0]
            if re.fullmatch(r"--[A-Za-z][\w-]*", flag) and not self.knows(flag):
                plain = flag.replace("-", "_")
                begin = [known for known in self.flags() if known.startswith(plain)]
                near = begin or difflib.get_close_matches(plain, self.flags(), n=1)
                advice = f"did you mean {self.flags()[near[0]]}?" if near else "--help lists them all"
                raise UserError(f"unrecognized arguments: {flag}; {advice}")
        return super().parse_args(args, namespace)

    def knows(self, flag: str) -> bool:
        """Return whether a flag exists, in either spelling."""
        return flag.replace("-", "_") in self.flags()

    def flags(self) -> dict[str, str]:
        """Return all flags by their spelling with `_`."""
        return {flag.replace("-", "_"): flag for flag in self._option_string_actions}

    def add_writing_arguments(self) -> None:
        """Add `--dry_run` and `--overwrite`."""
        self.add_argument("--dry_run", action="store_true", help="show what would be written, check it, write nothing")
        self.add_argument("--overwrite", action="store_true", help="replace what exists")


def check_output(path: Path, options: argparse.Namespace, sources: Iterable[Path | None] = ()) -> None:
    """Check that a file may be written, before any work is done.

    Args:
        sources: files and folders that are read.

    Raises:
        UserError: it exists and `--overwrite` is not given, it is a folder or one of `sources`, or its folder cannot be
            written to.
    """
    check_file(path, "output")
    if path.exists():
        _check_replaced(path, options, sources)


def check_output_folder(
    path: Path, options: argparse.Namespace, own_names: Collection[str], sources: Iterable[Path | None] = ()
) -> None:
    """Check that a folder may be written, before any work is done.

    A folder is replaced as a whole, so that `--overwrite` with a wrong name would delete all that it holds.

    Args:
        own_names: files and folders of which the tool writes at least one into its folder.
        sources: files and folders that are read.

    Raises:
        UserError: it exists and `--overwrite` is not given, it is a file, holds one of `sources`, holds the current
            working directory or only content of other programs, or its parent cannot be written to.
    """
    nearest_existing(path, "output")  # refuses a name that is too long
    check_folder(path.parent, "output")
    if not path.exists():
        return
    _check_replaced(path, options, sources)
    if not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(f"{path} holds the current working directory and is not replaced; choose another name")
    if any(path.iterdir()) and not any((path / name).exists() for name in own_names):
        raise UserError(f"{path} was not written by this tool and is not replaced; choose another name")


def _check_replaced(path: Path, options: argparse.Namespace, sources: Iterable[Path | None]) -> None:
    """Check that the flags allow to replace a path, which holds none of `sources`."""
    if not options.overwrite and not options.dry_run:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another name")
    if any(source and source.resolve().is_relative_to(path.resolve()) for source in sources):
        raise UserError(f"{path} is read from and cannot be written to; choose another name")


def check_safetensors_name(output: Path) -> None:
    """Check that `--output` names a safetensors file, else raise UserError."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: not the name of a safetensors file; let the name end with .safetensors")


def locate_inputs(options: argparse.Namespace, *names: str) -> list[Path]:
    """Return the files and folders that are read, and replace the options by them.

    They are looked for in the current working directory, then in the repository's root: `input_paths.find_input`.

    Args:
        names: the options; each holds a path, a list of paths, or None.

    Raises:
        UserError: a path exists in neither place.
    """
    located = []
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        paths = value if isinstance(value, list) else [value]
        found = [required_input(path, f"--{name}") for path in paths]
        setattr(options, name, found if isinstance(value, list) else found[0])
        located += found
    return located


def locate_image(options: argparse.Namespace, name: str) -> None:
    """Replace an option by the file that it names, as `locate_inputs`; a folder is refused."""
    given = getattr(options, name)
    (path,) = locate_inputs(options, name)
    if not path.is_file():
        raise UserError(f"--{name}: {given} is not a file; name an image")


def positive(text: str) -> float:
    """Return a command-line argument as a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def run_tool(command: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None, name: str) -> int:
    """Run a tool and return its exit code.

    The exit code is 0, 2 for a user's error, which is logged in one line, or 130 after an interruption.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # a tool may download for an hour
    quiet_libraries()

    def run() -> int:
        check_alone(name)
        command(arguments)
        return 0

    return exit_code(run, logging.getLogger(name), command_line=arguments)

"""Build the parser of a command line from the fields that declare its arguments."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING
from functools import partial
from typing import Any

from cogvideox_sat.commands.flag_spellings import StrictParser
from cogvideox_sat.commands.launchers import add_launcher_flags
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.argument_fields import argument_fields, item_type, value_type


def parser_for(command: type, description: str, example: str, ignored: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with `--base` and a flag for every argument.

    Arguments that are not given are absent from its result.

    Args:
        example: a command line, shown at the end of `--help`.
        ignored: names of flags that are accepted but not used.
    """
    parser = StrictParser(
        description=description,
        epilog=f"for example: {as_started(example)}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--base", nargs="+", metavar="FILE", help="configuration files, later ones overriding earlier")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="set any keys of the configuration, such as model.sampler_config.params.guider_config.params.exp=3",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error too")  # see sgm.errors
    for name, f in argument_fields(command).items():
        kind = value_type(f)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = f" (default: {default})" if default not in (None, "", []) else ""
        options: dict[str, Any] = {"help": as_started(f.metadata["help"]).replace("%", "%%") + shown}
        if read := f.metadata["read"]:
            parser.add_argument(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
            options |= {"nargs": "?", "const": True, "type": partial(read, name), "metavar": "MODE"}
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is list:
            options |= {"type": item_type(f), "nargs": "+", "metavar": item_type(f).__name__.upper()}
        else:
            choices = f.metadata["choices"]
            options |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        parser.add_argument(f"--{name}", **options)
    add_launcher_flags(parser, ignored)
    return parser

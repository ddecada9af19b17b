"""The command `cogvideox` of the installed package.

The commands are `cogvideox sample`, `train`, `train-vae`, `convert NAME`, `web` and `memory`. Each does the same as the
script in the repository. With several processes: `torchrun --standalone --nproc_per_node=N -m
cogvideox_sat.command_line train ...`.
"""

import difflib
import importlib
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence

from cogvideox_sat.commands.program_names import COMMAND, TOOLS
from cogvideox_sat.version import __version__
from sgm.errors import UserError, one_line, shown

logger = logging.getLogger(COMMAND)

CONVERT = "convert"
COMMANDS = {  # description and module of each command
    "sample": ("sample videos from prompts", "sample_video"),
    "train": ("fine-tune a model on videos with captions", "train_video"),
    "train-vae": ("train a video autoencoder", "train_vae"),
    CONVERT: ("convert weights, adapters and latents", ""),
    "web": ("show a page in the browser that makes videos and follows training", "cogvideox_sat.web.command"),
    "memory": (
        "estimate the memory that a run of a configuration needs",
        "cogvideox_sat.tool_commands.estimate_memory",
    ),
}
HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code, 2 for a command that does not exist."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return 0
    if given[:1] and given[0] in HELP:
        return show(f"usage: {COMMAND} COMMAND ...", "commands", {name: text for name, (text, _) in COMMANDS.items()})
    if given[1:2] and given[0] == CONVERT and given[1] in HELP:
        return show(f"usage: {COMMAND} {CONVERT} NAME ...", "conversions", TOOLS)
    try:
        words, module = choose(given)
    except UserError as error:
        logging.basicConfig(format="%(message)s")  # only here, because each command sets up its own logging
        logger.error("error: %s", one_line(str(error)))
        return 2
    rest = given[len(words) :]
    if arguments is None:  # parsers and libraries read the program's name from sys.argv
        sys.argv[:] = [" ".join([COMMAND, *words]), *rest]
    return importlib.import_module(module).main(rest)


def choose(given: Sequence[str]) -> tuple[list[str], str]:
    """Return the words of a command line that name a command, and the command's module.

    Raises:
        UserError: no command has that name.
    """
    name = chosen(COMMAND, "the command", given[:1], COMMANDS)
    if name != CONVERT:
        return [name], COMMANDS[name][1]
    tool = chosen(f"{COMMAND} {name}", "the conversion", given[1:2], TOOLS)
    return [name, tool], f"cogvideox_sat.tool_commands.{tool}"


def chosen(command: str, what: str, words: Sequence[str], known: Iterable[str]) -> str:
    """Return the one of the `known` names that the first word is; `-` and `_` are equal.

    Args:
        command: the command that the words belong to, for messages.
        what: what the words name, for messages.

    Raises:
        UserError: the first word is missing or unknown.
    """
    names = {name.replace("-", "_"): name for name in known}
    if not words:
        raise UserError(f"{command}: {what}: missing; name one of {', '.join(names.values())}")
    if found := names.get(words[0].replace("-", "_")):
        return found
    near = difflib.get_close_matches(words[0].replace("-", "_"), names, n=1)
    advice = f"did you mean {names[near[0]]}?" if near else f"name one of {', '.join(names.values())}"
    raise UserError(f"{command}: {shown(words[0])} does not exist; {advice}")


def show(usage: str, title: str, names: Mapping[str, str]) -> int:
    """Write the help of a command with subcommands."""
    width = max(map(len, names))
    lines = [usage, "", f"{title}, each with a --help of its own:", *(f"  {n:{width}}  {t}" for n, t in names.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

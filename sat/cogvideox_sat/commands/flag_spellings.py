"""Parse command-line flags in both spellings: `--output_dir` and `--output-dir`.

Nothing here imports PyTorch.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sgm.errors import UserError


class EitherSpellingParser(argparse.ArgumentParser):
    """Parser that takes `-` for `_` and `_` for `-` in the names of flags, `--no-` included.

    Values are not changed.
    """

    def parse_known_args(  # type: ignore[override]  # typeshed has an overload for each kind of namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        end = given.index("--") if "--" in given else len(given)
        known = {_plain(option): option for option in self._option_string_actions}
        spelled = [_known_spelling(word, known) for word in given[:end]]
        return super().parse_known_args([*spelled, *given[end:]], namespace)


class StrictParser(EitherSpellingParser):
    """Parser that raises UserError for a mistake, so that the command reports it like others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _known_spelling(word: str, known: dict[str, str]) -> str:
    """Return `word` with its flag in the parser's spelling, if the parser knows the flag."""
    if not word.startswith("--"):
        return word
    name, separator, value = word.partition("=")
    return known.get(_plain(name), name) + separator + value


def _plain(flag: str) -> str:
    """Return the name that all spellings of a flag share."""
    dashes = len(flag) - len(flag.lstrip("-"))
    return flag[:dashes] + flag[dashes:].replace("-", "_")

"""What a training state says beside its tensors: checked before a run goes on from it, whoever wrote or damaged it.

A checker returns whether a value is what the run can go on with. Nothing here imports PyTorch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgm.errors import UserError, one_line, shown

Checker = Callable[[Any], bool]

HIGHEST = 2**53  # whole numbers up to here are the same in every reader of JSON
# What reading and restoring values that do not fit may raise, in this project and in the libraries that take them.
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
STATE_ERRORS = (LookupError, TypeError, AttributeError)  # of an optimizer whose state lacks what it keeps there


def whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= HIGHEST


def count(value: Any) -> bool:
    return whole(value) and value >= 0


def text(value: Any) -> bool:
    return isinstance(value, str)


def sum_of_losses(value: Any) -> bool:
    return type(value) is float or whole(value)


def number(value: Any) -> bool:
    return sum_of_losses(value) and math.isfinite(value)


def list_of(entry: Checker, length: int | None = None) -> Checker:
    def check(value: Any) -> bool:
        return isinstance(value, list | tuple) and length in (None, len(value)) and all(map(entry, value))

    return check


def mapping_of(entry: Checker) -> Checker:
    return lambda value: isinstance(value, Mapping) and all(map(text, value)) and all(map(entry, value.values()))


def anything(value: Any) -> bool:
    return True


def counters(value: Any) -> bool:
    """Numbers, in mappings and lists of any depth; Lightning keeps the places of its loops so."""
    if isinstance(value, Mapping):
        return all(map(text, value)) and all(map(counters, value.values()))
    return value is None or isinstance(value, bool) or number(value) or list_of(counters)(value)


def phase(value: Any) -> bool:
    """A group size of a batch's clips, and how many such groups were taken."""
    return list_of(count, 2)(value) and value[0] > 0


def reader(value: Any) -> bool:
    return value is None or mapping_of(text)(value)


POSITION = {"seed": whole, "epoch": count, "phases": list_of(phase), "samples": count, "fingerprint": count}
OPTIMIZER = {
    "kinds": list_of(text),
    "lacking?": mapping_of(list_of(text)),
    "model_parallel_size": count,
    "state": mapping_of(number),
    "group": mapping_of(number),
    "rates": list_of(number),
    "loss_scaler": mapping_of(number),
}
TRAINING_STATE = {
    "step": count,
    "optimizer": OPTIMIZER,
    "optimizer_type": text,
    "data": POSITION,
    "schedule": mapping_of(anything),
    "random": list_of(mapping_of(anything)),
    "losses": list_of(sum_of_losses, 2),
    "skipped": {"in a row": count, "in all": count},
    "reader?": reader,
}
VAE_RUN = {
    "step": count,
    "data": POSITION,
    "ranks": list_of(mapping_of(mapping_of(anything))),
    "reader?": reader,
}


def find_misfit(values: Any, layout: Mapping[str, Any], place: str = "") -> str | None:
    """Return what is wrong with the first value that does not fit, with its place; None if all do.

    Args:
        values: what was read.
        layout: a checker for each key, or a layout of its own; a key that may be left out ends in a question mark.
        place: of `values`, dotted.
    """
    if not isinstance(values, Mapping):
        return f"{place or 'it'} is {shown(values)}, no mapping"
    for key, checker in layout.items():
        name = key.removesuffix("?")
        there = f"{place}.{name}" if place else name
        if name not in values:
            if key == name:
                return f"it has no {there}"
        elif isinstance(checker, Mapping):
            if misfit := find_misfit(values[name], checker, there):
                return misfit
        elif not checker(values[name]):
            return f"{there} cannot be {shown(values[name])}"
    return None


def damaged(file: Path, reason: str) -> UserError:
    """Return the error about a file of a checkpoint that a run cannot go on from."""
    return UserError(f"resume: {file} is damaged: {one_line(reason, 300)}; name another checkpoint")


@contextmanager
def taken_from(file: Path, errors: tuple[type[Exception], ...] = MISFITS) -> Iterator[None]:
    """Let values that the block cannot take be reported as damage of the file they come from.

    Args:
        errors: that mean this; by default all that a block may raise which does nothing but hand such values on.

    Raises:
        UserError: the values do not fit.
    """
    try:
        yield
    except errors as error:
        raise damaged(file, str(error).partition("\n")[0] or type(error).__name__) from error

"""Check the values of a training state, other than tensors, before a run resumes from it.

The state may be damaged or written by another program. A checker returns whether a run can resume with a value. Nothing
here imports PyTorch.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgm.errors import UserError, one_line, shown

Checker = Callable[[Any], bool]

HIGHEST = 2**53  # whole numbers up to here are the same in every reader of JSON
# Errors that reading and restoring unsuitable values may raise, in this project and in libraries.
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
STATE_ERRORS = (LookupError, TypeError, AttributeError)  # errors of an optimizer whose state is incomplete


def whole(value: Any) -> bool:
    """Return whether the value is a whole number that all readers of JSON keep."""
    return type(value) is int and abs(value) <= HIGHEST


def count(value: Any) -> bool:
    """Return whether the value is a whole number, at least 0."""
    return whole(value) and value >= 0


def text(value: Any) -> bool:
    """Return whether the value is a text."""
    return isinstance(value, str)


def sum_of_losses(value: Any) -> bool:
    """Return whether the value is a number, which may be infinite or NaN."""
    return type(value) is float or whole(value)


def number(value: Any) -> bool:
    """Return whether the value is a finite number."""
    return sum_of_losses(value) and math.isfinite(value)


def list_of(entry: Checker, length: int | None = None) -> Checker:
    """Return a checker of lists whose items pass `entry`; with `length`, of this length."""

    def check(value: Any) -> bool:
        return isinstance(value, list | tuple) and length in (None, len(value)) and all(map(entry, value))

    return check


def mapping_of(entry: Checker) -> Checker:
    """Return a checker of mappings from texts to values that pass `entry`."""
    return lambda value: isinstance(value, Mapping) and all(map(text, value)) and all(map(entry, value.values()))


def anything(value: Any) -> bool:
    """Return True: the reader of the value checks it."""
    return True


def counters(value: Any) -> bool:
    """Return whether all values are numbers, in mappings and lists of any depth.

    Lightning stores the positions of its loops in this form.
    """
    if isinstance(value, Mapping):
        return all(map(text, value)) and all(map(counters, value.values()))
    return value is None or isinstance(value, bool) or number(value) or list_of(counters)(value)


def phase(value: Any) -> bool:
    """Return whether the value is a pair: a group size of clips, and a count of such groups."""
    return list_of(count, 2)(value) and value[0] > 0


def reader(value: Any) -> bool:
    """Return whether the value is a record of the decoder, or None."""
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
    """Return the problem and place of the first value that does not fit; None if all fit.

    Args:
        values: the values that were read.
        layout: for each key a checker, or another layout; an optional key ends with a question mark.
        place: the dotted place of `values`.
    """
    if not isinstance(values, Mapping):
        return f"{place or 'it'} is {shown(values)}, not a mapping"
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
    """Return the error about a file of a checkpoint from which a run cannot resume."""
    return UserError(f"resume: {file} is damaged: {one_line(reason, 300)}; name another checkpoint")


@contextmanager
def taken_from(file: Path, errors: tuple[type[Exception], ...] = MISFITS) -> Iterator[None]:
    """Report errors of the block, which takes values from a file, as damage of the file.

    Args:
        errors: the errors to report so; by default all that may be raised by a block that only passes such values on.

    Raises:
        UserError: the values do not fit.
    """
    try:
        yield
    except errors as error:
        raise damaged(file, str(error).partition("\n")[0] or type(error).__name__) from error

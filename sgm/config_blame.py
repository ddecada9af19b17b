"""Tell apart errors of a configuration's values and mistakes in this program.

Both appear as an exception in a constructor. A wrong value gives the user one line; a mistake in this program keeps its
traceback. Types and names are checked before a class is called, so that the remaining errors are values that do not fit
together. To recognize a mistake in this program, the same class is built from the values of a shipped file: if that
fails at the same line of this project, the user's values are not the cause.
"""

import traceback
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

from sgm.config_places import Place, walk
from sgm.config_values import is_own_file
from sgm.errors import one_line
from sgm.memory_errors import is_out_of_memory

OWN_MISTAKES = (NameError, ImportError, SyntaxError, SystemError, NotImplementedError)
YAML_TYPES = (str, int, float, bool, NoneType, list, dict)
# Functions that build or try a configuration's classes: the next frame in a traceback is a class of another project.
BUILDERS = ("instantiate_from_config", "reporting", "make_dataset", "build_optimizer", "check_schedules")
_PLACE = "_place_in_configuration"


def blame(error: Exception, place: Place, parent: Place, use: Callable[[Any], Any] | None = None) -> str | None:
    """Return the user's error line for an object that cannot be built from a configuration.

    None: the values are not the cause, or the outer object decides, which then finds the innermost place.

    Args:
        error: the constructor's exception.
        place, parent: the places of the object and of the outer object.
        use: what was done with the object after it was built.
    """
    innermost = getattr(error, _PLACE, None)
    if innermost is None:
        innermost = place
        setattr(error, _PLACE, place)
    if parent.building or is_out_of_memory(error) or is_own_mistake(error, place, use):
        return None
    said = next(iter(str(error).splitlines()), "")
    target = innermost.config.get("target", "the object") if isinstance(innermost.config, dict) else "the object"
    return (
        f"{innermost}: {target} cannot be built from these params: {type(error).__name__}: {one_line(said, 300)}; "
        "correct them, or give --debug for the traceback"
    )


def is_own_mistake(error: Exception, place: Place, use: Callable[[Any], Any] | None = None) -> bool:
    """Return whether a constructor's error is a mistake in this program, not in the values."""
    where = own_line(error)
    if where is None:
        return False  # a class of the user or of a library, called with the user's values
    if isinstance(error, OWN_MISTAKES) or place.slot == "data":  # this project's datasets report wrong values
        return True
    if isinstance(error, AttributeError) and not isinstance(error.obj, YAML_TYPES) and not is_misplaced(error, place):
        return True
    innermost = getattr(error, _PLACE, place).config
    if isinstance(innermost, Mapping) and str(innermost.get("target")).endswith("FrozenT5Embedder"):
        return True  # it reports wrong values itself, and no shipped file can be built for comparison
    reference = place.sources.build_reference if place.sources else None
    other = reference(place.slot, place.config, use) if reference else None
    return other is not None and type(other) is type(error) and own_line(other) == where


def is_misplaced(error: AttributeError, place: Place) -> bool:
    """Return whether an attribute is missing in an object that the user put at a wrong place.

    An object that lacks an attribute of its own would fail at every place.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_locals.get("self") is error.obj:
        return False
    kind = error.obj if isinstance(error.obj, type) else type(error.obj)
    nodes = (node for _, node in walk(place.config) if isinstance(node, Mapping))
    return kind.__name__ in {str(node.get("target")).rpartition(".")[2] for node in nodes}


def own_line(error: BaseException) -> tuple[str, int] | None:
    """Return file and number of the innermost line of this project in a traceback.

    None if the line is in one of `BUILDERS`: the class is then from another project.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last: Any = next((frame for frame in reversed(frames) if is_own_file(frame.filename)), None)
    if last is None or last.name in BUILDERS:
        return None
    return last.filename, last.lineno

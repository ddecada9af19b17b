"""Tell whether a constructor failed because of the values in a configuration or because of a mistake in this program.

A wrong value is the user's to mend and gets one line; a mistake of ours keeps its traceback. Types and names are
checked before a class is called, so that what is left are values which do not go together. They are told from mistakes
of ours by building the same class of the values of a file that is shipped: if that fails at the same line of ours, the
user's values are not the reason.
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
# Functions that build or try whatever a configuration names: above them in a traceback is a class of somebody else.
BUILDERS = ("instantiate_from_config", "reporting", "make_dataset", "build_optimizer", "check_schedules")
_PLACE = "_place_in_configuration"


def blame(error: Exception, place: Place, parent: Place, use: Callable[[Any], Any] | None = None) -> str | None:
    """Return the line for the user when an object cannot be built of what a configuration says.

    None where that is not so, or is for the object around this one to decide, which then finds the innermost place.

    Args:
        error: what the constructor raised.
        place, parent: of the object, and of what it is built in.
        use: what was done with the object when it was built already.
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
        f"{innermost}: {target} cannot be built of these params: {type(error).__name__}: {one_line(said, 300)}; "
        "mend them, or give --debug to see where it happens"
    )


def is_own_mistake(error: Exception, place: Place, use: Callable[[Any], Any] | None = None) -> bool:
    """Return whether an error in a constructor is a mistake in this program rather than in the values it was given."""
    where = own_line(error)
    if where is None:
        return False  # a class of the user's or of a library, called with the user's values
    if isinstance(error, OWN_MISTAKES) or place.slot == "data":  # datasets of ours say themselves what does not fit
        return True
    if isinstance(error, AttributeError) and not isinstance(error.obj, YAML_TYPES) and not is_misplaced(error, place):
        return True
    innermost = getattr(error, _PLACE, place).config
    if isinstance(innermost, Mapping) and str(innermost.get("target")).endswith("FrozenT5Embedder"):
        return True  # no shipped file can be built to compare with, and what it loads it reports itself
    reference = place.sources.build_reference if place.sources else None
    other = reference(place.slot, place.config, use) if reference else None
    return other is not None and type(other) is type(error) and own_line(other) == where


def is_misplaced(error: AttributeError, place: Place) -> bool:
    """Return whether an attribute is missing in an object that the configuration chose for another to use.

    An object that misses an attribute of its own does so wherever it stands.
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
    """Return the innermost line of this project in a traceback, file and number.

    None where it is one of those that build whatever a configuration names: the class is then not of this project.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last: Any = next((frame for frame in reversed(frames) if is_own_file(frame.filename)), None)
    if last is None or last.name in BUILDERS:
        return None
    return last.filename, last.lineno

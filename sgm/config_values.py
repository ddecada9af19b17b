"""Check values against a constructor's signature.

Unknown and missing parameters and values of the wrong type are found.
"""

import collections.abc
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sgm.errors import shown

NO_DEFAULT = inspect.Parameter.empty
ROOT = Path(__file__).resolve().parents[1]  # root of the repository, or the folder of the installation
# In an installation `sat` is SwissArmyTransformer, and the modules of this repository's sat/ lie beside it.
IN_SAT = ("arguments", "data_video", "diffusion_video", "dit_video_concat", "sample_video", "train_vae", "train_video")
OWN_PLACES = (
    *(ROOT / name for name in ("sgm", "vae_modules", "cogvideox_sat")),
    *([ROOT / "sat"] if (ROOT / "sat" / "cogvideox_sat").is_dir() else [ROOT / f"{name}.py" for name in IN_SAT]),
)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "nothing"}
ITEMS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
MAPPINGS = (Mapping, dict, collections.abc.MutableMapping)
SEQUENCES = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, list, tuple)


class Problem(NamedTuple):
    """A wrong value: its key below `params`, and the rest of the message with what to do."""

    key: tuple[str | int, ...]
    text: str


def is_own(function: Any) -> bool:
    """Return whether a class or function is of this project, whose annotations are correct."""
    code = inspect.unwrap(function).__code__ if inspect.isfunction(function) else None
    return code is not None and is_own_file(code.co_filename)


def is_own_file(name: str) -> bool:
    """Return whether a source file belongs to this project."""
    path = Path(name)
    return any(path.is_relative_to(place) for place in OWN_PLACES)


@dataclass(frozen=True)
class Parameters:
    """The parameters that a class takes by name.

    Attributes:
        required: the names without a default.
        closed: the class takes no other names.
    """

    hints: dict[str, Any]
    defaults: dict[str, Any]
    required: tuple[str, ...]
    closed: bool


def parameters_of(factory: Callable[..., Any]) -> Parameters | None:
    """Return the parameters of a class, including those passed to its bases by `**kwargs`.

    None if the signature does not tell.
    """
    if not inspect.isclass(factory) or not inspect.isfunction(factory.__init__):
        return None
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    required: list[str] = []
    seen: set[str] = set()
    for base in factory.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        if not inspect.isfunction(init) or (seen and not is_own(init)):
            break  # the parameters of a library's class are unknown
        annotations = _annotations(init) if is_own(init) else {}
        open_ended = False
        for parameter in list(inspect.signature(init).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = True
            elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                if parameter.name in seen:
                    continue
                seen.add(parameter.name)
                if parameter.name in annotations:
                    hints[parameter.name] = annotations[parameter.name]
                if parameter.default is not parameter.empty:
                    defaults[parameter.name] = parameter.default
                elif init is factory.__init__:  # a class may provide its bases' parameters itself
                    required.append(parameter.name)
                hints.setdefault(parameter.name, Any)
        if not open_ended:
            closed = init is factory.__init__ or is_own(factory.__init__)
            return Parameters(hints, defaults, tuple(required), closed)
    return Parameters(hints, defaults, tuple(required), closed=False)


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # an annotation that only a type checker can read: its types stay unknown
        return {}


def problem_of_params(
    factory: Callable[..., Any], given: Mapping[str, Any], extra: Mapping[str, Any]
) -> Problem | None:
    """Return the error in a configuration's parameters of a class; None: no error found.

    Args:
        extra: parameters that the program passes in addition.
    """
    taken = parameters_of(factory)
    if taken is None:
        if odd := next((name for name in given if not isinstance(name, str)), None):
            return Problem((), f"the key {shown(odd)} is not a text")
        return _binding(factory, {**given, **extra})
    return check_params(taken, given, extra)


def check_params(taken: Parameters, given: Mapping[str, Any], extra: Collection[str] = ()) -> Problem | None:
    """Return the error in a configuration's parameters of a class; None: no error found.

    Args:
        extra: names of the parameters that the program passes in addition.
    """
    for name in given:
        if not isinstance(name, str):
            return Problem((), f"the key {shown(name)} is not a text")
    if taken.closed:
        for name in given:
            if name not in taken.hints:
                near = difflib.get_close_matches(name, taken.hints, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it can be {', '.join(taken.hints) or 'nothing'}"
                return Problem((name,), f"unknown; {hint}")
    for name in taken.required:
        if name not in given and name not in extra:
            return Problem((), f"{name}: missing; it needs {expected(taken.hints[name]) or 'a value'}")
    for name, value in given.items():
        if name in taken.hints and name not in extra:
            default = taken.defaults.get(name, NO_DEFAULT)
            infinite = isinstance(default, float) and math.isinf(default)
            if problem := problem_of_value(value, taken.hints[name], default, infinite):
                where, found, fits = problem
                return Problem((name, *where), f"got {shown(found)}; expected {fits}")
    return None


def _binding(factory: Callable[..., Any], params: Mapping[str, Any]) -> Problem | None:
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        return Problem((), str(error))
    except ValueError:  # a built-in without a signature
        pass
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def problem_of_value(
    value: Any, hint: Any, default: Any = NO_DEFAULT, infinite: bool = False
) -> tuple[tuple[str | int, ...], Any, str] | None:
    """Return the key in `value`, the wrong part and the expected words; None if the type fits.

    Only types that YAML can express are checked: numbers, texts, lists, mappings and nothing; others are accepted.

    Args:
        hint: the type.
        default: a value that is accepted even if its type differs.
        infinite: whether a number may be infinite.
    """
    options = _options(hint)
    if any(_is_unknown(option) for option in options):
        return None
    if type(value) is type(default) and value == default:
        return None
    problems = [problem for option in options if (problem := _problem(value, option, infinite)) is not None]
    if len(problems) < len(options):
        return None
    deeper = [problem for problem in problems if problem[0]]
    where, found, fits = deeper[0] if deeper else ((), value, "")
    return where, found, fits or expected(hint)


def expected(hint: Any) -> str:
    """Return the values that a type takes, in words; empty if it takes anything."""
    options = _options(hint)
    if any(_is_unknown(option) for option in options):
        return ""
    return " or ".join(dict.fromkeys(_words(option) for option in options))


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, `None` as its type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(hint) for option in _options(member))
    return (hint,)


def _is_unknown(hint: Any) -> bool:
    """Return whether values of this type cannot be checked."""
    if hint in KINDS or hint is Path or typing.get_origin(hint) is typing.Literal:
        return False
    kind = typing.get_origin(hint) or hint
    return kind not in MAPPINGS and kind not in SEQUENCES


def _words(hint: Any) -> str:
    if hint in KINDS:
        return KINDS[hint]
    if hint is Path:
        return "the name of a file"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if (typing.get_origin(hint) or hint) in MAPPINGS:
        return "keys and values"
    inner = {member for option in typing.get_args(hint) if option is not Ellipsis for member in _options(option)}
    items = ITEMS.get(inner.pop()) if len(inner) == 1 else None
    return f"a list of {items}" if items else "a list"


def _problem(value: Any, hint: Any, infinite: bool) -> tuple[tuple[str | int, ...], Any, str] | None:
    refused = ((), value, "")
    if hint is int:
        return None if type(value) is int else refused
    if hint is float:
        if type(value) not in (int, float) or abs(value) > 1e300:
            return None if infinite and value in (math.inf, -math.inf) else refused
        return None
    if hint is bool:
        return None if type(value) is bool or (type(value) is int and value in (0, 1)) else refused
    if hint is type(None):
        return None if value is None else refused
    if hint in (str, Path):
        return None if isinstance(value, str | Path) else refused
    if typing.get_origin(hint) is typing.Literal:
        return None if value in typing.get_args(hint) else refused
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in MAPPINGS:
        if not isinstance(value, Mapping):
            return refused
        items = [((name,), each, inner[1] if len(inner) == 2 else Any) for name, each in value.items()]
    else:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            return refused
        whole = kind is tuple and inner and Ellipsis not in inner
        if whole and len(value) != len(inner):
            return refused
        each_hint = inner if whole else [inner[0] if inner else Any] * len(value)
        items = [((index,), each, option) for index, (each, option) in enumerate(zip(value, each_hint, strict=True))]
    for place, each, option in items:
        if not all(member in KINDS for member in _options(option)):
            continue  # lists within lists: the class checks them
        if problem := problem_of_value(each, option):
            where, found, fits = problem
            return (*place, *where), found, fits
    return None

"""Read how often each entry of `train_data` is used: `{path, repeat}` or `{path, weight}`.

An entry with `repeat: N` counts as if its path were given N times. An entry with `weight` provides that share of all
samples, weight / sum of weights, whatever its size; an epoch has as many samples as all entries have together. Nothing
here imports PyTorch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sgm.errors import UserError

REPEATS, WEIGHTS = "train_data_repeats", "train_data_weights"
MOST = 10_000  # times that an entry may be used


def split_entries(section: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return an `args:` section with plain paths in `train_data` and `valid_data`.

    Repeats and weights of the entries of `train_data` become `train_data_repeats` and `train_data_weights`.

    Args:
        given: the arguments of the command line; if `train_data` is among them, repeats and weights of files do not
            count.

    Raises:
        UserError: an entry has unknown or wrong keys, or repeats or weights are given in both ways.
    """
    section = dict(section)
    for name in ("train_data", "valid_data"):
        entries = section.get(name)
        if isinstance(entries, dict):
            entries = [entries]
        if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
            continue
        for entry in entries:
            if isinstance(entry, dict):
                _check_entry(entry, name)
        section[name] = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
        for key, argument in (("repeat", REPEATS), ("weight", WEIGHTS)):
            values = [entry.get(key) if isinstance(entry, dict) else None for entry in entries]
            if all(value is None for value in values):
                continue
            if section.get(argument) is not None:
                raise UserError(f"args: {argument} is given, and so is {key} in {name}; give one of them")
            if key == "weight" and None in values:
                raise UserError(f"args: {name}: give a weight to all entries or to none")
            section[argument] = [1 if value is None else value for value in values]
    if "train_data" in given:
        section = {name: value for name, value in section.items() if name not in (REPEATS, WEIGHTS)}
    return section


def _check_entry(entry: Mapping[str, Any], name: str) -> None:
    known = ("path", "repeat", "weight") if name == "train_data" else ("path",)
    for key in entry:
        if key not in known:
            raise UserError(f"args: {name} has an entry with {key!r}; expected {', '.join(known)}")
    if not isinstance(entry.get("path"), str):
        raise UserError(f"args: {name} has an entry without a path, {dict(entry)}; give its path")
    if entry.get("repeat") is not None and entry.get("weight") is not None:
        raise UserError(f"args: {name}: {entry['path']} has a repeat and a weight; give one of them")


def check_mixing(args: Any) -> None:
    """Check that repeats and weights fit `train_data`.

    Raises:
        UserError: there are more or fewer numbers than entries, or a number is out of range.
    """
    for name in (REPEATS, WEIGHTS):
        values = getattr(args, name)
        if values and len(values) != len(args.train_data):
            raise UserError(
                f"{name}: {len(values)} numbers for {len(args.train_data)} entries in train_data; give one for each"
            )
    if wrong := [value for value in args.train_data_repeats if not 1 <= value <= MOST]:
        raise UserError(f"{REPEATS}: {wrong[0]} does not fit; give a whole number from 1 to {MOST}")
    if wrong := [value for value in args.train_data_weights if not 0 < value < float("inf")]:
        raise UserError(f"{WEIGHTS}: {wrong[0]} is not above 0; leave out entries that are not to be used")
    if args.train_data_repeats and args.train_data_weights:
        raise UserError(f"{REPEATS} and {WEIGHTS} are both given; choose one")


def repeated(paths: Sequence[str], repeats: Sequence[int]) -> list[str]:
    """Return the paths, each as often as it is used."""
    return [path for path, count in zip(paths, repeats or [1] * len(paths), strict=True) for _ in range(count)]


def draws_of(counts: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Return for every sample how often it is drawn in an epoch, on average.

    Args:
        counts: the number of samples of each entry.
        weights: the weight of each entry.
    """
    total, sum_of_weights = sum(counts), sum(weights)
    return [
        rate
        for count, weight in zip(counts, weights, strict=True)
        for rate in [total * weight / sum_of_weights / count] * count
    ]

"""HTML of training runs: curves of `metrics.jsonl` and videos."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox_sat.runs.videos import read_videos
from cogvideox_sat.web import markup
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.texts import Texts
from sgm.errors import UserError
from sgm.plain_json import parse_json

METRICS = "metrics.jsonl"
CONFIG = "training_config.yaml"
LARGEST = 32 * 2**20  # bytes of metrics that are read, the last ones
SHOWN = ("loss", "validation_loss", "lr", "grad_norm", "seconds_per_step")
WIDTH, HEIGHT, MARGIN = 480, 160, 8  # of a curve, in its own units
POINTS = 400
STEPS = 3  # whose videos are shown, the last ones
VIDEOS = 8  # of each step

Series = list[tuple[int, float]]


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a training run."""
    return path.is_dir() and ((path / CONFIG).is_file() or (path / METRICS).is_file())


def read_metrics(path: Path) -> dict[str, Series]:
    """Return the numbers of a run by name, each a list of (step, value).

    Incomplete lines of the file are left out.
    """
    series: dict[str, Series] = {}
    if path.is_symlink():
        return series
    for entry in entries_of(path):
        step = entry.get("step")
        if type(step) is not int:
            continue
        for name, value in entry.items():
            if name != "step" and type(value) in (int, float) and math.isfinite(value):
                series.setdefault(name, []).append((step, float(value)))
    return series


def entries_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file of lines, of its end if it is long."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LARGEST))
            lines = file.read(LARGEST).splitlines(keepends=True)
    except OSError:
        return
    for line in lines:
        with suppress(ValueError, RecursionError, json.JSONDecodeError):
            if line.endswith(b"\n") and isinstance(entry := parse_json(line), dict):
                yield entry


def thinned(series: Series, most: int = POINTS) -> Series:
    """Return at most so many points, evenly spread, the first and the last among them."""
    if len(series) <= most:
        return series
    return [series[round(i * (len(series) - 1) / (most - 1))] for i in range(most)]


def curve(name: str, series: Series) -> str:
    """Return a curve with its name, its last value and its range."""
    points = thinned(series)
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    across = (WIDTH - 2 * MARGIN) / max(1, steps[-1] - steps[0])
    up = (HEIGHT - 2 * MARGIN) / (high - low) if high > low else 0.0
    places = " ".join(
        f"{MARGIN + (step - steps[0]) * across:.1f},{HEIGHT - MARGIN - (value - low) * up:.1f}"
        for step, value in points
    )
    dots = ""
    if len(points) < 30:
        centres = (place.split(",") for place in places.split())
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in centres)
    label = f"{name}: {values[-1]:.5g} (step {steps[-1]}; {low:.5g} – {high:.5g})"
    return (
        f'<figure><figcaption>{markup.escaped(label)}</figcaption><svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{markup.escaped(label)}"><rect width="{WIDTH}" height="{HEIGHT}" fill="none" '
        f'stroke="currentColor" opacity="0.3"/><polyline points="{places}" fill="none" stroke="#4a90d9" '
        f'stroke-width="2"/><g fill="#4a90d9">{dots}</g></svg></figure>'
    )


def curves(metrics: Mapping[str, Series]) -> str:
    """Return the curves of a run that are worth looking at."""
    return "".join(curve(name, metrics[name]) for name in SHOWN if metrics.get(name))


def videos(shelf: Shelf, name: str, texts: Texts) -> str:
    """Return the videos of the last evaluations of a run, newest first."""
    folder = shelf.path(name)
    if (folder / "videos.jsonl").is_symlink():
        return ""
    by_step: dict[int, list[str]] = {}
    for video in read_videos(folder):
        if (place := inner_names(shelf, name, video.path)) is None:
            continue
        address = markup.address("media", "run", name, *place)
        caption = " – ".join(filter(None, [video.name, ", ".join(video.shows), video.prompt]))
        figure = f"<figure>{markup.video(address, caption)}<figcaption>{markup.escaped(caption)}</figcaption></figure>"
        by_step.setdefault(video.step, []).append(figure)
    parts = [
        f"<h4>{markup.escaped(texts['videos_of_step'].format(step=step))}</h4>"
        f'<div class="samples">{"".join(by_step[step][:VIDEOS])}</div>'
        for step in sorted(by_step, reverse=True)[:STEPS]
    ]
    return "".join(parts)


def inner_names(shelf: Shelf, name: str, path: Path) -> Sequence[str] | None:
    """Return the names that lead to a file of a run.

    The result is None if the file is outside the run or is of a kind that is not shown.
    """
    try:
        names = path.relative_to(shelf.path(name)).parts
        shelf.file(name, *names)
    except (UserError, ValueError):
        return None
    return names


def log(lines: Sequence[str], most: int = 30) -> str:
    """Return the last lines of what a program says."""
    return f'<pre class="log">{markup.escaped(chr(10).join(lines[-most:]))}</pre>' if lines else ""

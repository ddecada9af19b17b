"""Judge videos against their prompts and report it, for `tools/evaluate_shapes.py`."""

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideox_sat.files.atomic import write_atomically
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.media.video_reading import open_video
from cogvideox_sat.shapes.drawing import draw
from cogvideox_sat.shapes.input_fidelity import InputFidelity, window_frames
from cogvideox_sat.shapes.input_fidelity import lines as fidelity_lines
from cogvideox_sat.shapes.judge import NONE, judge
from cogvideox_sat.shapes.prompted_videos import Prompted
from cogvideox_sat.shapes.scenes import Item, Scene, random_scenes
from sgm.errors import UserError
from sgm.plain_json import standard_json

logger = logging.getLogger(__name__)

ALL_FOUR = "all four"
# The values of each row of the table for a shape in its scene.
ASPECTS: dict[str, Callable[[Item, Scene], Any]] = {
    "colour": lambda item, scene: item.colour,
    "shape": lambda item, scene: item.shape,
    "motion": lambda item, scene: item.motion,
    "background": lambda item, scene: (scene.pattern, scene.background),
    ALL_FOUR: lambda item, scene: (item.colour, item.shape, item.motion, scene.pattern, scene.background),
    "size": lambda item, scene: item.size,
    "number of shapes": lambda item, scene: len(scene.items),
}
NOTHING = Item(NONE, NONE, NONE, NONE)


def run(options: argparse.Namespace, prompted: Sequence[Prompted]) -> str:
    """Judge the videos as the command's options say, write the numbers, return the report.

    Raises:
        UserError: a video or image cannot be read, or a file cannot be written.
    """
    first, _ = read_video(next(video for prompt in prompted for video in prompt.videos))
    numbers: dict[str, Any] = {"videos": sum(len(prompt.videos) for prompt in prompted)}
    numbers["prompts_without_videos"] = sum(not prompt.videos for prompt in prompted)
    if options.own_accuracy_clips:
        numbers["judge"] = own_accuracy(options.own_accuracy_clips, options.seed, first.shape)
    results: dict[int, list[dict[str, bool]]] = {1: [], 2: []}
    fidelity = InputFidelity()
    for prompt in prompted:
        for path in prompt.videos:
            frames, fps = read_video(path)
            clips = 1.0
            if prompt.request is not None:
                fidelity.measure(prompt.request, frames, fps)
                if window := window_frames(prompt.request, len(frames)):
                    clips = (len(frames) - 1) / (window - 1)
            results[len(prompt.scene.items)] += compare(prompt.scene, judge(frames, clips))
    for count, name in ((1, "one_shape"), (2, "two_shapes")):
        if results[count]:
            scenes = [prompt.scene for prompt in prompted if len(prompt.scene.items) == count]
            numbers[name] = summary(results[count]) | {"by_chance": by_chance(scenes)}
    numbers |= fidelity.means()
    if options.json:
        write_atomically(options.json, standard_json(numbers))
    return report(numbers)


def read_video(path: Path) -> tuple[Tensor, float]:
    """Return the frames (t, 3, h, w) of a video, in [-1, 1], and its frames per second.

    Raises:
        UserError: the video cannot be read.
    """
    try:
        with open_video(path) as video:
            frames = torch.from_numpy(np.stack(list(video.all_frames())))
            seconds = video.facts.seconds
    except UnreadableClip as error:
        raise UserError(f"cannot read the video {path}: {error}; sample it again or remove it") from error
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1, (len(frames) - 1) / seconds if seconds else 8.0


def own_accuracy(clips: int, seed: int, shape: Sequence[int]) -> dict[str, Any]:
    """Return how often the judge is right about drawn clips that were written to a file.

    Args:
        clips: number of clips.
        shape: shape (t, 3, h, w) of the clips.
    """
    frames, _, height, width = shape
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        for scene in random_scenes(clips, seed, "held_out", pairs=False):
            with VideoWriter(path, 8, height, width) as video:
                video.write(draw(scene, frames, height, width))
            results += compare(scene, judge(read_video(path)[0]))
    return summary(results)


# ---------------------------------------------------------------- right or wrong


def compare(expected: Scene, seen: Scene) -> list[dict[str, bool]]:
    """Return which aspects are right, for each shape of the prompt.

    If the prompt has two shapes, each is identified by its colour.
    """
    results = []
    for item in expected.items:
        if len(expected.items) == 1:
            found = seen.items[0] if seen.items else NOTHING
        else:
            found = next((other for other in seen.items if other.colour == item.colour), NOTHING)
        results.append({name: says(item, expected) == says(found, seen) for name, says in ASPECTS.items()})
    return results


def summary(results: Sequence[dict[str, bool]]) -> dict[str, Any]:
    """Return the number of shapes, and for how many of them each aspect was right."""
    return {"count": len(results), "right": {name: sum(result[name] for result in results) for name in ASPECTS}}


def by_chance(scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the expected share of right answers if videos were exchanged between prompts.

    With only one prompt, the shares are 1.
    """
    said = [(item, scene) for scene in scenes for item in scene.items]
    return {name: _agreement(says(*one) for one in said) for name, says in ASPECTS.items()}


def _agreement(answers: Iterable[Any]) -> float:
    """Return how often two answers, drawn at random, are equal."""
    counts = Counter(answers)
    total = counts.total()
    return sum(count * (count - 1) for count in counts.values()) / (total * (total - 1)) if total > 1 else 1.0


# ---------------------------------------------------------------- report


def report(numbers: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = []
    if judged := numbers.get("judge"):
        lines += table(f"The judge on {judged['count']} drawn clips", judged)
    for name, title in (("one_shape", "videos of one shape"), ("two_shapes", "shapes in videos of two")):
        if found := numbers.get(name):
            lines += table(f"{found['count']} {title}", found)
    if told := fidelity_lines(numbers):
        lines += [*told, ""]
    if numbers["prompts_without_videos"]:
        lines.append(f"Prompts without a video: {numbers['prompts_without_videos']}")
    return "\n".join(lines).rstrip()


def table(title: str, found: dict[str, Any]) -> list[str]:
    """Return the lines of a table."""
    chance = found.get("by_chance")
    lines = [title, f"{'':18}{'right':>9}{'of':>14}{'by chance':>13}" if chance else f"{'':18}{'right':>9}{'of':>14}"]
    for name, right in found["right"].items():
        counted = f"{right}/{found['count']}"
        line = f"  {name:16}{100 * right / found['count']:>7.1f} %{counted:>14}"
        lines.append(line + (f"{100 * chance[name]:>11.1f} %" if chance else ""))
    return [*lines, ""]

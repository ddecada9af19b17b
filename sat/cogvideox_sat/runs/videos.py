"""The videos of a run, listed in its `videos.jsonl`, one JSON object per line.

This module imports no PyTorch.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.plain_json import parse_json

VIDEOS_FILE = "videos.jsonl"


@dataclass(frozen=True)
class RunVideo:
    """A video that a run wrote while training.

    Args:
        step: step of the run after which it was made; 0: before the first step.
        name: name of the video at every step: `samples/N` and `valid_prompts/N` for validation clip or prompt N;
            `comparisons/clip_N` and `comparisons/prompt_N` for the same beside its inputs; `reconstructions/N` for a
            VAE in training.
        path: path of the file.
        prompt: the prompt; None: sampled without one.
        shows: what it shows, from left to right, such as ("clip", "reconstruction", "sample").
    """

    step: int
    name: str
    path: Path
    prompt: str | None = None
    shows: tuple[str, ...] = ("sample",)


def video_entry(folder: Path, name: str, path: Path, details: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a video without its step.

    A file in the run's folder is named relative to it.
    """
    inside = path.is_relative_to(folder)
    return {"name": name, "file": path.relative_to(folder).as_posix() if inside else str(path.absolute()), **details}


def read_videos(folder: Path) -> list[RunVideo]:
    """Return the existing videos of a run, in the order in which they were made.

    The run may still be active: an incomplete line is skipped. If several lines describe one video of a step, the last
    one counts.
    """
    try:
        lines = (folder / VIDEOS_FILE).read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    found: dict[tuple[int, str], RunVideo] = {}
    for line in lines:
        video = _video_of(folder, line)
        if video is not None and os.path.isfile(video.path):  # noqa: PTH113, `Path.is_file` may raise
            found.pop((video.step, video.name), None)
            found[video.step, video.name] = video
    return list(found.values())


def _video_of(folder: Path, line: bytes) -> RunVideo | None:
    """Return the video of a line; None for a line that is incomplete or malformed."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        if line.endswith(b"\n"):
            entry = parse_json(line)
            prompt, shows = entry.get("prompt"), entry.get("shows", ["sample"])
            texts = [entry["name"], entry["file"], *shows, *([] if prompt is None else [prompt])]
            if type(entry["step"]) is int and isinstance(shows, list) and all(isinstance(text, str) for text in texts):
                return RunVideo(entry["step"], entry["name"], folder / entry["file"], prompt, tuple(shows))
    return None

"""Find the videos of each prompt, for `tools/evaluate_shapes.py`."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from cogvideox_sat.files.output_paths import output_path
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.shapes.scenes import Scene, parse
from sgm.errors import UserError

logger = logging.getLogger(__name__)


class Prompted(NamedTuple):
    """A prompt and the videos that were made for it; no videos if they are missing."""

    scene: Scene
    request: PromptRequest | None  # None: only the name of the folder is known
    videos: list[Path]


def from_file(folder: Path, file: Path) -> list[Prompted]:
    """Return every prompt of the file, with a warning for those without videos."""
    prompted = []
    for request in read_prompts(file):
        first = output_path(folder, request.index, request.text, 0)
        prompted.append(Prompted(parse(request.text), request, _videos(first.parent.parent)))
        if not prompted[-1].videos:
            logger.warning("missing: %s", first)
    return prompted


def from_folders(folder: Path) -> list[Prompted]:
    """Return the prompts in the names of the output folders, in their order.

    Raises:
        UserError: a name is not the caption of a scene.
    """
    found = []
    for path in folder.iterdir():
        if path.is_dir() and (match := re.fullmatch(r"(\d+)_(.+)", path.name)):
            try:
                scene = parse(match[2].replace("_", " "))
            except UserError as error:
                raise UserError(f"{error}; if the name of the folder is truncated, give --input_file") from error
            found.append((int(match[1]), path, Prompted(scene, None, _videos(path))))
    found.sort(key=lambda entry: entry[:2])
    for _, path, prompt in found:
        if not prompt.videos:
            logger.warning("missing: %s", path / "0" / "000000.mp4")
    return [prompt for _, _, prompt in found]


def _videos(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*/000000.mp4"), key=lambda path: (len(path.parent.name), path))

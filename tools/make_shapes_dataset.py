"""Makes a small dataset to try training on: clips of a coloured shape that moves over a plain background.

  python tools/make_shapes_dataset.py --output data/shapes --clips 8 --frames 49 --size 64 96 --fps 8 --seed 0

With `--images N` there are as many images beside, as a VAE is trained on: single moments of other such clips. Every
clip has a caption such as "a large red circle moving left on a blue background". Files are `videos/00000.mp4` and
`labels/00000.txt`, or `images/00000.png` and `images/00000.txt`, as `data_video.SFTDataset` reads them. The same
settings give the same dataset; one that is there and complete is left alone, and a folder that this tool did not write
is never touched.
"""

import argparse
import json
import logging
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from sgm.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("make_shapes_dataset")

VERSION = 1  # of what this tool draws: raise it when the same settings give other clips
MARKER = ".shapes.json"  # in the output folder: the settings of a complete dataset

COLOURS = {  # red, green, blue in [0, 1]
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.7),
    "orange": (1.0, 0.55, 0.05),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.14, "large": 0.26}  # radius, in parts of the shorter side
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "turning in a circle", "standing still")


@dataclass(frozen=True)
class Scene:
    """What one clip shows, in the words of its caption.

    Args:
        phase: in [0, 1), where the shape starts.
        offset: in [-1, 1], where it is across the direction in which it moves.
    """

    size: str
    colour: str
    shape: str
    motion: str
    background: str
    phase: float
    offset: float

    @property
    def caption(self) -> str:
        shape = f"{self.size} {self.colour} {self.shape}"
        return f"{_article(shape)} {shape} {self.motion} on {_article(self.background)} {self.background} background"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def random_scenes(count: int, seed: int) -> list[Scene]:
    """As many scenes; their captions differ as long as there are others left."""
    chance = random.Random(seed)
    kinds = [
        (size, colour, shape, motion, background)
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for background in COLOURS
        if background != colour
    ]
    chosen = []
    while len(chosen) < count:
        chosen += chance.sample(kinds, min(count - len(chosen), len(kinds)))
    return [Scene(*kind, phase=chance.random(), offset=chance.uniform(-1, 1)) for kind in chosen]


def centre(scene: Scene, progress: float, height: int, width: int) -> tuple[float, float]:
    """(row, column) of the middle of the shape, in pixels, when the share `progress` of the clip is over.

    The shape never leaves the picture.
    """
    margin = SIZES[scene.size] * min(height, width)
    if scene.motion == "turning in a circle":
        reach, angle = min(height, width) / 2 - margin, 2 * math.pi * (scene.phase + progress)
        return height / 2 + reach * math.sin(angle), width / 2 + reach * math.cos(angle)
    vertical = scene.motion in ("moving up", "moving down")
    length, breadth = (height, width) if vertical else (width, height)
    travelled = scene.phase if scene.motion == "standing still" else 0.3 * scene.phase + 0.7 * progress
    if scene.motion in ("moving left", "moving up"):
        travelled = 1 - travelled
    along = margin + travelled * (length - 2 * margin)
    across = breadth / 2 + scene.offset * (breadth / 2 - margin)
    return (along, across) if vertical else (across, along)


def draw(scene: Scene, frames: int, height: int, width: int) -> "Tensor":
    """The clip: (frames, 3, height, width) in [-1, 1], edges antialiased."""
    import torch

    return torch.stack([draw_moment(scene, t, height, width) for t in torch.linspace(0, 1, frames).tolist()])


def draw_moment(scene: Scene, progress: float, height: int, width: int) -> "Tensor":
    """The frame (3, height, width) when the share `progress` of the clip is over."""
    import torch

    radius = SIZES[scene.size] * min(height, width)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    shape_colour, background = (torch.tensor(COLOURS[name])[:, None, None] for name in (scene.colour, scene.background))
    row, column = centre(scene, progress, height, width)
    inside = (0.5 - _distance(scene.shape, rows - row, columns - column, radius)).clamp(0, 1)
    return (inside * shape_colour + (1 - inside) * background) * 2 - 1


def _distance(shape: str, down: "Tensor", right: "Tensor", radius: float) -> "Tensor":
    """How far pixels are outside the shape (inside: negative), in pixels; near its edge, where it matters."""
    import torch

    from_centre = torch.hypot(down, right)
    if shape == "circle":
        return from_centre - radius
    if shape == "ring":
        return (from_centre - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(down.abs(), right.abs()) - 0.8 * radius
    # An equilateral triangle standing on its base: the largest of the distances from its three sides.
    slanted = right.abs() * math.sin(math.pi / 3) - down * math.cos(math.pi / 3)
    return torch.maximum(down, slanted) - radius / 2


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/shapes"), help="folder (default: data/shapes)")
    parser.add_argument("--clips", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--images", type=int, default=0, help="how many images beside them (default: 0)")
    parser.add_argument("--frames", type=int, default=49, help="of a clip (default: 49)")
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96], metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--fps", type=float, default=8, help="frames a second (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of what the clips show (default: 0)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        make_dataset(options)
    except UserError as error:
        logger.error("error: %s", error)
        return 1
    return 0


def make_dataset(options: argparse.Namespace) -> None:
    """Raises UserError if the settings make no sense, or the folder holds something else or cannot be written."""
    if min(options.clips, options.frames) < 1 or options.images < 0 or not options.fps > 0 or min(options.size) < 16:
        raise UserError(
            "clips, frames and fps must be positive, images not negative, and height and width at least 16 pixels"
        )
    if any(side % 2 for side in options.size):
        raise UserError(f"height and width must be even, got {options.size[0]} and {options.size[1]}")
    settings = {name: getattr(options, name) for name in ("clips", "frames", "size", "fps", "seed")}
    settings |= {"images": options.images} if options.images else {}
    settings["version"] = VERSION
    output = options.output
    marker = output / MARKER
    if marker.is_file() and marker.read_text() == json.dumps(settings):
        logger.info("%s is there", output)
        return
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and was not made by this tool: give another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".shapes-") as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            write_clips(new, settings)
            if output.exists():
                output.rename(old)
            new.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    images = f" and {options.images} images" if options.images else ""
    logger.info("%s: %d clips of %d frames%s", output, options.clips, options.frames, images)


def write_clips(folder: Path, settings: dict) -> None:
    from video_output import VideoWriter

    height, width = settings["size"]
    (folder / "labels").mkdir(parents=True)
    for number, scene in enumerate(random_scenes(settings["clips"], settings["seed"])):
        with VideoWriter(folder / "videos" / f"{number:05d}.mp4", settings["fps"], height, width) as video:
            video.write(draw(scene, settings["frames"], height, width))
        (folder / "labels" / f"{number:05d}.txt").write_text(scene.caption + "\n")
    write_images(folder / "images", settings)
    (folder / MARKER).write_text(json.dumps(settings))


def write_images(folder: Path, settings: dict) -> None:
    """Moments of clips that none of the dataset's own is."""
    from PIL import Image

    chance = random.Random(f"images {settings['seed']}")
    count = settings.get("images", 0)
    if count:
        folder.mkdir()
    for number, scene in enumerate(random_scenes(count, chance.getrandbits(32))):
        frame = draw_moment(scene, chance.random(), *settings["size"])
        pixels = ((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(scene.caption + "\n")


if __name__ == "__main__":
    sys.exit(main())

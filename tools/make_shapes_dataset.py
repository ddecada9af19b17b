"""Make a dataset of clips with one or two coloured shapes that move.

  python tools/make_shapes_dataset.py --output data/shapes --clips 8 --frames 49 --size 64 96 --fps 8 --seed 0
  python tools/make_shapes_dataset.py --output data/spirals --concept spiral --clips 30 --frames 9 --size 64 64
  python tools/make_shapes_dataset.py --prompts_file prompts.txt --prompts 64 --split held_out

Backgrounds are plain or patterned. Every clip has a caption such as "a large red circle moving left on a blue
background", with varying phrases. `--images N` adds images for training a VAE: single moments of other clips. Files are
`videos/00000.mp4` and `labels/00000.txt`, or `images/00000.png` and `images/00000.txt`, as `data_video.SFTDataset`
reads them. Equal settings give an equal dataset; a complete one is kept, and a folder of other content is never
changed.

22 % of all combinations of colour, shape, motion and background are held out: `--split train`, the default, never shows
them, `--split held_out` shows nothing else. `--shapes circle cross cross` draws only these shapes, crosses twice as
often; `--sizes` and `--motions` work alike. `--concept spiral` draws shapes that move in a spiral, `--concept star`
purple stars: content of no other dataset, for fine-tuning. `--begins 0 0.5` starts each clip at one of these moments of
its motion, in clip lengths, as the windows of a continued clip do.

`--prompts_file FILE` writes captions of single shapes for sampling instead of a dataset. `--with_first_frames` adds an
image to each, `prompt@@prompts/00000.png`, and writes the clip that begins with it, `prompts/00000.mp4`, into the
folder named like the file. `--with_last_frames` also adds the last frame of the clip, `@@prompts/00000_last.png`.
Exit codes: 0 done, 2 the arguments or files are wrong.
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.tool_parser import ToolParser  # noqa: E402
from cogvideox_sat.files.atomic import new_folder, reported_as_user_error, write_atomically  # noqa: E402
from cogvideox_sat.shapes.scenes import CONCEPTS, MOTIONS, SHAPES, SIZES, SPLITS, Scene, phrase, random_scenes  # noqa: E402
from sgm.errors import UserError, shown  # noqa: E402
from sgm.exit_codes import exit_code  # noqa: E402

logger = logging.getLogger("make_shapes_dataset")

VERSION = 4  # raise it when equal settings give other clips
CHOICES = {"sizes": tuple(SIZES), "shapes": SHAPES, "motions": tuple(MOTIONS)}  # options and their values
MARKER = ".shapes.json"  # in the output folder: the settings of a complete dataset


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_code(lambda: make(arguments), logger, command_line=arguments)


def make(arguments: Sequence[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    check_options(options)
    if options.prompts_file:
        make_prompts(options)
    else:
        make_dataset(options)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("data/shapes"), help="folder (default: data/shapes)")
    add("--clips", type=int, default=8, help="number of clips (default: 8)")
    add("--images", type=int, default=0, help="number of images in addition (default: 0)")
    add("--frames", type=int, default=49, help="frames of a clip (default: 49)")
    add("--size", type=int, nargs=2, default=[64, 96], metavar=("HEIGHT", "WIDTH"), help="in pixels")
    add("--fps", type=float, default=8, help="frames per second (default: 8)")
    add("--seed", type=int, default=0, help="seed of the content (default: 0)")
    add("--split", choices=SPLITS, default="train", help="combinations that are shown (default: train)")
    for name, words in CHOICES.items():
        word = name.removesuffix("s").upper()
        add(f"--{name}", nargs="+", choices=words, metavar=word, help="draw these; repeated values more often")
    add("--begins", type=float, nargs="+", metavar="MOMENT", help="start clips at these moments of their motion")
    add("--concept", choices=tuple(CONCEPTS), help="draw only this concept")
    add("--prompts_file", type=Path, metavar="FILE", help="write prompts to this file instead of a dataset")
    add("--prompts", type=int, default=64, help="number of prompts (default: 64)")
    add("--with_first_frames", action="store_true", help="for image-to-video: add images and clips to the prompts")
    add("--with_last_frames", action="store_true", help="for key frames: add the last frames too")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Check the settings.

    Raises:
        UserError: a setting is out of range, or settings do not fit together.
    """
    for name, least in (("clips", 1), ("frames", 1), ("images", 0), ("prompts", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: got {getattr(options, name)}; it must be at least {least}")
    if not 0 < options.fps < 1000:
        raise UserError(f"--fps: got {options.fps:g}; it must be above 0 and below 1000")
    if any(side < 16 or side % 2 for side in options.size):
        raise UserError(f"--size: got {options.size[0]} {options.size[1]}; both must be even and at least 16")
    if not all(0 <= begin <= 100 for begin in options.begins or []):
        raise UserError(f"--begins: got {shown(options.begins)}; each must be between 0 and 100")
    for kind in CONCEPTS.get(options.concept, {}):
        if getattr(options, f"{kind}s", None):
            raise UserError(f"--concept {options.concept} is a {kind}; leave out --{kind}s or the concept")
    if options.with_first_frames and not options.prompts_file:
        raise UserError("--with_first_frames needs --prompts_file; give both")
    if options.with_last_frames and not options.with_first_frames:
        raise UserError("--with_last_frames needs --with_first_frames; give both")
    if options.with_first_frames and not options.prompts_file.suffix:
        raise UserError(f"--prompts_file: {options.prompts_file} needs a suffix such as .txt, for its folder")


# ---------------------------------------------------------------------------------------------------------------------
# Dataset
# ---------------------------------------------------------------------------------------------------------------------


def make_dataset(options: argparse.Namespace) -> None:
    """Write the dataset, unless it exists with the same settings.

    Raises:
        UserError: the folder has other content, or cannot be written.
    """
    names = ("clips", "images", "frames", "size", "fps", "seed", "split", "concept")
    settings = {name: getattr(options, name) for name in names} | {"version": VERSION}
    settings |= chosen_words(options) | ({"begins": options.begins} if options.begins else {})
    output = options.output
    marker = output / MARKER
    if marker.is_file() and marker.read_text() == json.dumps(settings):
        logger.info("%s exists already", output)
        return
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} exists and was not made by this tool; give another folder")
    with new_folder(output, needed=0) as new:
        write_clips(new, settings)
    images = f" and {options.images} images" if options.images else ""
    logger.info("%s: %d clips of %d frames%s", output, options.clips, options.frames, images)


def write_clips(folder: Path, settings: dict) -> None:
    (folder / "labels").mkdir()
    chance = random.Random(f"captions {settings['seed']}")
    begin_of = random.Random(f"begins {settings['seed']}")
    scenes = scenes_of(settings, settings["clips"], settings["seed"])
    for number, scene in enumerate(scenes):
        begin = begin_of.choice(settings.get("begins", [0.0]))
        write_clip(folder / "videos" / f"{number:05d}.mp4", scene, settings, begin)
        (folder / "labels" / f"{number:05d}.txt").write_text(phrase(scene, chance) + "\n")
    write_images(folder / "images", settings)
    (folder / MARKER).write_text(json.dumps(settings))


def scenes_of(settings: dict, count: int, seed: int) -> list[Scene]:
    words = {name: settings[name] for name in CHOICES if name in settings}
    return random_scenes(count, seed, settings["split"], settings["concept"], **words)


def chosen_words(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the given options of CHOICES, as arguments of `random_scenes`."""
    return {name: getattr(options, name) for name in CHOICES if getattr(options, name)}


def write_clip(path: Path, scene: Scene, settings: dict, begin: float = 0.0) -> None:
    # Imported here, since PyTorch takes seconds to load
    from cogvideox_sat.media.video_output import VideoWriter
    from cogvideox_sat.shapes.drawing import draw

    height, width = settings["size"]
    with VideoWriter(path, settings["fps"], height, width, lossless=True) as video:
        video.write(draw(scene, settings["frames"], height, width, begin))


def write_images(folder: Path, settings: dict) -> None:
    """Write images: moments of clips that are not in the dataset."""
    chance = random.Random(f"images {settings['seed']}")
    if settings["images"]:
        folder.mkdir()
    scenes = scenes_of(settings, settings["images"], chance.getrandbits(32))
    for number, scene in enumerate(scenes):
        write_image(folder / f"{number:05d}.png", scene, chance.random(), settings["size"])
        (folder / f"{number:05d}.txt").write_text(phrase(scene, chance) + "\n")


def write_image(path: Path, scene: Scene, moment: float, size: Sequence[int]) -> None:
    from PIL import Image

    from cogvideox_sat.shapes.drawing import draw_moments

    frame = draw_moments(scene, [moment], *size)[0]
    pixels = ((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def make_prompts(options: argparse.Namespace) -> None:
    """Write the prompt file, and its folder of images if asked for.

    Raises:
        UserError: the file or the folder exists with other content.
    """
    file, folder = options.prompts_file, options.prompts_file.with_suffix("")
    chance = random.Random(f"captions {options.seed}")
    words = chosen_words(options)
    scenes = random_scenes(options.prompts, options.seed, options.split, options.concept, pairs=False, **words)
    moments = {".png": 0.0} if options.with_first_frames else {}  # of the clip that the images show, by their endings
    moments |= {"_last.png": 1.0} if options.with_last_frames else {}
    content = ""
    for number, scene in enumerate(scenes):
        images = [f"@@{folder.name}/{number:05d}{ending}" for ending in moments]
        content += f"{phrase(scene, chance)}{''.join(images)}\n"
    settings = {name: getattr(options, name) for name in ("frames", "size", "fps")} | {"version": VERSION}
    marker = folder / MARKER
    described = json.dumps(settings | {"prompts": content})
    with reported_as_user_error(file):
        if file.exists() and file.read_bytes() != content.encode():
            raise UserError(f"--prompts_file: {file} exists with other content; give another file")
        if options.with_first_frames and folder.exists():
            if not marker.is_file() or marker.read_text() != described:
                raise UserError(f"--prompts_file: {folder} exists with other content; give another file")
        elif options.with_first_frames:
            with new_folder(folder, needed=0) as new:
                for number, scene in enumerate(scenes):
                    for ending, moment in moments.items():
                        write_image(new / f"{number:05d}{ending}", scene, moment, options.size)
                    write_clip(new / f"{number:05d}.mp4", scene, settings)
                (new / MARKER).write_text(described)
    write_atomically(file, content)
    logger.info("%s: %d prompts", file, options.prompts)


if __name__ == "__main__":
    sys.exit(main())

"""Measure how often sampled videos of moving shapes show the content of their prompts.

  python tools/evaluate_shapes.py --videos outputs/tiny --input_file prompts.txt
  python tools/evaluate_shapes.py --videos outputs/tiny

A judge recognizes the content from the pixels. The videos are those of sampling, `{n}_{prompt}/{i}/000000.mp4`. The
prompts are captions as `tools/make_shapes_dataset.py` writes them, read from the prompt file, or else from the names of
the folders. The report begins with the judge's accuracy on new clips of held-out combinations, with the same size and
length, written and read as videos are. "By chance" is the accuracy if each video had another one of the prompts. If
requests have images, clips or several windows (`extend`), the report adds the PSNR of the first, the last and other
frames against their images, the mean difference from the clip of video-to-video, and the frame difference at the joints
of windows. Exit codes: 0 done, 2 the arguments or files are wrong.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.input_paths import tell_places  # noqa: E402
from cogvideox_sat.commands.tool_parser import ToolParser, locate_inputs  # noqa: E402
from cogvideox_sat.files.output_paths import check_file  # noqa: E402
from cogvideox_sat.shapes.prompted_videos import from_file, from_folders  # noqa: E402
from sgm.errors import UserError  # noqa: E402
from sgm.exit_codes import exit_code  # noqa: E402

logger = logging.getLogger("evaluate_shapes")


def main(command_line: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: evaluate(command_line), logger, command_line=command_line)


def evaluate(command_line: Sequence[str] | None) -> int:
    options = build_parser().parse_args(command_line)
    check_options(options)
    prompted = from_file(options.videos, options.input_file) if options.input_file else from_folders(options.videos)
    if not any(prompt.videos for prompt in prompted):
        raise UserError(
            f"--videos: {options.videos} has no video of these prompts, such as 0_a_prompt/0/000000.mp4; name the "
            "output_dir of sampling"
        )
    tell_places()
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
    from cogvideox_sat.shapes.report import run

    sys.stdout.write(f"{run(options, prompted)}\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--videos", type=Path, metavar="FOLDER", help="the output_dir of sampling")
    add("--input_file", type=Path, metavar="FILE", help="the prompt file of sampling (default: the folders' names)")
    add("--own_accuracy_clips", type=int, default=200, help="number of clips to test the judge; 0: none (default: 200)")
    add("--seed", type=int, default=0, help="seed of these clips (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the numbers; null is the infinite PSNR of equal frames")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Resolve the input paths and check the arguments.

    Raises:
        UserError: an argument is missing or wrong.
    """
    if options.videos is None:
        raise UserError("--videos: missing; name the output_dir of sampling, for example outputs/tiny")
    given = options.videos
    locate_inputs(options, "videos", "input_file")
    if not options.videos.is_dir():
        raise UserError(f"--videos: {given} is a file; name the output_dir of sampling")
    if options.own_accuracy_clips < 0:
        raise UserError(f"--own_accuracy_clips: got {options.own_accuracy_clips}; it must be at least 0")
    if options.json:
        check_file(options.json, "--json")


if __name__ == "__main__":
    sys.exit(main())

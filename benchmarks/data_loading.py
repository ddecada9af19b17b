"""Measure clips per second of the training data's reader, and files per second of probing.

    python benchmarks/data_loading.py [--source-fps 30] [--fps 8] [--frames 49] [--threads 1] [--write]

Reading: the frames of a clip, from opening the file to RGB pixels. It is compared with decord, and with reading the
whole window, converting every frame to RGB and keeping the wanted ones: with decord, as the original trainer does, and
with PyAV. All must give the same pixels. The last column is the time of a data set for a clip, with resizing and
cropping. With one thread, the seconds are processor time, so that other processes on the machine do not count.

Probing: size and length of many files, as before the first run on a data set, compared with opening each by decord.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import tell  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402


def main() -> None:
    args = arguments()
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
    from measuring.clip_rates import probing, reading, serve, write_videos

    serve(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        videos = {size: write_videos(args, Path(folder), size) for size in args.sources}
        if not args.only_probe:
            tell("Reading clips", reading(args, videos), args.write)
        if args.files:
            tell("Probing clips", probing(args, Path(folder) / "many", next(iter(videos.values()))), args.write)


def arguments() -> argparse.Namespace:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [(480, 720), (720, 1280), (1080, 1920)]
    parser.add_argument("--sources", nargs="+", type=size, default=sizes, metavar="HxW", help="sizes of the files")
    parser.add_argument("--source-fps", type=float, default=30)
    parser.add_argument("--fps", type=float, default=8, help="of the clips")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--files", type=int, default=1000, help="number of files to probe; 0: none")
    parser.add_argument("--only-probe", action="store_true", help="do not read clips")
    parser.add_argument("--threads", type=int, default=1, help="that decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """Return the height and width of `720x1280`."""
    height, _, width = text.partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    main()

"""Count memory and traffic of processes that share the tokens of a clip.

    python benchmarks/shared_videos.py [--models cogvideox_5b] [--processes 1 2 4 8] [--layers 4] [--write]

Tensors have no content. For each number of processes the table has the memory of the first process, which has the most
tokens: in sampling (one half of guidance, the whole network on the device) and in training an adapter on cached
latents, with activations recomputed; and the bytes that it sends in one call of the network. Speed is not measured.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import counted_with, markdown_table, tell  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.latent_geometry import Bucket  # noqa: E402

CLIPS = {  # by name: a model, frames, height, width
    "cogvideox_5b": [Bucket(49, 480, 720)],
    "cogvideox1.5_5b": [Bucket(81, 768, 1360), Bucket(161, 768, 1360)],
}
SECTION = "Processes that share a video, counted"


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8], metavar="S")
    parser.add_argument("--layers", type=int, help="layers of the networks (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args()
    quiet_libraries()
    rows = [
        row
        for model in options.models
        for clip in CLIPS[model]
        for row in rows_of(model, clip, options.processes, options.layers)
    ]
    header = ["", "processes", "sampling, GiB", "LoRA, GiB", "exchanges a call", "gathers a call", "MB sent a call"]
    text = f"Weights are included, what libraries take is not. {counted_with()}\n\n{markdown_table(header, rows)}"
    tell(SECTION, text, options.write)


def rows_of(model: str, clip: Bucket, sizes: list[int], layers: int | None) -> list[list[str]]:
    """Return a row for each number of processes."""
    from measuring.shared_clips import counted_shares

    from cogvideox_sat.files.sizes import GIB

    rows = []
    for size in sizes:
        counted = counted_shares(model, clip, size, layers)
        figures = [f"{counted.sampling / GIB:.2f}", f"{counted.training / GIB:.2f}"]
        traffic = [str(counted.exchanges), str(counted.gathers), f"{counted.sent / 1e6:.0f}"]
        rows.append([f"{model}, {clip.frames}×{clip.height}×{clip.width}", str(size), *figures, *traffic])
    return rows


if __name__ == "__main__":
    main()

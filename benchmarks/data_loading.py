"""Clips a second of the training data's reader, against decoding every frame in the window and picking the wanted ones.

    python benchmarks/data_loading.py [--source-fps 30] [--fps 8] [--frames 49] [--write]

Both open the same files with the same decoder and number of threads, choose the same frames, and resize and crop them
in the same way; the result is checked to be the same.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.dlpack import from_dlpack

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import alternating_medians, machine, markdown_table, write_results  # noqa: E402
from imageio_ffmpeg import get_ffmpeg_exe  # noqa: E402

import clip_reading  # noqa: E402
from batch_order import Bucket  # noqa: E402
from clip_reading import FrameSampling, probe, read_clip  # noqa: E402
from clip_sources import ClipSource  # noqa: E402
from flag_spellings import EitherSpellingParser  # noqa: E402

SOURCES = {"480x720": (480, 720), "720x1280": (720, 1280), "1080x1920": (1080, 1920)}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(args, name, write_videos(args, Path(folder), name)) for name in args.sources]
    header = ["source", "ours, clips/s", "every frame, clips/s", "faster by"]
    clip = f"{args.frames} frames of {args.height}x{args.width} at {args.fps:g} fps, sources of {args.source_fps:g} fps"
    text = f"{clip}, H.264, {args.clips} clips, one process; {machine(torch.device('cpu'))}"
    text += f"\n\n{markdown_table(header, rows)}"
    print(text)  # noqa: T201
    if args.write:
        write_results("Reading clips", text)


def arguments() -> argparse.Namespace:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="sizes of the files")
    parser.add_argument("--source-fps", type=float, default=30)
    parser.add_argument("--fps", type=float, default=8, help="of the clips")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def write_videos(args: argparse.Namespace, folder: Path, name: str) -> list[ClipSource]:
    """Videos a second longer than the window, in which the camera pans over a picture."""
    height, width = SOURCES[name]
    seconds = (args.frames - 1) / args.fps + 1
    sources = []
    for number in range(args.clips):
        still, path = folder / "still.png", folder / f"{name}-{number}.mp4"
        Image.fromarray(picture(2 * height, 2 * width, seed=number)).save(still)
        pan = f"crop={width}:{height}:'iw/4+iw/5*sin(t)':'ih/4+ih/5*cos(0.7*t)'"
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-loop", "1", "-framerate", str(args.source_fps)]
        command += ["-i", str(still), "-t", str(seconds), "-vf", pan, "-pix_fmt", "yuv420p", str(path)]
        subprocess.run(command, check=True)
        sources.append(ClipSource(str(path), None))
    return sources


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Noise with about the spectrum of photographs, amplitude falling as 1 / frequency: uint8 (height, width, 3)."""
    chance = np.random.RandomState(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    noise = [np.exp(2j * np.pi * chance.random_sample(frequency.shape)) / frequency**1.3 for _ in range(3)]
    light, red, blue = (each / each.std() for each in (np.fft.irfft2(n, s=(height, width)) for n in noise))
    return (128 + 50 * np.stack([light + 0.3 * red, light, light + 0.3 * blue], -1)).clip(0, 255).astype(np.uint8)


def measure(args: argparse.Namespace, name: str, sources: list[ClipSource]) -> list[object]:
    sampling = FrameSampling(args.fps, args.frames)
    bucket = Bucket(args.frames, args.height, args.width)
    if any(sampling.num_frames(probe(source)) != args.frames for source in sources):
        raise SystemExit(f"{args.frames} frames: the model takes 4k + 1")

    def read_all() -> list[torch.Tensor]:
        return [read_clip(source, bucket, sampling, seed) for seed, source in enumerate(sources)]

    def every_frame() -> list[torch.Tensor]:
        sparse, clip_reading._decode = clip_reading._decode, decode_window
        try:
            return read_all()
        finally:
            clip_reading._decode = sparse

    if not all(map(torch.equal, read_all(), every_frame())):
        raise SystemExit("the two give different frames")
    seconds = alternating_medians({"ours": read_all, "every frame": every_frame}, args.repeats)
    rates = [args.clips / each for each in seconds.values()]
    return [name, *rates, f"{rates[0] / rates[1]:.2f}×"]


def decode_window(reader, indices):
    """All frames from the first wanted one to the last, of which the wanted ones are kept."""
    frames = from_dlpack(reader.get_batch(range(indices[0], indices[-1] + 1)).to_dlpack())
    return frames[[index - indices[0] for index in indices]]


if __name__ == "__main__":
    main()

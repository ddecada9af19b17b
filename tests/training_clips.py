"""Small videos with recognizable frames, also compressed and resized, and their datasets."""

import io
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from imageio_ffmpeg import get_ffmpeg_exe
from torch import Tensor

from cogvideox_sat.media.video_output import VideoWriter

BITS = 8


def write_clip(
    path: str | Path, frames: int, fps: float = 8, size: tuple[int, int] = (64, 96), clip_number: int = 0
) -> Path:
    """Write a video whose frames show their number and the clip's; sizes are in pixels.

    See `frame_numbers`.
    """
    height, width = size
    with VideoWriter(path, fps, height, width) as video:
        for number in range(frames):
            upper, lower = (_stripes(n, height // 2, width) for n in (number, clip_number))
            video.write(torch.cat([upper, lower]).expand(1, 3, -1, -1))
    return Path(path)


def write_dataset(
    folder: str | Path,
    clips: int = 8,
    frames: int = 17,
    fps: float = 8,
    sizes: Sequence[tuple[int, int]] = ((64, 96),),
) -> Path:
    """Write `videos/{i}.mp4` and `labels/{i}.txt` in `folder`.

    Clip i shows its number, has the i-th of `sizes` and the caption `clip {i}`.
    """
    labels = Path(folder, "labels")
    labels.mkdir(parents=True)
    for i in range(clips):
        write_clip(Path(folder, "videos", f"{i:03d}.mp4"), frames, fps, sizes[i % len(sizes)], clip_number=i)
        (labels / f"{i:03d}.txt").write_text(f"clip {i}\n")
    return Path(folder)


def frame_numbers(clip: Tensor) -> list[int]:
    """Return the numbers in frames of an uncropped uint8 clip (frames, 3, height, width)."""
    return _read(clip[..., : clip.shape[-2] // 2, :])


def clip_number(clip: Tensor) -> int:
    """Return the number of the clip, if all frames show the same."""
    (number,) = set(_read(clip[..., clip.shape[-2] // 2 :, :]))
    return number


def _stripes(number: int, height: int, width: int) -> Tensor:
    """Return (height, width) in [-1, 1]: the bits of a number as white and black columns."""
    bits = (number >> torch.arange(BITS)) & 1
    columns = torch.arange(width) * BITS // width
    return (2.0 * bits[columns] - 1).expand(height, -1)


def _read(part: Tensor) -> list[int]:
    width = part.shape[-1]
    centres = (2 * torch.arange(BITS) + 1) * width // (2 * BITS)
    brightness = part.float().mean(dim=(1, 2))[:, centres]
    return ((brightness > 127) << torch.arange(BITS)).sum(dim=1).tolist()


def convert(source: str | Path, target: str | Path, *options: str, before: Sequence[str] = ()) -> Path:
    """Convert a video by FFmpeg, with options before the input and after it."""
    command = [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *before, "-i", str(source)]
    subprocess.run([*command, *options, str(target)], check=True)
    return Path(target)


def vary_rate(source: str | Path, target: str | Path) -> Path:
    """Write a video with a variable frame rate.

    The target keeps the first second, and every third of the other frames at its time.
    """
    return convert(source, target, "-vf", "select='lt(t,1)+not(mod(n,3))'", "-fps_mode", "vfr")


def truncate(source: str | Path, target: str | Path, share: float = 0.6) -> Path:
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: int(len(content) * share)])
    return Path(target)


def damage(source: str | Path, target: str | Path) -> Path:
    """Overwrite the middle of a video's frames, keeping its header and length."""
    content = bytearray(Path(source).read_bytes())
    begin = content.index(b"mdat") + 4
    middle = slice(begin + (len(content) - begin) // 4, begin + (len(content) - begin) // 2)
    content[middle] = bytes(i * 7 % 256 for i in range(middle.stop - middle.start))
    Path(target).write_bytes(content)
    return Path(target)


def write_tar(path: str | Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return Path(path)

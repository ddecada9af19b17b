"""Describe the software and the machine that compute a video, for its record."""

import hashlib
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from cogvideox_sat.parallel.devices import processor_name

PACKAGES = (
    *("torch", "numpy", "SwissArmyTransformer", "deepspeed", "transformers", "tokenizers", "sentencepiece"),
    *("safetensors", "einops", "pillow", "imageio-ffmpeg"),
)
OWN = ("cogvideox_sat", "sgm", "vae_modules", "data_video", "diffusion_video", "dit_video_concat")


def device_name(device: torch.device) -> str:
    """Return the kind and name of a device; equal names compute the same values."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({processor_name()})"


def processors() -> int:
    """Return how many processors this process may use.

    The video encoder uses that many threads, which changes its output.
    """
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of everything that computes a video, by name.

    The version of this program is a hash of its modules.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda or torch.version.hip), "cuDNN": str(torch.backends.cudnn.version())}
    with suppress(Exception):  # no ffmpeg is an error only when a video is written
        from imageio_ffmpeg import get_ffmpeg_version

        found["ffmpeg"] = get_ffmpeg_version()
    found["program"] = source_hash()
    return found


def source_files(module: str) -> tuple[Path, list[Path]]:
    """Return the folder of a module, and its files there, sorted.

    Raises:
        ModuleNotFoundError: the module does not exist.
    """
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        return folder, sorted(folder.rglob("*.py"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).parent, [Path(spec.origin)]


def source_hash() -> str:
    """Return a hash of the program's own modules."""
    digest = hashlib.sha256()
    for name in OWN:
        folder, files = source_files(name)
        for file in files:
            digest.update(f"{name}:{file.relative_to(folder)}".encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

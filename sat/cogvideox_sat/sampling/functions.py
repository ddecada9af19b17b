"""Functions of the original's `sample_video.py`, built on this package.

Import them from `sample_video`. PyTorch is imported only when a called function needs it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox_sat.clips.options import RESHAPE_MODES
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_lines import IMAGE_SEPARATOR
from cogvideox_sat.sampling.typed_prompts import typed_lines
from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def read_from_cli() -> Iterator[tuple[str, int]]:
    """Yield each typed prompt with its number, counted from 0.

    The loop ends at an empty line, `q` or the end of the input.
    """
    for number, text in enumerate(typed_lines()):
        yield text, number


def read_from_file(p: str | Path, rank: int = 0, world_size: int = 1) -> Iterator[tuple[str, int]]:
    """Yield every `world_size`-th prompt of a file, starting with number `rank`.

    Each prompt comes with the number of its line, counted from 0. Empty lines count; they are skipped with a warning. A
    prompt with an image has the text `prompt@@image_path`.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a line is malformed.
    """
    for request in read_prompts(p):
        if request.index % world_size == rank:
            image = "" if request.image is None else f"{IMAGE_SEPARATOR}{request.image}"
            yield request.text + image, request.index


def get_unique_embedder_keys_from_conditioner(conditioner: "nn.Module") -> list[str]:
    """Return the batch keys that the embedders read, without duplicates, in their order."""
    keys: dict[str, None] = {}
    for embedder in conditioner.embedders:
        keys |= dict.fromkeys(embedder.input_keys)
    return list(keys)


def get_batch(
    keys: Sequence[str],
    value_dict: Mapping[str, Any],
    N: int | Sequence[int],
    T: int | None = None,
    device: Any = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the batch that a conditioner takes, and its unconditional counterpart.

    Args:
        keys: the keys that embedders read. For `txt`, `value_dict` holds `prompt` and `negative_prompt`; other keys are
            read from `value_dict` as they are.
        N: how often the texts are repeated, or the shape of the nested lists that hold the repeated texts.
        T: number of frames, stored in the batch as `num_video_frames`; None: not stored.
        device: device to which tensors are moved; None: tensors stay where they are.

    Raises:
        UserError: a key has no value.
    """
    import torch

    def value(key: str) -> Any:
        if key not in value_dict:
            raise UserError(
                f"value_dict: the key '{key}' is missing; its keys are: {', '.join(map(str, value_dict)) or 'none'}"
            )
        found = value_dict[key]
        return found.to(device) if device is not None and isinstance(found, torch.Tensor) else found

    shape = [N] if isinstance(N, int) else list(N)
    batch, unconditional = {}, {}
    for key in keys:
        if key == "txt":
            batch[key] = _repeated(value("prompt"), shape)
            unconditional[key] = _repeated(value("negative_prompt"), shape)
        else:
            batch[key] = value(key)
            if isinstance(batch[key], torch.Tensor):
                unconditional[key] = batch[key].clone()
    if T is not None:
        batch["num_video_frames"] = T
    return batch, unconditional


def _repeated(value: Any, shape: Sequence[int]) -> Any:
    """Return nested lists of the given shape, filled with the value."""
    return value if not shape else [_repeated(value, shape[1:]) for _ in range(shape[0])]


def save_video_as_grid_and_mp4(
    video_batch: "Tensor", save_path: str | Path, fps: float = 5, args: Any = None, key: str | None = None
) -> list[Path]:
    """Write each video of a batch to `save_path/000000.mp4`, ...; return the files.

    Args:
        video_batch: (videos, frames, 3, height, width) in [0, 1].
        fps: frames per second.
        args, key: if `args.wandb` is set and a run of Weights & Biases is active, the videos are also logged there as
            `{key}_video_{i}`, at step `args.iteration + 1` if `args` has that attribute.

    Raises:
        UserError: a video cannot be written.
    """
    from cogvideox_sat.media.video_output import VideoWriter

    if video_batch.ndim != 5:
        raise UserError(f"video_batch: got the shape {tuple(video_batch.shape)}; expected (videos, frames, 3, h, w)")
    paths = []
    for number, frames in enumerate(video_batch):
        paths.append(Path(save_path) / f"{number:06d}.mp4")
        with VideoWriter(paths[-1], fps, *frames.shape[2:]) as video:
            video.write(frames.float() * 2 - 1)
    if key is not None and getattr(args, "wandb", False):
        import wandb

        if wandb.run is not None:
            step = getattr(args, "iteration", None)
            shown = {f"{key}_video_{i}": wandb.Video(str(path), format="mp4") for i, path in enumerate(paths)}
            wandb.log(shown, step=None if step is None else step + 1)
    return paths


def resize_for_rectangle_crop(arr: "Tensor", image_size: Sequence[int], reshape_mode: str = "random") -> "Tensor":
    """Return frames scaled to cover `image_size` and cropped to it.

    Args:
        arr: frames (frames, channels, height, width).
        image_size: (height, width) in pixels.
        reshape_mode: position of the crop: `center`, or `random` and `none`, which draw it from NumPy's generator, the
            row first.

    Returns:
        (frames, channels, *image_size), of the dtype of `arr`; (channels, *image_size) if `arr` is one frame.

    Raises:
        UserError: the mode is unknown.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    if reshape_mode not in RESHAPE_MODES:
        raise UserError(f"reshape_mode: got {reshape_mode!r}; expected one of {', '.join(RESHAPE_MODES)}")
    height, width = image_size
    if arr.shape[3] / arr.shape[2] > width / height:
        size = (height, max(int(arr.shape[3] * height / arr.shape[2]), width))
    else:
        size = (max(int(arr.shape[2] * width / arr.shape[3]), height), width)
    pixels = F.interpolate(arr.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    if not arr.dtype.is_floating_point:
        limits = torch.iinfo(arr.dtype)
        pixels = pixels.round().clamp(limits.min, limits.max)
    room = (size[0] - height, size[1] - width)
    if reshape_mode == "center":
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = (int(np.random.randint(0, side + 1)) for side in room)
    return pixels[:, :, top : top + height, left : left + width].to(arr.dtype).squeeze(0)

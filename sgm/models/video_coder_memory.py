"""Estimate the memory of encoding or decoding a clip, without computing anything.

The coder runs on PyTorch's meta device, where tensors have shapes and no content; every tensor that is created and
freed is counted. The estimate thus follows any coder that a configuration describes. The workspace of libraries within
an operation is added (`workspace`) from measurements.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgm.models.video_coder import VideoCoder
from sgm.modules.autoencoding.meta_device import standing_for

# Clips of this length and one more latent step are traced; beyond that, memory is linear in the length.
SHORT, STEP = 17, 4
# On a CPU the measured memory is this share of the counted memory: PyTorch's allocator had peaks of 1.00 to 1.03 of it,
# for 5 to 25 frames and the full size. A CPU's convolutions have hardly any workspace.
ON_CPU = 1.02


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create within the block: `live` and `peak`.

    Tensors in host memory are not counted unless `host` is set, for a model on the meta device or a GPU.

    Args:
        workspaces: count the workspace of 3D convolutions, see `workspace`.
        host: count tensors in host memory too.
    """

    def __init__(self, workspaces: bool, host: bool = False):
        super().__init__()
        self.workspaces, self.host = workspaces, host
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def leave_out(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Exclude storages that existed before from the count."""
        self._seen.update(storages)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (self.host or tensor.device.type != "cpu")
                and tensor.untyped_storage() not in self._seen
            ):
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live + self.during(function, args, result))
        return result

    def during(self, function: Any, args: tuple[Any, ...], result: Any) -> int:
        """Return the workspace of an operation in bytes."""
        if self.workspaces and function is torch.ops.aten.convolution.default:
            return workspace(args[0], args[1], result)
        return 0

    def _freed(self, size: int) -> None:
        self.live -= size


def workspace(x: Tensor, weight: Tensor, result: Tensor) -> int:
    """Return a convolution's workspace in bytes: for a 3D one, copies of input and output.

    With both the full-size encoder took 7.1 feature maps of 49x480x720 in bfloat16, when a padded copy was made before
    each convolution; measured were 7.1 on an H100 (cuDNN, benchmarks/RESULTS.md). On a CPU there is hardly any
    workspace.
    """
    return x.nbytes + result.nbytes if weight.ndim == 5 and max(weight.shape[2:]) > 1 else 0


def peak_bytes(
    vae: VideoCoder,
    task: Literal["encode", "decode"],
    frames: int,
    height: int,
    width: int,
    frames_at_once: int | None = None,
    device_type: str = "cuda",
) -> int:
    """Return the peak memory of encoding or decoding one clip in bytes, without the weights.

    Args:
        vae: on the meta device, in the dtype of the computation, for one process and whole images.
        frames: of the video, as height and width (pixels).
        frames_at_once: see `VideoCoder`; waiting pieces are in host memory, which only counts on a CPU.
        device_type: "cpu" or "cuda".
    """
    dtype = next(vae.parameters()).dtype
    on_cpu = device_type == "cpu"
    extra = ON_CPU if on_cpu else 1.0
    run = _encoding if task == "encode" else _decoding

    def peak(count: int) -> int:
        call = run(vae, count, height, width, dtype)
        with torch.no_grad(), standing_for(device_type), AllocatedBytes(workspaces=not on_cpu) as bytes_:
            bytes_.leave_out(weight.untyped_storage() for weight in vae.parameters())
            call()
        return bytes_.peak

    if frames_at_once is not None:
        vae.use_frames_at_once(frames_at_once, waiting_bytes=2**62 if on_cpu else 0)
    try:
        if task == "decode":  # by chunks, so that only the first chunks depend on the length
            steps = -(-frames // vae.decoder.time_factor)
            return int(peak(min(steps, vae.traced_latents(steps))) * extra)
        clip_bytes = 3 * frames * height * width * dtype.itemsize
        return int(clip_bytes + _of_length(peak, frames, frames_at_once) * extra)
    finally:
        if frames_at_once is not None:
            vae.use_frames_at_once(None)


def _of_length(peak: Callable[[int], int], frames: int, piece: int | None) -> int:
    """Return peak(frames), extrapolated from shorter clips, by whole pieces if there are any."""
    short, step = (SHORT, STEP) if piece is None else (3 * piece - STEP + 1, piece)
    if frames <= short + step:
        return peak(frames)
    of_short = peak(short)
    return of_short + (peak(short + step) - of_short) * (frames - short) // step


def _encoding(vae: VideoCoder, frames: int, height: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    clip = torch.empty((1, 3, frames, height, width), device="meta", dtype=dtype)
    return lambda: vae.encode(clip, unregularized=True)


def _decoding(vae: VideoCoder, steps: int, height: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    channels, factor = vae.decoder.conv_in.conv.in_channels, vae.decoder.space_factor
    latent = torch.empty((1, channels, steps, height // factor, width // factor), device="meta", dtype=dtype)
    return lambda: deque(vae.decode_chunks(latent), maxlen=0)

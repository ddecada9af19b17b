"""The memory that encoding or decoding a clip takes, found by going through the coder without computing anything.

The coder runs on PyTorch's meta device, where tensors have shapes and no content, and every tensor that comes into
being and goes is counted. So the estimate follows whatever coder a configuration describes. What libraries take inside
one operation is added (`workspace`); that part is measured.
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

# Clips of this length and one more latent step are gone through; from there on memory grows linearly with the length.
SHORT, STEP = 17, 4
# On a CPU convolutions take this much of what is counted here (peak of PyTorch's allocator, one AMD EPYC core). In
# float32 most write over what they are given, and need some frames beside it: 2.5 to 2.9 feature maps of the clip,
# of 3.2 to 3.3, for 17 and 9 frames of 96x144 and the full size. In half precision there is hardly any workspace.
ON_CPU = {torch.float32: 0.88}
ON_CPU_OTHERWISE = 1.02


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within the block: `live`, and their `peak`.

    Those in host memory are not counted, where the others are on the meta device or a GPU; unless `host` is set.

    Args:
        workspaces: count what 3D convolutions take while they run, see `workspace`.
        host: count tensors in host memory too.
    """

    def __init__(self, workspaces: bool, host: bool = False):
        super().__init__()
        self.workspaces, self.host = workspaces, host
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def leave_out(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count nothing of what was there before."""
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
        """Return the bytes that an operation takes beside its result while it runs."""
        if self.workspaces and function is torch.ops.aten.convolution.default:
            return workspace(args[0], args[1], result)
        return 0

    def _freed(self, size: int) -> None:
        self.live -= size


def workspace(x: Tensor, weight: Tensor, result: Tensor) -> int:
    """Return the bytes that a convolution takes while it runs: for a 3D one second layouts of input and output.

    With both the full-size encoder took 7.1 feature maps of 49x480x720 in bfloat16, when a padded copy was made before
    each convolution; measured were 7.1 on an H100 (cuDNN, benchmarks/RESULTS.md). On a CPU there is hardly any.
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
    """Return the bytes in use on the device, beside weights, at the peak of encoding or decoding one clip.

    Args:
        vae: on the meta device, in the dtype of the computation, for one process and whole images.
        frames: of the video, as height and width.
        frames_at_once: see `VideoCoder`; everything that waits is taken to be in host memory.
        device_type: "cpu" or "cuda".
    """
    dtype = next(vae.parameters()).dtype
    on_cpu = device_type == "cpu"
    extra = ON_CPU.get(dtype, ON_CPU_OTHERWISE) if on_cpu else 1.0
    run = _encoding if task == "encode" else _decoding

    def peak(count: int) -> int:
        call = run(vae, count, height, width, dtype)
        with torch.no_grad(), AllocatedBytes(workspaces=not on_cpu) as bytes_:
            call()
        return bytes_.peak

    if frames_at_once is not None:
        vae.use_frames_at_once(frames_at_once, waiting_bytes=2**62 if on_cpu else 0)
    try:
        if task == "decode":  # by chunks, so that its length matters for the first one alone
            steps = -(-frames // vae.decoder.time_factor)
            return int(peak(min(steps, 6 + steps % 2)) * extra)
        clip_bytes = 3 * frames * height * width * dtype.itemsize
        return int(clip_bytes + _of_length(peak, frames, frames_at_once) * extra)
    finally:
        if frames_at_once is not None:
            vae.use_frames_at_once(None)


def _of_length(peak: Callable[[int], int], frames: int, piece: int | None) -> int:
    """peak(frames), from shorter clips; of whole pieces, if they are gone through by pieces."""
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

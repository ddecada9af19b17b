"""The memory that encoding a clip takes, found by going through the VAE's encoder without computing anything.

The encoder runs on PyTorch's meta device, where tensors have shapes and no content, and every tensor that comes into
being and goes is counted. So the estimate follows whatever encoder a configuration describes. What libraries take
inside one operation is added (`workspace`); that part is measured.
"""

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.latent_geometry import Bucket
from sgm.models.video_coder import VideoCoder

# Clips of this length and one more latent step are gone through; from there on memory grows linearly with the length.
SHORT, STEP = 17, 4
# In float32 on a CPU convolutions go by Winograd's scheme, piece by piece, and need less than counted here: 4.3 to 4.5
# feature maps of the clip's size, of 5.1 to 5.3, for 9 and 17 frames of 96x144 and 9 of 160x240 (peak of PyTorch's
# allocator, full-size encoder, one AMD EPYC core).
WINOGRAD = 0.85


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within the block: `live`, and their `peak`.

    Args:
        workspaces: count what 3D convolutions take while they run, see `workspace`.
    """

    def __init__(self, workspaces: bool):
        super().__init__()
        self.workspaces = workspaces
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        during = self.live
        if self.workspaces and function is torch.ops.aten.convolution.default:
            during += workspace(args[0], args[1], result)
        self.peak = max(self.peak, during)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def workspace(x: Tensor, weight: Tensor, result: Tensor) -> int:
    """Return the bytes that a convolution takes while it runs: for a 3D one a second layout of input and output.

    In bfloat16 the full-size encoder then takes 7.1 feature maps of 49x480x720; measured are 7.1 on an H100 (cuDNN,
    benchmarks/RESULTS.md), and 6.3 to 6.5 of small clips on a CPU (oneDNN).
    """
    return x.nbytes + result.nbytes if weight.ndim == 5 and max(weight.shape[2:]) > 1 else 0


def encoding_peak(
    first_stage_config: Mapping[str, Any],
    bucket: Bucket,
    dtype: torch.dtype,
    device_type: str = "cuda",
    tile_size: int | None = None,
    processes: int = 1,
) -> int:
    """Return the bytes in use, beside weights, at the peak of encoding one clip.

    Args:
        first_stage_config: of the VAE.
        bucket: the clip's frames, height and width.
        dtype: of the computation.
        device_type: "cpu" or "cuda".
        tile_size: the side of the VAE's tiles in pixels; None: whole frames.
        processes: that share the frames of a clip.
    """
    frames = -(-(bucket.frames - 1) // processes) + 1 if processes > 1 else bucket.frames
    plain = device_type == "cpu" and dtype == torch.float32
    clip_bytes = 3 * bucket.frames * bucket.height * bucket.width * dtype.itemsize
    side = tile_size or max(bucket.height, bucket.width)
    tile = Bucket(frames, min(side, bucket.height), min(side, bucket.width))
    vae = meta_encoder(first_stage_config, dtype)

    def peak(count: int) -> int:
        clip = torch.empty((1, 3, count, tile.height, tile.width), device="meta", dtype=dtype)
        with torch.no_grad(), AllocatedBytes(workspaces=not plain) as bytes_:
            vae.encode(clip, unregularized=True)
        return bytes_.peak

    if frames <= SHORT + STEP:
        encoder = peak(frames)
    else:
        short = peak(SHORT)
        encoder = short + (peak(SHORT + STEP) - short) * (frames - SHORT) // STEP
    return int(clip_bytes + encoder * (WINOGRAD if plain else 1.0))


def meta_encoder(first_stage_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the VAE of a configuration without content, for one process and whole frames."""
    config = copy.deepcopy(dict(first_stage_config))
    config["params"] = {
        name: value for name, value in config["params"].items() if name not in ("ckpt_path", "ignore_keys")
    }
    config["params"]["cp_size"] = 1
    vae = instantiate_on_meta(config).to(dtype)
    if isinstance(vae, VideoCoder):
        vae.use_tiles(None)
    return vae

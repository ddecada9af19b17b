"""Find the GPU kernels for tensors, without importing Triton on a CPU."""

from types import ModuleType

from torch import Tensor


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return `gpu_kernels` if they support these tensors, or None.

    Triton takes a while to import, and is not needed on a CPU.
    """
    if tensors[0].device.type != "cuda":
        return None
    from vae_modules.passes import gpu_kernels

    return gpu_kernels if gpu_kernels.serve(*tensors) else None

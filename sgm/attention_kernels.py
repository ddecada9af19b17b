"""The functions that compute attention, by name, and the tensors that each supports.

Networks look up a kernel by its name and call it. Each kernel names another one for tensors that it does not support.
`register` adds a kernel, for example one from a library.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgm.errors import UserError


@dataclass(frozen=True)
class AttentionKernel:
    """A function that computes attention, the tensors it supports, and the kernel for others.

    Attributes:
        name: the name in `kernel_named` and in configurations.
        compute: returns the result of `attend`, or None for tensors that the kernel turns out not to support. Called as
            `compute(q, k, v)`, with those keywords of `attend` that `takes` names.
        takes: keywords of `compute`. Without "mask" or "dropout_p" the kernel does not support a mask or dropout;
            `backend` selects one of PyTorch's kernels, and other kernels ignore it.
        devices: supported types of device; None: all.
        dtypes: supported dtypes of the values; None: all.
        most_weights: largest number of attention weights (b * heads * n * m) to keep in memory; None: any number.
        package: a package that must be installed.
        otherwise: the kernel for everything that this one does not support.
        in_configurations: whether configurations may name the kernel (`attn_mode`, `attn_type`).
    """

    name: str
    compute: Callable[..., Tensor | None]
    takes: tuple[str, ...] = ()
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    most_weights: int | None = None
    package: str | None = None
    otherwise: "AttentionKernel | None" = None
    in_configurations: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        backend: SDPBackend | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Return the result of `attend`, by this kernel if it supports these tensors.

        Raises:
            UserError: neither this kernel nor another one supports them.
        """
        out = None
        if self.supports(q, k, v, mask, dropout_p):
            options = {"mask": mask, "backend": backend, "dropout_p": dropout_p}
            out = self.compute(q, k, v, **{name: options[name] for name in self.takes})
        if out is not None:
            return out
        if self.otherwise is None:
            raise UserError(
                f"attention '{self.name}' does not support {v.dtype} tensors {tuple(q.shape)} on {q.device.type}"
                f"{', with a mask' if mask is not None else ''}{', with dropout' if dropout_p else ''}; "
                f"choose '{SOFTMAX.name}'"
            )
        return self.otherwise(q, k, v, mask, backend, dropout_p)

    def supports(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> bool:
        """Return whether the kernel may be tried on these tensors."""
        b, heads, n, _ = q.shape
        return (
            (mask is None or "mask" in self.takes)
            and (dropout_p == 0 or "dropout_p" in self.takes)
            and (self.devices is None or q.device.type in self.devices)
            # The dtype of v, since under autocast a norm leaves q and k in float32.
            and (self.dtypes is None or v.dtype in self.dtypes)
            and (self.most_weights is None or b * heads * n * k.shape[2] <= self.most_weights)
            and (self.package is None or installed(self.package))
        )


KERNELS: dict[str, AttentionKernel] = {}
ATTENTION: dict[str, AttentionKernel] = {}
"""The kernels of `KERNELS` that configurations may name."""


def register(kernel: AttentionKernel) -> AttentionKernel:
    """Add a kernel to the table, and return it.

    Raises:
        ValueError: another kernel has the same name.
    """
    if KERNELS.setdefault(kernel.name, kernel) is not kernel:
        raise ValueError(f"an attention kernel '{kernel.name}' is registered already")
    if kernel.in_configurations:
        ATTENTION[kernel.name] = kernel
    return kernel


def kernel_named(name: str) -> AttentionKernel:
    """Return the kernel that a configuration names by `attn_mode` or `attn_type`.

    Raises:
        UserError: no kernel has that name.
    """
    if not isinstance(name, str) or name not in ATTENTION:
        raise UserError(f"attention '{name}' is unknown; use {' or '.join(map(repr, ATTENTION))}")
    return ATTENTION[name]


@cache
def installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


# ---------------------------------------------------------------- PyTorch's own


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    backend: SDPBackend | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, for q (b, heads, n, d) and k, v (b, heads, m, d).

    Args:
        mask: True where a query may attend.
        backend: the PyTorch kernel to use; None: PyTorch chooses.
        dropout_p: the share of the weights that become zero.

    Raises:
        UserError: the kernel cannot compute these tensors.
    """
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    except RuntimeError as error:
        if "kernel" not in str(error) and "backend" not in str(error):
            raise
        raise UserError(
            f"backend: {backend.name} cannot compute attention of {q.dtype} tensors on {q.device.type} "
            f"({len(q)} x {q.shape[1]} heads of {q.shape[3]}{', with a mask' if mask is not None else ''}); "
            "use MATH, or leave the backend out"
        ) from error


def backend_named(backend: SDPBackend | str | None) -> SDPBackend | None:
    """Return the PyTorch kernel for a member of `SDPBackend`, or for its name in any case.

    Raises:
        UserError: the kernel is unknown.
    """
    if backend is None or isinstance(backend, SDPBackend):
        return backend
    names = [name for name in SDPBackend.__members__ if name not in ("ERROR", "OVERRIDEABLE")]
    if not isinstance(backend, str) or backend.upper() not in names:
        raise UserError(f"backend: {backend!r} is not a kernel of PyTorch; use one of {', '.join(names)}")
    return SDPBackend.__members__[backend.upper()]


SOFTMAX = register(AttentionKernel("softmax", attend, takes=("mask", "backend", "dropout_p")))


# ---------------------------------------------------------------- xformers


def attend_with_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the result of `attend`, by xformers, whose layout is (b, n, heads, d)."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    try:
        return attend_with_xformers(q, k, v)
    except NotImplementedError:  # none of its kernels takes this head size, dtype or device
        return None


attend_memory_efficiently = register(
    AttentionKernel(
        "softmax-xformers", _by_xformers, devices=frozenset({"cuda"}), package="xformers", otherwise=SOFTMAX
    )
)


# ---------------------------------------------------------------- written out


def written_out_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q, k, v (b, heads, n, d), softmax in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


# For training: PyTorch's CPU kernel is slower in bfloat16 than in float32. If the attention weights take little memory
# (2^25 weights take 64 MiB in bfloat16), two matrix products and a softmax take half its time.
WRITTEN_OUT = register(
    AttentionKernel(
        "written-out",
        written_out_attention,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.bfloat16}),
        most_weights=2**25,
        otherwise=SOFTMAX,
        in_configurations=False,
    )
)

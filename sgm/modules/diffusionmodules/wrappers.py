"""The wrapper of a network for a denoiser: it makes arguments of the conditioning."""

from typing import Any

import torch
from torch import Tensor, nn

from sgm.compilation import check_compiler, compile_network, compiler_errors, go_on_without_compiler

OPENAIUNETWRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
"""The default of `network_wrapper` in a configuration."""


class OpenAIWrapper(nn.Module):
    """Calls a network with the conditioning as its arguments.

    Args:
        diffusion_model: the network; the name of the attribute is part of every checkpoint key.
        compile_model: run the network through torch.compile, see `compile_network`. State-dict names stay the same.
        dtype: dtype of the network's computation; None: that of its parameters at the time of the call.

    Raises:
        UserError: the network is to be compiled for a CPU, and a C++ compiler does not exist.
    """

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.dtype = dtype
        if compile_model:
            check_compiler(next(self.parameters(), torch.empty(0)).device)
            compile_network(self.diffusion_model)

    def forward(self, x: Tensor, t: Tensor, c: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Return the network's output: float32, shaped like `x` except for the channels.

        Args:
            x: latents (batch, time, channel, height, width), or images (batch, channel, height, width).
            t: (batch,) timesteps or noise levels, in any dtype.
            c: "crossattn" (batch, tokens, features) becomes `context`, "vector" (batch, features) becomes `y`, and
                "concat", shaped like `x` except for the channels, is appended to the channels of `x`.
            kwargs: passed to the network (`idx`, `ofs`, `scale_emb`, ...).
        """
        dtype = self.dtype or next(self.diffusion_model.parameters()).dtype
        if "concat" in c:
            x = torch.cat([x.to(dtype), c["concat"].to(dtype)], dim=x.ndim - 3)
        context, vector = (c[kind].to(dtype) if kind in c else None for kind in ("crossattn", "vector"))
        return self._run(x.to(dtype), timesteps=t, context=context, y=vector, **kwargs).float()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the network; if it is compiled as a whole and that fails, call it uncompiled.

        Later calls then run without the compiler too.
        """
        network = self.diffusion_model
        if network._compiled_call_impl is None:
            return network(*args, **kwargs)
        try:
            return network(*args, **kwargs)
        except compiler_errors() as error:
            network._compiled_call_impl = None
            go_on_without_compiler(network, error)
            return network(*args, **kwargs)

"""The measured models: their configurations, and networks with random weights."""

from pathlib import Path
from typing import Any

import torch
from device_parts.floating_point import Work
from device_parts.recording import Recorder
from device_parts.units import CONFIGURATIONS
from torch import Tensor, nn

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.latent_geometry import SPACE_FACTOR, patch_sizes
from cogvideox_sat.network.attention_choice import AUTO, AttentionChoice, choose_attention
from cogvideox_sat.weights.loading import initialise_missing

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOY = "tiny/cogvideox_tiny"
TOY_LAYERS = 1
GUIDANCE = 2  # clips of a batch: one step with classifier-free guidance


def config_file(model: str, suffix: str = "") -> Path:
    """Return the configuration of one of `CONFIGURATIONS`, or of "toy".

    Args:
        suffix: "_lora" for the twin with LoRA.
    """
    return CONFIGS / f"{CONFIGURATIONS.get(model, TOY)}{suffix}.yaml"


class Model:
    """A model whose network is measured alone.

    Attributes:
        params: parameters of its network.
        clip: latent frames, height and width of its usual clip.
        work: the operations of one step.
    """

    def __init__(self, model: str, layers: int | None = None):
        config = load_configs([config_file(model)])
        self.config: dict[str, Any] = config["model"]
        self.params: dict[str, Any] = self.config["network_config"]["params"]
        if layers or model == "toy":
            self.params["num_layers"] = layers or TOY_LAYERS
        self.params["transformer_args"]["checkpoint_activations"] = False
        height, width = config["args"]["sampling_image_size"]
        self.patch = patch_sizes(self.params["patch_size"])
        self.clip = (config["args"]["sampling_num_frames"], height // SPACE_FACTOR, width // SPACE_FACTOR)
        self.grid = tuple(size // side for size, side in zip(self.clip, self.patch, strict=True))
        t, h, w = self.grid
        modules = self.params["modules"]
        self.text_length = modules["pos_embed_config"]["params"]["text_length"]
        self.text_width = modules["patch_embed_config"]["params"]["text_hidden_size"]
        self.work = Work(
            self.params["num_layers"], self.params["hidden_size"], self.text_length + t * h * w, batch=GUIDANCE
        )

    def network(self, recorder: Recorder) -> nn.Module:
        """Return our network, with random weights that are not zero."""
        torch.manual_seed(0)
        network = instantiate_on_meta(self.config["network_config"]).to(recorder.dtype)
        network.use_attention(self.attention(recorder))
        return randomised(network, recorder.device).eval()

    def attention(self, recorder: Recorder, gradients: bool = False) -> AttentionChoice:
        """Return the kernel of `--attention auto`."""
        head_dim = self.params["hidden_size"] // self.params["num_attention_heads"]
        return choose_attention(AUTO, recorder.device, recorder.dtype, head_dim, gradients)

    def inputs(self, recorder: Recorder) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents (b, t, c, h, w), timesteps (b,) and text states (b, l, features)."""
        t, h, w = self.clip
        placement = {"device": recorder.device, "dtype": recorder.dtype}
        latents = torch.randn(GUIDANCE, t, self.params["in_channels"], h, w, **placement)
        text = torch.randn(GUIDANCE, self.text_length, self.text_width, **placement)
        return latents, torch.full((GUIDANCE,), 500, device=recorder.device), text


def compiler_off(recorder: Recorder) -> None:
    """Run compiled functions of a toy without a compiler from now on.

    The C++ compiler takes a minute for each.
    """
    if recorder.toy:
        torch.compiler.set_stance("force_eager")
        recorder.note("without a compiler: at the toy size only the layer is compiled")


@torch.no_grad()
def randomised(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module from the meta device with random weights on `device`.

    Frozen tables keep their values. Matrices and kernels are N(0, 1/fan_in), which keeps the scale of activations
    between layers; zeros would multiply faster than weights. Norms are the identity, biases zero.
    """
    initialise_missing(module, device, {})
    module.to(device)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module

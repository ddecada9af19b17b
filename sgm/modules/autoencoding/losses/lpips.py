"""Perceptual losses: LPIPS of two images, and a loss on latents and their images."""

import re
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.util import instantiate_from_config
from sgm.weights import assign_weights, module_weights, read_state_dict

BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}
"""The networks that LPIPS was calibrated for, with their names in torchvision."""
SMALLEST_SIDES = {"vgg": 16, "alex": 31, "squeeze": 17}
"""The smallest height and width, in pixels, for which the poolings leave a pixel."""


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al. 2018, arXiv:1801.03924) of two batches of images.

    Images (n, 3, h, w) in [-1, 1] -> distances (n, 1, 1, 1). The network and the weights of its heads are those of
    torchmetrics; the backbone's weights are torchvision's, trained on ImageNet. The network is always frozen, in
    evaluation mode and in float32. `parameters()` and the state dict do not contain the network, and so neither do
    optimizers, averages and checkpoints.

    Args:
        net: "vgg", "alex" or "squeeze".
        weights: a file of the backbone's weights from torchvision, such as vgg16-397923af.pth. None: the file in the
            cache of torch.hub, downloaded on first use.

    Raises:
        UserError: `net` is unknown; weights cannot be read or downloaded, or do not fit; images are too small.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None):
        super().__init__()
        if net not in BACKBONES:
            raise UserError(f"LPIPS: network '{net}' is unknown; use one of {', '.join(BACKBONES)}")
        self.net = net
        network = _load_network(net, _downloaded_backbone(net) if weights is None else Path(weights))
        object.__setattr__(self, "network", network)  # not as a submodule, which would be saved and trained

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each image of `x` from that of `y`: float32 (n, 1, 1, 1).

        Raises:
            UserError: the images are too small.
        """
        if min(x.shape[-2:]) < SMALLEST_SIDES[self.net]:
            side, (height, width) = SMALLEST_SIDES[self.net], x.shape[-2:]
            raise UserError(
                f"LPIPS with {self.net} needs images of at least {side}x{side} pixels, got {height}x{width}"
            )
        with torch.autocast(x.device.type, enabled=False):
            return self.network(x.float(), y.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LPIPS":
        # The network follows to other devices, but not to other dtypes.
        device = next(self.network.parameters()).device
        self.network.to(fn(torch.empty(0, device=device)).device)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load nothing: entries of LPIPS in the checkpoint of another framework are ignored."""


def _load_network(net: str, backbone: Path) -> nn.Module:
    from torchmetrics.functional.image import lpips

    # On the meta device, since torchvision's models would draw over 100 million random numbers first.
    with torch.device("meta"):
        network = lpips._NoTrainLpips(pretrained=False, net=net, pnet_rand=True)
    network.scaling_layer = lpips.ScalingLayer().eval()  # constants, no weights

    heads = Path(lpips.__file__).parent / "lpips_models" / f"{net}.pth"
    assign_weights(network, read_state_dict(heads), what=str(heads), allow_missing=["net."], device="cpu")

    weights = module_weights(read_state_dict(backbone), what=str(backbone))
    what = f"{backbone}, as torchvision's {BACKBONES[net]},"
    assign_weights(_Backbone(network.net), weights, what=what, allow_unexpected=["classifier."], device="cpu")
    return network


class _Backbone(nn.Module):
    """The layers of torchmetrics' backbone by torchvision's names, which keep their numbers."""

    def __init__(self, slices: nn.Module):
        super().__init__()
        self.features = nn.Module()
        for name, layer in slices.named_modules():
            if match := re.fullmatch(r"slice(?:\d+|s\.\d+)\.(\d+)", name):
                self.features.add_module(match[1], layer)


def _downloaded_backbone(net: str) -> Path:
    """Return the file of torchvision's weights in torch.hub's cache; download it if missing."""
    import torchvision

    url = torchvision.models.get_model_weights(BACKBONES[net]).DEFAULT.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.exists():
        return path
    checksum = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum and checksum[1], progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # no network or space; a broken or another file
        raise UserError(
            f"LPIPS: cannot download the weights of {BACKBONES[net]} ({error}); "
            f"download {url} and set lpips_weights to the file, or put it at {path}"
        ) from error
    return path


class LatentLPIPS(nn.Module):
    """A loss on latents and on the images that a frozen decoder makes of them.

    A call returns (loss, log).

    loss = latent_weight * |z - z'|^2 + perceptual_weight * LPIPS(D(z), D(z'))
           + perceptual_weight_on_inputs * LPIPS(x, D(z'))

    with the latents z (batch, channel, h, w), their predictions z', the images x (batch, 3, H, W) in [-1, 1] that z
    encodes, and means over everything. The log holds "{split}/latent_l2_loss" and, for weights that are not zero,
    "{split}/perceptual_loss" and "{split}/perceptual_loss_on_inputs".

    Args:
        decoder_config: an autoencoder with its weights; only its `decode` is used.
        scale_input_to_tgt_size, scale_tgt_to_input_size: resize x to the size of D(z'), or D(z') to that of x.
        lpips_weights: see `LPIPS`.
    """

    def __init__(
        self,
        decoder_config: Mapping[str, Any],
        perceptual_weight: float = 1.0,
        latent_weight: float = 1.0,
        scale_input_to_tgt_size: bool = False,
        scale_tgt_to_input_size: bool = False,
        perceptual_weight_on_inputs: float = 0.0,
        lpips_weights: str | Path | None = None,
    ):
        super().__init__()
        if scale_input_to_tgt_size and scale_tgt_to_input_size:
            raise UserError("LatentLPIPS: scale_input_to_tgt_size and scale_tgt_to_input_size are both on; choose one")
        self.decoder = instantiate_from_config(decoder_config)
        if hasattr(self.decoder, "encoder"):
            del self.decoder.encoder
        self.decoder.eval().requires_grad_(False)
        if perceptual_weight or perceptual_weight_on_inputs:
            self.perceptual_loss = LPIPS(weights=lpips_weights)
        self.perceptual_weight = perceptual_weight
        self.perceptual_weight_on_inputs = perceptual_weight_on_inputs
        self.latent_weight = latent_weight
        self.scale_input_to_tgt_size = scale_input_to_tgt_size
        self.scale_tgt_to_input_size = scale_tgt_to_input_size

    def train(self, mode: bool = True) -> "LatentLPIPS":
        super().train(mode)
        self.decoder.eval()
        return self

    def forward(
        self, latent_inputs: Tensor, latent_predictions: Tensor, image_inputs: Tensor, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and its parts by name.

        Args:
            latent_inputs, latent_predictions, image_inputs: z, z' and x above.
            split: the beginning of the names.
        """
        latent_loss = F.mse_loss(latent_predictions.float(), latent_inputs.float())
        loss = self.latent_weight * latent_loss
        log = {f"{split}/latent_l2_loss": latent_loss.detach()}
        if not self.perceptual_weight and not self.perceptual_weight_on_inputs:
            return loss, log

        predictions = self.decoder.decode(latent_predictions)
        if self.perceptual_weight:
            with torch.no_grad():
                targets = self.decoder.decode(latent_inputs)
            perceptual_loss = self.perceptual_loss(targets, predictions).mean()
            loss = loss + self.perceptual_weight * perceptual_loss
            log[f"{split}/perceptual_loss"] = perceptual_loss.detach()
        if self.perceptual_weight_on_inputs:
            if self.scale_input_to_tgt_size:
                image_inputs = resize(image_inputs, predictions.shape[-2:])
            elif self.scale_tgt_to_input_size:
                predictions = resize(predictions, image_inputs.shape[-2:])
            perceptual_loss = self.perceptual_loss(image_inputs, predictions).mean()
            loss = loss + self.perceptual_weight_on_inputs * perceptual_loss
            log[f"{split}/perceptual_loss_on_inputs"] = perceptual_loss.detach()
        return loss, log


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (n, channel, h, w) in another size, by antialiased bicubic interpolation."""
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bicubic", antialias=True)

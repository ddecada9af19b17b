"""The adversary of an autoencoder: its logits, its losses and its weight."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sgm.context_parallel import all_reduce_sum
from sgm.errors import UserError


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator, a scalar: the mean of both halves.

    Args:
        logits_real, logits_fake: of any shape; high for what looks real.
    """
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the logistic loss of a discriminator, a scalar: the mean of both halves.

    The arguments are those of `hinge_d_loss`.
    """
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return `weight` from the step `threshold` on, and `value` before."""
    return weight if global_step >= threshold else value


def takes_clips(discriminator: nn.Module) -> bool:
    """Return whether a discriminator judges whole clips (its `dims` is 3), not frames."""
    return getattr(discriminator, "dims", 2) == 3


def logits_of(discriminator: nn.Module, x: Tensor, frozen: bool = False) -> Tensor:
    """Return a discriminator's logits, float32.

    Args:
        x: images (batch, channel, h, w), or clips (batch, channel, time, h, w).
        frozen: without gradients of the discriminator's parameters.

    Returns:
        (batch, 1, ., .), or for clips (batch, 1, ., ., .) from a discriminator that takes clips and (batch * time, 1,
        ., .) from another.
    """
    if not takes_clips(discriminator):
        x = to_images(x)
    parameters = dict(discriminator.named_parameters())
    x = x.to(next(iter(parameters.values())).dtype)
    if not frozen:
        return discriminator(x).float()
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    return torch.func.functional_call(discriminator, parameters, (x,)).float()


def adaptive_weight(nll: Tensor, g: Tensor, last_layer: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """Return the weight with which the gradients of two scalar losses have equal norms.

    Esser et al. 2021, arXiv:2012.09841, equation 7: |dnll/dw| / (|dg/dw| + 1e-4), at most 1e4.

    Args:
        nll, g: losses of the reconstruction and of the adversary.
        last_layer: w, the weight of the decoder's last layer; None: the result is 1.
        group: the ranks that share the clip.

    Raises:
        UserError: the last layer is not trained.
    """
    if last_layer is None:
        return torch.ones_like(nll)
    if not last_layer.requires_grad:
        raise UserError(
            "trainable_ae_params: the weight of the discriminator needs gradients of the decoder's last layer, "
            "which is not trained; train that layer or set disc_factor: 0"
        )
    gradients = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (nll, g)]
    # Each rank of a group has the gradient of its own frames.
    whole = all_reduce_sum(torch.stack(gradients).float(), group)
    of_nll, of_g = whole.flatten(1).norm(dim=1)
    return (of_nll / (of_g + 1e-4)).clamp(0.0, 1e4)


def pictures_of_logits(both: list[Tensor], like: Tensor) -> list[Tensor]:
    """Return pictures of logits, in [-1, 1]: green where real, magenta where fake.

    They are shaped like `like`. Stronger colours are larger logits, on one scale for all pictures; white is zero.

    Args:
        both: results of `logits_of` of inputs and of reconstructions.
        like: the images or clips that were judged.
    """
    tiny = torch.finfo(torch.float32).tiny
    largest = torch.stack([logits.abs().amax() for logits in both]).amax().clamp_min(tiny)
    return [_heat_map(logits / largest, like) for logits in both]


def _heat_map(values: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 5 and values.ndim == 4:  # frames of clips were judged as images
        values = rearrange(values, "(b t) c h w -> b c t h w", b=len(like))
    values = F.interpolate(values, like.shape[2:], mode="nearest")
    magenta, green = values.clamp(min=0), (-values).clamp(min=0)  # subtracted from white
    return 1 - 2 * torch.cat([magenta, green, magenta], dim=1)


def to_images(x: Tensor) -> Tensor:
    """Return the frames of clips (b, c, t, h, w) as images (b * t, c, h, w), or images."""
    return x if x.ndim == 4 else rearrange(x, "b c t h w -> (b t) c h w")

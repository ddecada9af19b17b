"""Training losses: noise a batch, denoise it, and return the weighted error per sample."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm import randomness
from sgm.context_parallel import broadcast
from sgm.errors import UserError, shown
from sgm.modules.diffusionmodules.util import append_dims, reject_options
from sgm.util import instantiate_from_config


class DiffusionLoss(nn.Module):
    """Base class of the losses: conditioning, noise and the error.

    Args:
        sigma_sampler_config: distribution of the trained noise levels, see `sigma_sampling`.
        type: "l2" or "l1".
        offset_noise_level: share of noise that is constant over each channel of a sample (offset noise).
        batch2model_keys: entries of the batch that are passed to the network by name.

    Attributes:
        model_parallel_group: processes that compute one sample together; all use the noise of the first one.

    Raises:
        UserError: `type` is another word.
    """

    model_parallel_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        sigma_sampler_config: Mapping[str, Any],
        type: str = "l2",
        offset_noise_level: float = 0.0,
        batch2model_keys: str | Iterable[str] | None = None,
    ):
        super().__init__()
        if type not in ("l2", "l1"):
            raise UserError(f"loss_fn_config: type: got '{type}'; use 'l2' or 'l1'")
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.type = type
        self.offset_noise_level = offset_noise_level
        keys = [batch2model_keys] if isinstance(batch2model_keys, str) else batch2model_keys
        self.batch2model_keys = tuple(keys or ())

    def set_parallel_groups(
        self, model_parallel: dist.ProcessGroup | None = None, data_parallel: dist.ProcessGroup | None = None
    ) -> None:
        """Set the processes that share a sample, and those that train on different samples."""
        self.model_parallel_group = model_parallel
        self.sigma_sampler.data_parallel_group = data_parallel

    def condition(
        self, conditioner: Callable[[Mapping[str, Any]], dict[str, Tensor]], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the conditioning of a batch, and the network's other inputs by name.

        `batch["concat_images"]`, if present, becomes the conditioning "concat".
        """
        cond = dict(conditioner(batch))
        if "concat_images" in batch:
            cond["concat"] = batch["concat_images"]
        return cond, {key: batch[key] for key in self.batch2model_keys if key in batch}

    def share(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the first process of the model-parallel group."""
        return broadcast(tensor.contiguous(), self.model_parallel_group)

    def noise_like(self, clean: Tensor) -> Tensor:
        """Return noise of the shape (batch, ..., channel, height, width) of `clean`."""
        noise = randomness.normal(clean.shape, purpose="noise", device=clean.device)
        if self.offset_noise_level > 0:
            per_channel = (*clean.shape[:1], *[1] * (clean.ndim - 4), clean.shape[-3], 1, 1)
            offset = randomness.normal(per_channel, purpose="offset noise", device=clean.device)
            noise = noise + self.offset_noise_level * offset
        return self.share(noise)

    def error(self, denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
        """Return the mean error of each sample, times its weight: (batch,)."""
        difference = denoised - clean
        error = difference.square() if self.type == "l2" else difference.abs()
        return weight * error.flatten(1).mean(1)


class StandardDiffusionLoss(DiffusionLoss):
    """w(σ)·|D(x0 + σ·ε; σ) − x0|², averaged (Karras et al. 2022, equation 8)."""

    def forward(
        self,
        network: nn.Module,
        denoiser: nn.Module,
        conditioner: Callable[[Mapping[str, Any]], dict[str, Tensor]],
        input: Tensor,
        batch: Mapping[str, Any],
    ) -> Tensor:
        """Return the loss of each sample: float32 (batch,).

        Arguments are those of `VideoDiffusionLoss.forward`.
        """
        clean = input.float()
        cond, model_inputs = self.condition(conditioner, batch)
        sigma = self.share(self.sigma_sampler(len(clean)).to(clean.device))
        noised = clean + append_dims(sigma, clean.ndim) * self.noise_like(clean)
        denoised = denoiser(network, noised, sigma, cond, **model_inputs)
        return self.error(denoised, clean, denoiser.w(sigma))


class VideoDiffusionLoss(DiffusionLoss):
    """The squared error of the velocity v: |D(a·x0 + s·ε) − x0|²/s², averaged.

    Here a = sqrt(ᾱ) and s = sqrt(1 − a²).

    Args:
        min_snr_value: an upper limit for the weight 1/s² = SNR + 1 (Hang et al. 2023, "Min-SNR weighting").
        fixed_frames: number of latent frames at the start that stay clean and do not count in the loss, so that the
            network learns to continue them; or weights by number, such as {0: 1, 2: 3}, from which each sample draws.
        block_scale, block_size: accepted at their neutral values only.
        kwargs: see `DiffusionLoss`; the sigma sampler must be a `DiscreteSampling`.

    Raises:
        UserError: an unsupported option is set, or `fixed_frames` is something else.
    """

    def __init__(
        self,
        *args: Any,
        min_snr_value: float | None = None,
        fixed_frames: int | Mapping[int, float] = 0,
        block_scale: float | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        reject_options(type(self).__name__, block_scale=block_scale, block_size=block_size)
        self.min_snr_value = min_snr_value
        self.fixed_frames = frame_weights(fixed_frames)

    def forward(
        self,
        network: nn.Module,
        denoiser: nn.Module,
        conditioner: Callable[[Mapping[str, Any]], dict[str, Tensor]],
        input: Tensor,
        batch: Mapping[str, Any],
    ) -> Tensor:
        """Return the loss of each sample: float32 (batch,).

        Random numbers are drawn in this order: the conditioner's dropout, the timesteps, the noise, and the number of
        fixed frames if there are several to choose from.

        Args:
            network: called by the denoiser, see `Denoiser.forward`.
            denoiser: a `Denoiser` with `VideoScaling`.
            conditioner: turns `batch` into the conditioning.
            input: clean latents (batch, time, channel, height, width).
            batch: inputs of the conditioner; `concat_images`, if present, is concatenated to the noised latents.
        """
        clean = input.float()
        cond, model_inputs = self.condition(conditioner, batch)

        levels, idx = self.sigma_sampler(len(clean), return_idx=True)
        alpha = self.sigma_sampler.discretization.to_alpha(levels)
        alpha, idx = self.share(alpha.to(clean.device)), self.share(idx.to(clean.device))
        variance = 1 - alpha**2

        a, s = append_dims(alpha, clean.ndim), append_dims(variance**0.5, clean.ndim)
        noised = a * clean + s * self.noise_like(clean)
        free = self.free_frames(clean)
        if free is not None:
            noised = torch.where(free, noised, clean)
        denoised = denoiser(network, noised, alpha, cond, idx=idx, **model_inputs)

        weight = 1 / variance
        if self.min_snr_value is not None:
            weight = weight.clamp(max=self.min_snr_value)
        if free is not None:
            denoised = torch.where(free, denoised, clean)  # no error, and no gradient
            weight = weight / free.float().flatten(1).mean(1)  # the mean is over the free frames
        return self.error(denoised, clean, weight)

    def free_frames(self, clean: Tensor) -> Tensor | None:
        """Return a mask of the frames that are noised and trained, or None for all frames.

        At least one frame of each clip is noised, even if `fixed_frames` is larger than the clip.

        Args:
            clean: latents (batch, time, ...).

        Returns:
            bool (batch, time, 1, ...).
        """
        numbers, weights = list(self.fixed_frames), list(self.fixed_frames.values())
        if numbers == [0]:
            return None
        choice = torch.zeros(len(clean), dtype=torch.long)
        if len(numbers) > 1:
            choice = randomness.chosen(randomness.uniform(len(clean), purpose="fixed frames"), weights)
        fixed = torch.tensor(numbers)[choice].clamp(max=clean.shape[1] - 1)
        free = torch.arange(clean.shape[1]) >= fixed[:, None]
        return append_dims(self.share(free.to(clean.device)), clean.ndim)


def frame_weights(fixed_frames: Any) -> dict[int, float]:
    """Return the weight of each number of fixed frames.

    Raises:
        UserError: `fixed_frames` is neither a number of frames nor weights of such numbers.
    """
    given = fixed_frames if isinstance(fixed_frames, Mapping) else {fixed_frames: 1.0}
    numbers = all(type(number) is int and number >= 0 for number in given)
    weights = [type(weight) in (int, float) and 0 <= weight < math.inf for weight in given.values()]
    if not (given and numbers and all(weights) and sum(given.values()) > 0):
        raise UserError(
            f"loss_fn_config: fixed_frames: got {shown(fixed_frames)}; expected a number of latent frames, or weights "
            "by number such as {0: 1, 2: 3}"
        )
    return {number: weight for number, weight in given.items() if weight}

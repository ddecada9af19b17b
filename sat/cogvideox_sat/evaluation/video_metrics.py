"""How near reconstructions are to their originals. Clips are (frames, 3, height, width) in [0, 1], of 8-bit pixels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cogvideox_sat.evaluation.inception3d import LEAST_FRAMES, Inception3D, prepare
from sgm.errors import UserError

FRAMES_AT_ONCE = 8  # of a clip, where a measure is the mean over frames: all would need several times its memory

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Images (n, 3, height, width) in [-1, 1], twice -> n distances."""


def as_shown(video: Tensor) -> Tensor:
    """(..., height, width) in [-1, 1] -> [0, 1], rounded to 8 bits and clamped as a viewer sees it."""
    return ((video.float() + 1) * 127.5).round_().clamp_(0, 255).div_(255)


def psnr(reconstruction: Tensor, clip: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the whole clip in dB; infinite where there is no difference."""
    return peak_signal_noise_ratio(reconstruction, clip, data_range=1.0)


def ssim(reconstruction: Tensor, clip: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), the mean over frames; 1 where there is no difference."""

    def of_images(x: Tensor, y: Tensor) -> Tensor:
        return structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")

    return _mean_over_frames(of_images, reconstruction, clip)


def perceptual_distance(network: PerceptualDistance, reconstruction: Tensor, clip: Tensor) -> Tensor:
    """The mean over frames of LPIPS; 0 where there is no difference."""
    return _mean_over_frames(lambda x, y: network(2 * x - 1, 2 * y - 1), reconstruction, clip)


def _mean_over_frames(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.split(FRAMES_AT_ONCE), y.split(FRAMES_AT_ONCE), strict=True)
    return torch.cat([measure(*part).flatten() for part in parts]).mean()


class FrechetVideoDistance:
    """The distance of all reconstructions from all clips by I3D's logits (Unterthiner et al. 2018, arXiv:1812.01717).

    It falls with the number of clips, so only numbers from as many clips of the same length and size compare.
    """

    def __init__(self, network: Inception3D):
        self.network = network
        self.features: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, reconstruction: Tensor, clip: Tensor) -> None:
        """
        Raises:
            UserError: the clip is too short.
        """
        if len(clip) < LEAST_FRAMES:
            raise UserError(f"rFVD: a clip has {len(clip)} frames; the I3D network needs at least {LEAST_FRAMES}")
        self.features.append(tuple(self.network(prepare(video))[0].double().cpu() for video in (reconstruction, clip)))

    def compute(self) -> Tensor:
        """
        Raises:
            UserError: there are fewer than two clips, which have no covariance.
        """
        if len(self.features) < 2:
            raise UserError(f"rFVD: there is {len(self.features)} clip; the distance needs at least 2, or rather 256")
        return frechet_distance(*(torch.stack(side) for side in zip(*self.features, strict=True)))


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Between the normal distributions with the means and covariances of samples `x` (n, d) and `y` (m, d).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), in the dtype of the samples. With centred samples X, C = X^T X, the
    trace of the root is the sum of the singular values of X Y^T (n, m): exact, however few samples there are.
    """
    difference = x.mean(0) - y.mean(0)
    x, y = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (x, y))
    overlap = torch.linalg.svdvals(x @ y.T).sum()
    return difference.square().sum() + x.square().sum() + y.square().sum() - 2 * overlap

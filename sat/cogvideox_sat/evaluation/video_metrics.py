"""Measure how close reconstructions are to their originals.

Clips have the shape (frames, 3, height, width) and are in [0, 1], from 8-bit pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cogvideox_sat.evaluation.inception3d import LEAST_FRAMES, Inception3D, prepare
from sgm.errors import UserError

FRAMES_AT_ONCE = 8  # for measures that are means over frames; all frames would need several times the clip's memory
LEAST_CLIPS = 2  # of a Fréchet distance; one clip has no covariance

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Maps two tensors of images (n, 3, height, width) in [-1, 1] to n distances."""


def as_shown(video: Tensor) -> Tensor:
    """Return a video in [-1, 1] as a viewer sees it: in [0, 1], clamped, rounded to 8 bits."""
    return ((video.float() + 1) * 127.5).round_().clamp_(0, 255).div_(255)


def psnr(reconstruction: Tensor, clip: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of the whole clip in dB; infinite if equal."""
    return peak_signal_noise_ratio(reconstruction, clip, data_range=1.0)


def ssim(reconstruction: Tensor, clip: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004), averaged over frames; 1 if equal."""

    def of_images(x: Tensor, y: Tensor) -> Tensor:
        return structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")

    return _mean_over_frames(of_images, reconstruction, clip)


def perceptual_distance(network: PerceptualDistance, reconstruction: Tensor, clip: Tensor) -> Tensor:
    """Return the mean of LPIPS over the frames; 0 if equal."""
    return _mean_over_frames(lambda x, y: network(2 * x - 1, 2 * y - 1), reconstruction, clip)


def _mean_over_frames(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.split(FRAMES_AT_ONCE), y.split(FRAMES_AT_ONCE), strict=True)
    return torch.cat([measure(*part).flatten() for part in parts]).mean()


class FrechetVideoDistance:
    """Fréchet distance of reconstructions from clips, by I3D's logits.

    Unterthiner et al. 2018, arXiv:1812.01717. The distance falls with the number of clips. Only results from equal
    numbers of clips of the same length and size can be compared.
    """

    def __init__(self, network: Inception3D):
        self.network = network
        self.features: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, reconstruction: Tensor, clip: Tensor) -> None:
        """Add a reconstruction and its clip.

        Raises:
            UserError: the clip is too short.
        """
        if len(clip) < LEAST_FRAMES:
            raise UserError(f"rFVD: a clip has {len(clip)} frames; the I3D network needs at least {LEAST_FRAMES}")
        self.features.append(tuple(self.network(prepare(video))[0].double().cpu() for video in (reconstruction, clip)))

    def compute(self) -> Tensor:
        """Return the distance over all clips that were added.

        Raises:
            UserError: fewer than `LEAST_CLIPS` clips were added.
        """
        if len(self.features) < LEAST_CLIPS:
            raise UserError(
                f"rFVD: got {len(self.features)} clip; at least {LEAST_CLIPS} are needed, and 256 are recommended"
            )
        return frechet_distance(*(torch.stack(side) for side in zip(*self.features, strict=True)))


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the Fréchet distance between normal distributions fitted to `x` and `y`.

    The samples have the shapes (n, d) and (m, d). The distance is |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), in
    the dtype of the samples. With centred samples X, C = X^T X, and the trace of the root is the sum of the singular
    values of X Y^T (n, m), which is exact for any number of samples.
    """
    difference = x.mean(0) - y.mean(0)
    x, y = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (x, y))
    overlap = torch.linalg.svdvals(x @ y.T).sum()
    return difference.square().sum() + x.square().sum() + y.square().sum() - 2 * overlap

"""Give a VAE latents of unit covariance, without changing its reconstructions.

  python tools/whiten_latents.py --base configs/vae_3d.yaml --data data/train --ckpt 3d-vae.pt --output vae.safetensors

The channels of a VAE's latents differ in scale: in those of the tiny VAE, three directions have the colours of things,
and the other thirteen their outlines, with an eighteenth of the variance. A diffusion model, whose loss is a mean
square over channels, then learns the colours and neglects the outlines. This tool measures the covariance C of the
channels on clips, and multiplies W = C^(-1/2) into the encoder's last layer, its inverse into the layers of the decoder
that see the latent. Decoded videos stay the same; a diffusion model of such latents has `scale_factor: 1`.

`--near old.safetensors` also rotates the white latents such that they are as near as possible to those of another VAE,
for example the one from which training continued, so that a diffusion model of its latents has less to learn again.

Log-variances are mapped exactly if all channels of a posterior have the same variance, and approximately otherwise.
Exit codes: 0 the file is written, 2 the arguments or files are wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.input_paths import tell_places  # noqa: E402
from cogvideox_sat.commands.tool_parser import ToolParser, check_output, check_safetensors_name, locate_inputs, run_tool  # noqa: E402
from cogvideox_sat.configuration.files import MergedConfig, load_configs, with_located_paths  # noqa: E402
from cogvideox_sat.configuration.settings import DataSettings  # noqa: E402
from sgm.config_places import section  # noqa: E402
from sgm.errors import UserError  # noqa: E402
from tools.evaluate_vae import clip_sources, find_parts, find_vae  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("whiten_latents")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(whiten, arguments, logger.name)


def build_parser() -> ToolParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--base", nargs="+", required=True, metavar="FILE", help="configuration of the VAE, with a data: section")
    add("--data", nargs="+", required=True, metavar="DATA", help="clips to measure, as for train_video.py")
    add("--ckpt", type=Path, metavar="FILE", help="weights of the VAE (default: from the configuration)")
    add("--near", type=Path, metavar="FILE", help="weights of a VAE of the same configuration with the target latents")
    add("--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    add("--num_clips", type=int, default=500, help="number of clips, spread over the data (default: 500)")
    parser.add_writing_arguments()
    return parser


def whiten(arguments: Sequence[str] | None) -> None:
    options = build_parser().parse_args(arguments)
    check_safetensors_name(options.output)
    if options.num_clips < 1:
        raise UserError(f"--num_clips: got {options.num_clips}; it must be at least 1")
    options.data = clip_sources(options.data)
    locate_inputs(options, "ckpt", "near")
    config = load_configs(options.base, used=("model", "data"))
    with config.sources.naming():
        whiten_with(config, options)


def whiten_with(config: MergedConfig, options: argparse.Namespace) -> None:
    model = with_located_paths(config.get("model") or {}, "model")
    vae_config, data_config = find_parts(model, config, options.ckpt)
    vae_configs = [vae_config, *([find_vae(model, options.near)] if options.near else [])]
    check_output(options.output, options, [Path(each["params"]["ckpt_path"]) for each in vae_configs])
    tell_places()

    import torch

    from cogvideox_sat.evaluation.vae_report import build_vae, encode, readable_samples
    from cogvideox_sat.files.atomic import write_safetensors
    from cogvideox_sat.runs.datasets import make_dataset

    with torch.no_grad(), section("model", model, config.sources):
        vaes = [build_vae(each, torch.device("cpu"), torch.float32) for each in vae_configs]
        settings = DataSettings(data_config, missing_label="ignore")
        dataset = make_dataset(options.data, settings, random_start=False, argument="--data")
        samples = readable_samples(dataset, options.num_clips)
        joint = covariance_of(torch.cat([encode(each, sample["mp4"]) for each in vaes], dim=1) for _, sample in samples)
        if not joint.isfinite().all():
            raise UserError("--ckpt: the latents are not finite; name other weights of the VAE")
        channels = len(joint) // len(vaes)
        covariance = joint[:channels, :channels]
        variances = torch.linalg.eigvalsh(covariance)
        logger.info("variances of the latents' %d directions: %s", len(variances), _in_words(variances))
        if variances[0] <= 1e-6 * variances[-1]:
            raise UserError("--data: the latents do not vary in all directions; measure more clips (--num_clips)")
        matrix = inverse_root(covariance)
        if options.near:
            with_former = joint[channels:, :channels] @ matrix.mT
            rotation = nearest_rotation(with_former)
            matrix = rotation @ matrix
            correlations = (with_former @ rotation.mT).diagonal() / joint.diagonal()[channels:].sqrt()
            logger.info("correlations of the channels with those of %s: %s", options.near, _in_words(correlations))
        map_latents(vaes[0], matrix)
    weights = {name: tensor.contiguous() for name, tensor in vaes[0].state_dict().items()}
    if options.dry_run:
        return
    write_safetensors(options.output, weights)
    logger.info("wrote %s", options.output)


def covariance_of(latents: "Iterable[Tensor]") -> "Tensor":
    """Return the covariance (c, c), float64, of the channels of latents (1, c, t, h, w).

    The covariance is taken over all places of all latents.
    """
    count, total, products = 0, 0.0, 0.0
    for latent in latents:
        places = latent[0].flatten(1).double()
        count += places.shape[1]
        total = total + places.sum(1)
        products = products + places @ places.mT
    mean = total / count
    return products / count - mean[:, None] * mean


def inverse_root(covariance: "Tensor") -> "Tensor":
    """Return C^(-1/2), the symmetric root.

    The root changes the latents least among all maps to unit covariance.
    """
    import torch

    variances, directions = torch.linalg.eigh(covariance)
    return directions / variances.sqrt() @ directions.mT


def nearest_rotation(covariance: "Tensor") -> "Tensor":
    """Return the orthogonal R for which R b is nearest to a in the mean square.

    The orthogonal Procrustes problem (Schönemann 1966): R = U Vᵀ, where U S Vᵀ is the covariance.

    Args:
        covariance: E[a bᵀ] (c, c).
    """
    import torch

    left, _, right = torch.linalg.svd(covariance)
    return left @ right


def map_latents(vae: "nn.Module", matrix: "Tensor") -> None:
    """Multiply the latents of a VAE by `matrix` (c, c), keeping its reconstructions.

    Copies of the first frame before a clip and zeros around a frame commute with a linear map, so that the convolutions
    that see the latent take the whole inverse. The log-variance of channel i becomes the mean of those of all channels
    j, with the weights matrix[i, j]², plus the logarithm of the sum of these weights.
    """
    import torch

    from vae_modules.normalization import SpatialNorm3D

    channels = len(matrix)
    last = vae.encoder.conv_out.conv
    squares = matrix**2
    sums = squares.sum(1, keepdim=True)
    rows = [matrix, squares / sums] if len(last.weight) == 2 * channels else [matrix]
    into = torch.block_diag(*rows)
    last.weight.copy_(torch.einsum("oi,i...->o...", into, last.weight.double()))
    last.bias.copy_(into @ last.bias.double())
    if len(rows) == 2:
        last.bias[channels:] += sums[:, 0].log()

    inverse = torch.linalg.inv(matrix)
    norms = [module for module in vae.decoder.modules() if isinstance(module, SpatialNorm3D)]
    for layer in (vae.decoder.conv_in, *(conv for norm in norms for conv in (norm.conv_y, norm.conv_b))):
        weight = layer.conv.weight
        weight.copy_(torch.einsum("oi...,ij->oj...", weight.double(), inverse))


def _in_words(values: "Tensor") -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())


if __name__ == "__main__":
    sys.exit(main())

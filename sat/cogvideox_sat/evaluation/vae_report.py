"""Reconstruct clips and measure their quality, for `tools/evaluate_vae.py`."""

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.configuration.memory_advice import one_of
from cogvideox_sat.configuration.model_checks import check_autoencoder_sizes
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.evaluation.inception3d import load_inception3d
from cogvideox_sat.evaluation.video_metrics import (
    LEAST_CLIPS,
    FrechetVideoDistance,
    as_shown,
    perceptual_distance,
    psnr,
    ssim,
)
from cogvideox_sat.files.atomic import write_atomically
from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.parallel.devices import choose_device, fast_dtype
from cogvideox_sat.runs.datasets import make_dataset
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.models.video_coder import VideoCoder
from sgm.modules.autoencoding.losses.lpips import LPIPS
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.plain_json import standard_json
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

UNITS = {"PSNR": " dB"}
BOOST = 4  # factor for the differences shown in videos


def run(options: argparse.Namespace, vae_config: Mapping[str, Any], data_config: Mapping[str, Any]) -> str:
    """Evaluate as the command's options say, write the outputs, and return the report.

    Raises:
        UserError: the data, the weights or the device cannot be used, memory is full, or a file cannot be written.
    """
    advice = ["--dtype bfloat16"] if options.dtype == "float32" else []
    advice += ["leave out --whole"] if options.whole else []
    advice += ["tile_size: 256 in the VAE's params", "fewer frames or a smaller size (data.params)"]
    with torch.no_grad(), memory_guard("evaluation", one_of(advice)):
        return evaluate(options, vae_config, data_config)


def evaluate(options: argparse.Namespace, vae_config: Mapping[str, Any], data_config: Mapping[str, Any]) -> str:
    """Evaluate a VAE; see `run`.

    `options.dtype` becomes the dtype that is used, which the report and the numbers name.

    Raises:
        UserError: the data, the weights or the device cannot be used, or a reconstruction is not finite.
    """
    device = choose_device(options.device)
    settings = DataSettings(data_config, missing_label="ignore")
    dataset = make_dataset(options.data, settings, random_start=False, argument="--data")
    dtype = fast_dtype(getattr(torch, options.dtype), device)
    options.dtype = str(dtype).removeprefix("torch.")
    vae = build_vae(vae_config, device, dtype)
    notes: list[str] = []
    lpips = build_lpips(options, device, notes)
    frechet = None
    if options.i3d_weights is None:
        notes.append("rFVD: not computed; give the weights of I3D as --i3d_weights")
    else:
        frechet = FrechetVideoDistance(load_inception3d(options.i3d_weights).to(device))

    clips: list[dict[str, Any]] = []
    videos: list[Path] = []
    for index, sample in readable_samples(dataset, options.num_clips):
        clip = sample["mp4"].to(device)
        video = reconstruct(vae, clip, options.whole)
        original, shown = clip.float() / 255, as_shown(video)
        values = measures(shown, original, lpips)
        if frechet:
            frechet.add(shown, original)
        if math.isnan(values["PSNR"]):
            raise UserError(f"clip {index}: the reconstruction is not finite in {options.dtype}; try another --dtype")
        clips.append({"index": index, "name": name_of(dataset, index), "shape": list(clip.shape), **values})
        if len(videos) < options.num_videos:
            videos.append(options.output / f"{index:05d}.mp4")
            write_side_by_side(videos[-1], original, shown, float(sample["fps"]))

    names = [name for name in ("PSNR", "SSIM", "LPIPS") if name in clips[0]]
    means: dict[str, float] = {name: fmean(clip[name] for clip in clips) for name in names}
    if frechet and len(clips) < LEAST_CLIPS:
        notes.append(f"rFVD: not computed: {len(clips)} clip could be read, and at least {LEAST_CLIPS} are needed")
    elif frechet:
        means["rFVD"] = frechet.compute().item()
    if options.json:
        write_numbers(options.json, means, clips, options, vae_config["params"]["ckpt_path"])
    return report(means, clips, notes, videos)


def measures(reconstruction: Tensor, clip: Tensor, lpips: LPIPS | None) -> dict[str, float]:
    """Return the measures of one clip by name, LPIPS only with its network.

    Args:
        reconstruction, clip: (frames, 3, height, width) in [0, 1].
    """
    values = {"PSNR": psnr(reconstruction, clip), "SSIM": ssim(reconstruction, clip)}
    if lpips:
        values["LPIPS"] = perceptual_distance(lpips, reconstruction, clip)
    return {name: value.item() for name, value in values.items()}


# ---------------------------------------------------------------- parts


def build_vae(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> VideoCoder:
    """Return the VAE with its weights; its latents are means, so that nothing is random."""
    check_autoencoder_sizes(config["params"])
    vae = instantiate_from_config(config).to(device, dtype).eval()
    if isinstance(vae.regularization, DiagonalGaussianRegularizer):
        vae.regularization.use_means()
    return vae


def build_lpips(options: argparse.Namespace, device: torch.device, notes: list[str]) -> LPIPS | None:
    """Return the network of --lpips_net, or None if it is not wanted or has no weights.

    If its weights are missing, a note is added. If the user named a file of weights, its errors are raised instead.

    Raises:
        UserError: the named weights do not fit.
    """
    if options.lpips_net == "none":
        return None
    try:
        return LPIPS(options.lpips_net, options.lpips_weights).to(device)
    except UserError as error:
        if options.lpips_weights is not None:
            raise
        notes.append(f"LPIPS: not computed: {error}".replace("set lpips_weights", "set --lpips_weights"))
        return None


def readable_samples(dataset: Any, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield up to `count` readable samples, spread evenly over the data, with their indices.

    Raises:
        UserError: no sample can be read.
    """
    count, found = min(count, len(dataset)), 0
    bar = tqdm(range(count), desc="reading", unit="clip", leave=False)
    with bar, logging_redirect_tqdm():
        for number in bar:
            index = number * len(dataset) // count
            sample = dataset[SampleKey(index, seed=index)]
            if sample.get("unreadable"):  # the sample contains another clip instead
                logger.warning("left out, unreadable: %s", "; ".join(sample["unreadable"]))
                continue
            found += 1
            yield index, sample
    if not found:
        raise UserError(f"--data: none of the {count} clips can be read, for the reasons above; name other clips")


def name_of(dataset: Any, index: int) -> str | None:
    """Return the name of a clip, or None if the data set has no names."""
    sources = getattr(dataset, "sources", None)
    return sources[index].name if sources else None


def encode(vae: VideoCoder, clip: Tensor) -> Tensor:
    """Return the latent (1, c, t, h, w) of a clip (frames, 3, height, width), uint8."""
    return vae.encode((clip.float() / 127.5 - 1).to(vae.get_last_layer().dtype).transpose(0, 1)[None])


def reconstruct(vae: VideoCoder, clip: Tensor, whole: bool) -> Tensor:
    """Return the reconstruction, in [-1, 1], of a clip (frames, 3, height, width), uint8.

    Decoding in chunks, as in sampling, needs an odd number of latent frames; other clips are decoded as a whole.
    """
    latent = encode(vae, clip)
    whole = whole or latent.shape[2] % 2 == 0
    decoded = vae.decode_at_once(latent) if whole else torch.cat(list(vae.decode_chunks(latent)), dim=2)
    return decoded[0].transpose(0, 1)


# ---------------------------------------------------------------- output


def write_side_by_side(path: Path, clip: Tensor, reconstruction: Tensor, fps: float) -> None:
    """Write a video of a clip, its reconstruction and their amplified difference.

    Both have the shape (frames, 3, height, width) and are in [0, 1].
    """
    difference = (BOOST * (reconstruction - clip).abs()).clamp(max=1)
    frames = torch.cat([clip, reconstruction, difference], dim=3)
    with VideoWriter(path, fps, *frames.shape[2:]) as video:
        video.write(2 * frames - 1)


def write_numbers(
    path: Path, means: Mapping[str, float], clips: Sequence[dict[str, Any]], options: argparse.Namespace, weights: str
) -> None:
    """Write the measures and settings as JSON; null is the infinite PSNR of equal clips."""
    settings = {"weights": weights, "data": options.data, "dtype": options.dtype, "whole": options.whole}
    content = {"settings": settings, "lpips_net": options.lpips_net, "means": means, "clips": clips}
    write_atomically(path, standard_json(content))


def report(
    means: Mapping[str, float], clips: Sequence[dict[str, Any]], notes: Sequence[str], videos: Sequence[Path]
) -> str:
    """Return the report as lines of text."""
    shapes = sorted({"{0} frames of {2}x{3}".format(*clip["shape"]) for clip in clips})
    lines = [f"{len(clips)} clip{'s' * (len(clips) > 1)} of {', '.join(shapes)}"]
    lines += [f"{name:6}{value:9.4f}{UNITS.get(name, '')}" for name, value in means.items()]
    lines += [note.strip() for note in notes]
    lines += [f"input | reconstruction | difference x{BOOST}: {path}" for path in videos]
    return "\n".join(lines)

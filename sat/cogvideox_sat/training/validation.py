"""Evaluate on validation clips: the loss, and videos sampled from captions."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT
from cogvideox_sat.clips.loader import ClipLoader, Share
from cogvideox_sat.clips.timeouts import ClipTimeouts
from cogvideox_sat.clips.validation_clips import validation_key
from cogvideox_sat.files.output_paths import safe_name
from cogvideox_sat.latent_geometry import TIME_FACTOR
from cogvideox_sat.media.video_output import VideoWriter, save_latents
from cogvideox_sat.parallel.process_groups import parallel_groups
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.sampling.record_making import latents_metadata
from diffusion_video import SATVideoDiffusionEngine
from sgm import randomness
from sgm.context_parallel import all_reduce_sum
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sigma_sampling import undivided

logger = logging.getLogger(__name__)

# The panels of a comparison, from left to right, with their names in `log_video`.
PANELS = {"clip": "inputs", "reconstruction": "reconstructions", "sample": "samples"}


# ---------------------------------------------------------------- loss


def validation_loss(engine: SATVideoDiffusionEngine, batches: Iterable[tuple[dict[str, Any], int]]) -> float:
    """Return the mean loss of the clips in `batches`, over all data-parallel ranks.

    A clip's noise and timestep follow from its own seed, and captions and images are not dropped: the loss is
    comparable between evaluations, runs, batch sizes and numbers of processes. All ranks call this. The network's mode
    and the global random generators are restored.

    Args:
        batches: a `ValidationLoader`.
    """
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of clips
    with evaluating(engine):
        for batch, weight in batches:
            with randomness.per_sample(batch["seed"]):
                loss, _ = engine.validation_step(batch)
            if weight:
                total += torch.tensor([weight * loss.item(), weight], dtype=torch.float64)
    _, data_parallel = parallel_groups()
    losses, clips = all_reduce_sum(total.to(engine.device), data_parallel).tolist()
    return losses / clips


@contextmanager
def evaluating(engine: SATVideoDiffusionEngine) -> Iterator[None]:
    """Set the network to evaluation mode, without gradients, within the block.

    Each process draws timesteps from their whole range. PyTorch's random generators are restored afterwards.
    """
    network, levels = engine.model, engine.loss_fn.sigma_sampler
    training = network.training
    with ExitStack() as stack:
        stack.callback(network.train, training)
        stack.enter_context(undivided(levels))
        stack.enter_context(torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        network.eval()
        yield


# ---------------------------------------------------------------- samples


def save_samples(
    engine: SATVideoDiffusionEngine,
    dataset: Dataset,
    folder: str | Path,
    step: int,
    *,
    count: int,
    seed: int,
    fps: float,
    only_latents: bool = False,
    num_steps: int | None = None,
    writer: MetricsWriter | None = None,
    name: str = "unnamed",
    clip_timeout: float = CLIP_TIMEOUT,
    timeouts: ClipTimeouts | None = None,
    share: Share | None = None,
) -> list[Path]:
    """Sample a video for the captions of the first `count` validation clips.

    The videos have the size of the clips and, see `decodable`, their length. The files are
    `{folder}/samples/{step}/{i}_{caption}.mp4`, and `{folder}/comparisons/{step}/clip_{i}_{caption}.mp4`, with clip,
    reconstruction and sample side by side; for precomputed data, the clip is missing. With `only_latents` they are
    latents (t, c, h, w) in `.safetensors`, without comparisons. A clip's noise is the same at each evaluation. All
    processes call this, because the network may be divided over them: each samples everything, and the first one
    writes. Files that cannot be written are skipped with a warning.

    Args:
        fps: frames per second of the video files.
        num_steps: sampling steps; None: the sampler's own number.
        writer: shows the videos, as `samples/{i}` and `comparisons/clip_{i}`.
        name: name of the model, for the metadata of latents.
        clip_timeout, timeouts, share: see `clips.loader.ClipLoader`.

    Returns:
        The samples that this process wrote.
    """
    written = []
    first_process = not dist.is_initialized() or dist.get_rank() == 0
    keys = [validation_key(seed, index) for index in range(min(count, len(dataset)))]
    clips = ClipLoader(dataset, [[key] for key in keys], 0, clip_timeout, timeouts, lambda _: step, share)
    for index, (key, clip) in enumerate(zip(keys, clips if keys else (), strict=True)):
        batch = decodable(clip)
        with evaluating(engine):
            torch.manual_seed(key.seed)
            log = engine.log_video(batch, N=1, only_log_video_latents=only_latents, num_steps=num_steps)
        if not first_process:
            continue
        caption = batch["txt"][0]
        path = Path(folder, "samples", str(step), f"{index}_{safe_name(caption)}")
        try:
            if only_latents:
                metadata = latents_metadata(engine, name, caption, fps)
                written.append(_write_latents(path, log["latents"][0], metadata))
                continue
            written.append(_write_video(path, log["samples"][0], fps))
            shape = log["samples"].shape  # a user's own engine may give other shapes, which are left out
            panels = {what: log[key][0] for what, key in PANELS.items() if key in log and log[key].shape == shape}
            beside = Path(folder, "comparisons", str(step), f"clip_{path.name}")
            comparison = _write_video(beside, torch.cat(list(panels.values()), dim=-1), fps)
            if writer is not None:
                writer.write_video(step, f"samples/{index}", written[-1], {"prompt": caption})
                details = {"prompt": caption, "shows": list(panels)}
                writer.write_video(step, f"comparisons/clip_{index}", comparison, details)
        except UserError as error:  # for example, a full disk, or a network that diverged; training reports both
            logger.warning("sample left out: %s", error)
    return written


def decodable(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of clips or moments, cut to an odd number of latent frames.

    This is 8k + 1 frames. The VAE can encode an even number too, but does not decode it with a single first frame.
    """
    cut = dict(batch)
    if "moments" in batch:
        latents = batch["moments"].shape[2]
        cut["moments"] = batch["moments"][:, :, : latents - (latents - 1) % 2]
    else:
        frames = batch["mp4"].shape[1]
        cut["mp4"] = batch["mp4"][:, : frames - (frames - 1) % (2 * TIME_FACTOR)]
    return cut


def _write_latents(path: Path, latents: torch.Tensor, metadata: Mapping[str, str]) -> Path:
    path = path.with_name(f"{path.name}.safetensors")
    save_latents(path, latents, metadata)
    return path


def _write_video(path: Path, frames: torch.Tensor, fps: float) -> Path:
    path = path.with_name(f"{path.name}.mp4")
    with VideoWriter(path, fps, *frames.shape[2:]) as video:
        video.write(frames)
    return path

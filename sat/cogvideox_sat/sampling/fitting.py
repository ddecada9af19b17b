"""`--fit`: choose the offloading and batches whose expected memory fits on a device."""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
import torch.distributed as dist

from arguments import SamplingArguments
from cogvideox_sat.configuration.adapter_lists import path_and_weight
from cogvideox_sat.configuration.memory_advice import FEWEST, FRAMES, TILE, TILES
from cogvideox_sat.configuration.memory_sizes import parse_fit
from cogvideox_sat.configuration.model_limits import OFFLOAD_POLICIES
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.video_layout import layout_of
from cogvideox_sat.files.sizes import GIB
from cogvideox_sat.memory.sampling_peaks import VIDEO, MemoryPolicy, SamplingMemory, VideoSize
from cogvideox_sat.parallel.agreement import least_over_processes
from cogvideox_sat.parallel.devices import find_device
from cogvideox_sat.sampling.adapters import adapter_bytes, read_adapters
from cogvideox_sat.sampling.plan import SamplingPlan
from sgm.errors import UserError

logger = logging.getLogger(__name__)

# Values in the order in which they are tried: from the fastest to the one that takes the least memory.
FRAMES_AT_ONCE = (None, 8, 4)
GUIDANCE_BATCHES = (2, 1)


def fitted(args: SamplingArguments, plan: SamplingPlan | None) -> SamplingArguments:
    """Return the arguments with the choices that `fit` makes for the planned videos.

    The choices and their reason are logged in one line.

    Raises:
        UserError: the memory that `fit` allows is too small for every policy (the message names the least that works),
            or the memory of the model cannot be determined.
    """
    if args.fit is None or (plan is not None and not plan.videos):
        return replace(args, fit=None)
    adapters = read_adapters(map(path_and_weight, args.lora), args.model_config)
    budget = least_over_processes(device_budget(args.fit, args.device)) - adapter_bytes(adapters)
    try:
        memory = memory_of(args, video_sizes(args, plan))
        policy, reason = choose(memory, policies(args, memory.takes_pieces), budget, args.fit)
    except UserError:
        raise
    except Exception as error:  # of any kind, from a user's own modules that cannot run on the meta device
        described = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"fit: the memory of this model is not known ({described}); give --offload instead") from error
    if dist.get_rank() == 0:
        each = " for each process" if layout_of(args).processes > 1 else ""
        logger.info("fit: %s%s: %s", args.fit, each, reason)
    return with_policy(args, policy, budget - memory.peak(policy))


def with_policy(args: SamplingArguments, policy: MemoryPolicy, left: int) -> SamplingArguments:
    """Return the arguments changed to a policy.

    Args:
        left: bytes of the device that the policy leaves free.
    """
    return replace(args, **policy._asdict(), vae_waiting_bytes=left, fit=None)


def memory_of(args: SamplingArguments, videos: Iterable[VideoSize]) -> SamplingMemory:
    """Return the memory model of sampling.

    Raises:
        UserError: a part of the model cannot be built, or cannot run without content.
    """
    typed = args.input_type == "cli"
    return SamplingMemory(
        EngineSettings.from_args(args), set(videos), typed, not args.only_save_latents, layout_of(args)
    )


def video_sizes(args: SamplingArguments, plan: SamplingPlan | None = None) -> list[VideoSize]:
    """Return the sizes of the planned videos, or without a plan the size in the arguments."""
    if plan is not None:
        return [VideoSize(video.frames, *video.size) for video in plan.videos]
    height, width = args.sampling_image_size
    return [VideoSize(args.sampling_num_frames, height, width)]


def device_budget(fit: str, device: str | None) -> int:
    """Return the total number of bytes of the device that sampling may take.

    Raises:
        UserError: `fit` is `auto`, and the machine has no GPU.
    """
    budget = parse_fit(fit)
    if budget is not None:
        return budget
    found = find_device(device)
    if found.type != "cuda":
        raise UserError("fit: auto needs a GPU, and this machine has none; give an amount such as 12GB")
    return torch.cuda.mem_get_info(found)[0]


def policies(args: SamplingArguments, takes_pieces: bool = True) -> Iterator[MemoryPolicy]:
    """Yield the policies that compute the same values, the fastest first.

    Options that the user has given stay fixed.

    Args:
        takes_pieces: whether the VAE can process a few frames at a time within its layers.
    """
    offloads = [args.offload] if "offload" in args.given else OFFLOAD_POLICIES
    given_vae = {"vae_frames_at_once", "vae_tile_size"} & args.given or not takes_pieces
    frames = [args.vae_frames_at_once] if given_vae else FRAMES_AT_ONCE
    halves_are_apart = layout_of(args).guidance > 1
    batches = [args.guidance_batch] if "guidance_batch" in args.given or halves_are_apart else GUIDANCE_BATCHES
    for offload, at_once, batch in product(offloads, frames, batches):
        yield MemoryPolicy(offload, batch, at_once, args.vae_tile_size)


def choose(
    memory: SamplingMemory, candidates: Iterable[MemoryPolicy], budget: int, fit: str
) -> tuple[MemoryPolicy, str]:
    """Return the first policy that stays within `budget` bytes, and the reason in words.

    Raises:
        UserError: no policy stays within the budget.
    """
    candidates = list(candidates)
    for policy in candidates:
        if memory.peak(policy) <= budget:
            return policy, reason_for(memory, policy, candidates[0])
    least = min(candidates, key=memory.peak)
    needed, stage = memory.peak(least), largest_stage(memory, least)
    tiles_help = stage == VIDEO and least.vae_tile_size is None and memory.longest_side > TILE
    frames_help = stage == VIDEO and (least.vae_frames_at_once or 0) > FEWEST  # given by the user
    further = (f"{FRAMES}, " if frames_help else "") + (f"{TILES}, " if tiles_help else "")
    raise UserError(
        f"fit: {fit} is too small for this model and size, which take at least {gib_up(needed)} GiB with {least} "
        f"(the {stage} takes most); give --fit {gib_up(needed)}GB, {further}fewer frames or a smaller size"
    )


def reason_for(memory: SamplingMemory, policy: MemoryPolicy, fastest: MemoryPolicy) -> str:
    """Return the expected memory of a policy, and why the policy is not the fastest."""
    peak, stage = memory.peak(policy), largest_stage(memory, policy)
    text = f"{policy}, which takes up to {gib_up(peak)} GiB (the {stage} takes most)"
    if policy == fastest:
        return text
    return f"{text}; {fastest} would take {gib_up(memory.peak(fastest))} GiB"


def largest_stage(memory: SamplingMemory, policy: MemoryPolicy) -> str:
    """Return the stage that takes the most memory under a policy."""
    stages = memory.stages(policy)
    return max(stages, key=lambda stage: stages[stage])


def gib_up(size: int) -> float:
    """Return a number of bytes in GiB, rounded up to a tenth."""
    return math.ceil(10 * size / GIB) / 10

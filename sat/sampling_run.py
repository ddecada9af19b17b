"""The stages of sampling: text, first frames, latents, pixels. What `sample_video.py` does once PyTorch is needed."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from sat import mpu
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from arguments import SamplingArguments
from contact_sheet import write_contact_sheet
from devices import choose_device, settle_precision
from diffusion_video import PARTS, SATVideoDiffusionEngine
from engine_choice import build_engine
from image_inputs import load_condition_image
from layer_streaming import stream_layers
from looping_previews import write_looping_preview
from model_checks import check_model
from model_limits import SPACE_FACTOR
from network_files import checkpoint_file
from process_groups import destroy_process_groups, initialize_process_groups
from prompt_inputs import PromptRequest, typed_prompts
from sampling_plan import PlannedVideo, SamplingPlan, plan_videos, refine_videos
from sgm.context_parallel import get_context_parallel_world_size
from sgm.errors import UserError
from video_output import VideoWriter, save_latents

logger = logging.getLogger("sample_video")

# With parts taking turns, so many videos are sampled before they are decoded: few enough to lose little when a run is
# cut off, enough for the change of parts not to matter.
STAGE_GROUP = 8


@dataclass
class Job:
    """A planned video on its way, with what the stages have made of it so far."""

    video: PlannedVideo
    cond: Tensor | None = None
    uncond: Tensor | None = None
    image_latent: Tensor | None = None
    random_state: Tensor | None = None
    latents: Tensor | None = None
    failure: str | None = None


class Stages:
    """Has the part of the engine that is in use on the device, and, unless `offload` is none, no other.

    With `sequential` the network stays built, since its layers wait in host memory anyway.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, args: SamplingArguments):
        self.engine = engine
        self.offload = args.offload

    def use(self, part: str) -> None:
        engine = self.engine
        streams = self.offload == "sequential"
        if self.offload != "none":
            for other in ("conditioner", "first_stage_model", "model"):
                waits_elsewhere = streams and other == "model"
                if other != part and not waits_elsewhere and getattr(engine, other) is not None:
                    engine.release(other)
        if part == "model" and streams and engine.model is None:
            engine.build(part, device="cpu")
            stream_layers(engine.network, engine.device)
        else:
            engine.build(part)


def run(args: SamplingArguments, plan: SamplingPlan | None) -> int:
    """Make the planned videos, shared out over processes, or those of typed prompts for None; the exit code.

    Raises:
        UserError: the device or a checkpoint stands in the way of the whole run.
    """
    initialize_process_groups(args.model_parallel_size)
    try:
        failed = sample_everywhere(args, plan.videos if plan else None)
        if plan and dist.get_rank() == 0:
            show(args, [(text, path) for text, path in plan.shown if path.exists()])
        return 1 if failed else 0
    finally:
        destroy_process_groups()


def show(args: SamplingArguments, videos: list[tuple[str, Path]]) -> None:
    """Write the pictures of the videos that the arguments ask for."""
    if args.contact_sheet is not None:
        write_contact_sheet(Path(args.contact_sheet), videos)
        logger.info("wrote %s", args.contact_sheet)
    if args.looping_previews:
        for _, path in videos:
            write_looping_preview(path)


def sample_everywhere(args: SamplingArguments, videos: list[PlannedVideo] | None) -> int:
    """Make the videos, each process its own; the number of all that failed, once all are done."""
    try:
        if args.refine_prompts and videos:
            videos = refine_once(videos)
        failed = sample_all(args, videos)
    except Exception:
        # The others finish their videos first; but those that share a network with this process wait for it inside the
        # network, until the launcher sees it gone and ends them.
        if args.model_parallel_size == 1:
            total_over_processes(1)
        raise
    return total_over_processes(failed)


def refine_once(videos: list[PlannedVideo]) -> list[PlannedVideo]:
    """`refine_videos` by the first process, for all: the answers would differ."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [refine_videos(videos)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def sample_all(args: SamplingArguments, videos: list[PlannedVideo] | None) -> int:
    """Make this process's videos; the number of them that failed."""
    for path in filter(None, (args.load, args.lora_load)):  # before minutes go into the text encoder
        checkpoint_file(path, mpu.get_model_parallel_rank(), args.model_parallel_size)
    check_model(args, PARTS)  # before any weights are read
    device = choose_device(args.device)
    args = settle_precision(args, device)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same video
    engine = build_engine(args, (), device)
    engine.sampler.verbose = False  # one bar for the whole run instead
    steps = args.sampling_num_steps or engine.sampler.num_steps
    if steps is None:
        raise UserError("the sampler_config has no num_steps: give sampling_num_steps")
    engine.sampler.schedule(steps)  # raises if there are not that many
    stages = Stages(engine, args)
    if not args.only_save_latents:
        stages.use("first_stage_model")  # weights that do not fit are found before sampling, not after
    if videos is None:
        return sum(sample_typed(stages, request, args) for request in typed_prompts(args.image2video))
    own = videos[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    return sample_videos(stages, own, args, keep_conditioner=False)


def sample_typed(stages: Stages, request: PromptRequest, args: SamplingArguments) -> int:
    """Make the videos of one typed prompt; the number of them that failed."""
    try:
        videos = plan_videos([request], args)
        if args.refine_prompts:
            videos = refine_videos(videos)
    except UserError as error:  # an output exists, say; the next prompt may do
        logger.error("%s", error)
        return args.batch_size
    return sample_videos(stages, videos, args, keep_conditioner=True)


def sample_videos(
    stages: Stages, videos: Sequence[PlannedVideo], args: SamplingArguments, keep_conditioner: bool
) -> int:
    """Take videos through the stages; the number of them that failed."""
    if not videos:
        return 0
    engine, jobs = stages.engine, [Job(video) for video in videos]
    stages.use("conditioner")
    encoded: dict[int, Job] = {}  # by prompt: the videos of one prompt share its embeddings
    attempt_each(jobs, lambda job: encode_text(engine, job, args.negative_prompt, encoded))
    if not keep_conditioner:
        engine.release("conditioner")
    if args.image2video:
        stages.use("first_stage_model")
        attempt_each(jobs, lambda job: encode_image(engine, job))
    pending = [job for job in jobs if job.failure is None]
    steps = args.sampling_num_steps or engine.sampler.num_steps
    bar = tqdm(total=len(pending) * steps, desc="sampling", unit="step", disable=dist.get_rank() != 0)
    with bar, logging_redirect_tqdm():
        group_size = 1 if stages.offload == "none" else STAGE_GROUP
        for start in range(0, len(pending), group_size):
            sample_group(stages, pending[start : start + group_size], args, bar)
    return sum(job.failure is not None for job in jobs)


def sample_group(stages: Stages, jobs: list[Job], args: SamplingArguments, bar: tqdm) -> None:
    """From embeddings to files."""
    engine = stages.engine
    stages.use("model")
    attempt_each(jobs, lambda job: sample_latents(engine, job, args, lambda done, steps: bar.update()))
    writes = mpu.get_model_parallel_rank() == 0  # for all processes of its model-parallel group
    if args.only_save_latents:
        attempt_each(jobs if writes else [], lambda job: save_latents(job.video.path, job.latents))
    elif writes or get_context_parallel_world_size() > 1:
        stages.use("first_stage_model")
        attempt_each(jobs, lambda job: decode_video(engine, job, args.sampling_fps if writes else None))
    for job in jobs:
        job.latents = None
        if writes and job.failure is None:
            logger.info("wrote %s", job.video.path)


def attempt_each(jobs: Iterable[Job], stage: Callable[[Job], Any]) -> None:
    """Run a stage on every job that has not failed; a failure is reported with its prompt and ends that job alone."""
    for job in jobs:
        if job.failure is not None:
            continue
        try:
            stage(job)
        except Exception as error:
            foreseen = isinstance(error, UserError | torch.OutOfMemoryError)
            if mpu.get_model_parallel_world_size() > 1 and not isinstance(error, UserError):
                raise  # the others are inside the network and would pair this one's next call with their present one
            job.failure = describe(error)
            where = None if foreseen else error
            number, text = job.video.request.index + 1, job.video.request.text
            logger.error("failed: prompt %d ('%.60s'): %s", number, text, job.failure, exc_info=where)


def describe(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the memory of the device is full; try --offload sequential, --vae_tile_size or a smaller video"
    return next(iter(str(error).splitlines()), type(error).__name__)


# The stages


@torch.no_grad()
def encode_text(engine: SATVideoDiffusionEngine, job: Job, negative_prompt: str, encoded: dict[int, Job]) -> None:
    """Sets `cond` and `uncond` (1, tokens, features). Without a negative prompt the unconditional states are zeros, as
    in training, where a dropped caption leaves zeros."""
    request = job.video.request
    if request.index in encoded:
        job.cond, job.uncond = encoded[request.index].cond, encoded[request.index].uncond
        return

    def embed(text: str) -> Tensor:
        return engine.conditioner({"txt": [text]}, drop=False)["crossattn"].cpu()

    negative = request.negative_prompt or negative_prompt
    job.cond = embed(request.text)
    job.uncond = embed(negative) if negative else torch.zeros_like(job.cond)
    encoded[request.index] = job


@torch.no_grad()
def encode_image(engine: SATVideoDiffusionEngine, job: Job) -> None:
    """Sets `image_latent` (1, 1, c, h, w), with the first random draws that belong to the job's seed."""
    image = load_condition_image(job.video.request.image, job.video.size)
    torch.manual_seed(job.video.seed)
    clip = rearrange(image, "c h w -> 1 c 1 h w").to(engine.device)
    job.image_latent = engine.encode_condition_image(clip).cpu()
    job.random_state = torch.get_rng_state()


@torch.no_grad()
def sample_latents(
    engine: SATVideoDiffusionEngine, job: Job, args: SamplingArguments, callback: Callable[[int, int], None]
) -> None:
    """Sets `latents` (1, t, c, h, w), without the leading frame that 1.5 models add."""
    torch.manual_seed(job.video.seed)
    if job.random_state is not None:
        torch.set_rng_state(job.random_state)
    concat_images = ofs = None
    if job.image_latent is not None:
        concat_images = engine.concat_condition(job.image_latent.to(engine.device), job.video.frames)
        ofs = engine.default_ofs(1)
    height, width = (side // SPACE_FACTOR for side in job.video.size)
    latents = engine.sample(
        {"crossattn": job.cond.to(engine.device)},
        {"crossattn": job.uncond.to(engine.device)},
        batch_size=1,
        shape=(job.video.frames, args.latent_channels, height, width),
        concat_images=concat_images,
        ofs=ofs,
        num_steps=args.sampling_num_steps,
        callback=callback,
    )
    job.latents = engine.drop_extra_frame(latents).cpu()
    if not torch.isfinite(job.latents).all():
        raise UserError("the sampled latents are not finite; try bf16 or float32 instead of fp16")


def decode_video(engine: SATVideoDiffusionEngine, job: Job, fps: int | None) -> None:
    """Decode `latents` into the job's video file, chunk by chunk; without `fps` only for the other processes that
    decode it too."""
    chunks = engine.decode_stream(rearrange(job.latents, "1 t c h w -> 1 c t h w"))
    try:
        if fps is not None:
            with VideoWriter(job.video.path, fps, *job.video.size) as video:
                for frames in chunks:
                    video.write(rearrange(frames, "1 c t h w -> t c h w"))
    finally:
        if get_context_parallel_world_size() > 1:  # the others wait for this process, whatever became of the file
            for _ in chunks:
                pass


def total_over_processes(count: int) -> int:
    """Sum over all processes. Waits for them, since a launcher ends all processes when one exits with an error."""
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)

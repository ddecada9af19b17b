"""The stages of sampling: text, first frames, latents, pixels. What `sample_video.py` does once PyTorch is needed."""

import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from cogvideox_sat.configuration.memory_advice import DECODING, SAMPLING, TEXT, sampling_advice
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.video_records import KEPT_SUFFIX, kept_path, record_path, write_record
from cogvideox_sat.engine_choice import build_engine
from cogvideox_sat.files.shipped import ROOT
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.media.contact_sheet import write_contact_sheet
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.media.looping_previews import write_looping_preview
from cogvideox_sat.media.video_output import VideoWriter, save_latents
from cogvideox_sat.network.layer_streaming import stream_layers
from cogvideox_sat.parallel.agreement import total_over_processes
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.sampling.plan import PlannedVideo, SamplingPlan, plan_videos, refine_videos
from cogvideox_sat.sampling.prompt_inputs import PromptRequest, typed_prompts
from cogvideox_sat.sampling.record_making import Recorder
from cogvideox_sat.weights.checkpoint_files import checkpoint_file
from diffusion_video import PART_NAMES, PARTS, SATVideoDiffusionEngine, other_precision
from sgm.context_parallel import get_context_parallel_world_size
from sgm.errors import UserError
from sgm.memory_errors import describe_shortage, is_out_of_memory, memory_guard
from sgm.modules.diffusionmodules.sampling_bar import hide_bar

logger = logging.getLogger("sample_video")

# With parts taking turns, so many videos are sampled before they are decoded: few enough to lose little when a run is
# cut off, enough for the change of parts not to matter.
STAGE_GROUP = 8
DECODE_TOOL = ROOT / "tools" / "decode_latents.py"


@dataclass
class Job:
    """A planned video on its way, with what the stages have made of it so far.

    `kept` is the file of its latents until the video is complete, `full` says that it failed because memory is full.
    """

    video: PlannedVideo
    cond: Tensor | None = None
    uncond: Tensor | None = None
    image_latent: Tensor | None = None
    random_state: Tensor | None = None
    latents: Tensor | None = None
    failure: str | None = None
    kept: Path | None = None
    full: bool = False


class Stages:
    """Has the part of the engine that is in use on the device, and, unless `offload` is none, no other.

    With `sequential` the network stays built, since its layers wait in host memory anyway.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, args: SamplingArguments, recorder: Recorder):
        self.engine, self.recorder = engine, recorder
        self.offload = args.offload
        self.advice = sampling_advice(args)

    def use(self, part: str) -> None:
        with memory_guard(f"loading {PART_NAMES[part]}", self.advice):
            self._use(part)

    def guarded(self, where: str, stage: Callable[[Job], Any]) -> Callable[[Job], Any]:
        """Return the stage, with advice for the case that memory is full while the run does what `where` says."""

        def run_stage(job: Job) -> Any:
            with memory_guard(where, self.advice):
                return stage(job)

        return run_stage

    def _use(self, part: str) -> None:
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
        with failing_together():
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
    asked, args = args, settle_precision(args, device)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same video
    engine = build_engine(args, (), device)
    hide_bar(engine.sampler)  # one bar for the whole run instead
    steps = args.sampling_num_steps or getattr(engine.sampler, "num_steps", None)
    if steps is None:
        raise UserError("the sampler_config has no num_steps: give sampling_num_steps")
    if hasattr(engine.sampler, "schedule"):  # one of the user's own may have none
        engine.sampler.schedule(steps)  # raises if there are not that many
    recorder = Recorder(engine, asked, args.record)
    try:
        stages = Stages(engine, args, recorder)
        if not args.only_save_latents:
            stages.use("first_stage_model")  # weights that do not fit are found before sampling, not after
        if videos is None:
            return sum(sample_typed(stages, request, args) for request in typed_prompts(args.image2video))
        own = videos[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
        return sample_videos(stages, own, args, keep_conditioner=False)
    finally:
        recorder.close()


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
    stages.recorder.tell_differences(videos[0])
    stages.use("conditioner")
    encoded: dict[int, Job] = {}  # by prompt: the videos of one prompt share its embeddings
    guard = stages.guarded
    attempt_each(jobs, guard(TEXT, lambda job: encode_text(engine, job, args.negative_prompt, encoded)))
    if not keep_conditioner:
        engine.release("conditioner")
    if args.image2video:
        stages.use("first_stage_model")
        attempt_each(jobs, guard("encoding images", lambda job: encode_image(engine, job)))
    pending = [job for job in jobs if job.failure is None]
    steps = args.sampling_num_steps or engine.sampler.num_steps
    bar = tqdm(total=len(pending) * steps, desc="sampling", unit="step", disable=dist.get_rank() != 0)
    with bar, logging_redirect_tqdm():
        group_size = 1 if stages.offload == "none" else STAGE_GROUP
        for start in range(0, len(pending), group_size):
            sample_group(stages, pending[start : start + group_size], args, bar)
    failed = [job for job in jobs if job.failure is not None]
    if len(failed) == len(jobs) and all(job.full for job in jobs) and args.input_type != "cli":
        raise UserError(f"no video could be made, since memory is full: {jobs[0].failure}")
    return len(failed)


def sample_group(stages: Stages, jobs: list[Job], args: SamplingArguments, bar: tqdm) -> None:
    """From embeddings to files."""
    engine, recorder = stages.engine, stages.recorder
    stages.use("model")
    attempt_each(
        jobs, stages.guarded(SAMPLING, lambda job: sample_latents(engine, job, args, lambda done, steps: bar.update()))
    )
    writes = mpu.get_model_parallel_rank() == 0  # for all processes of its model-parallel group
    if args.only_save_latents:
        attempt_each(
            jobs if writes else [],
            lambda job: save_latents(job.video.path, job.latents, recorder.metadata(job.video)),
        )
    elif writes or get_context_parallel_world_size() > 1:
        with keeping_latents(jobs if writes else [], recorder):
            stages.use("first_stage_model")
            decode = stages.guarded(
                DECODING, lambda job: decode_video(engine, job, args.sampling_fps if writes else None)
            )
            remark = (lambda job: where_latents_are(job, recorder)) if writes else None
            attempt_each(jobs, decode, remark)
            attempt_each(jobs if writes else [], lambda job: complete(job, recorder), remark)
    for job in jobs:
        job.latents = None
        if writes and job.failure is None:
            logger.info("wrote %s", job.video.path)


def attempt_each(jobs: Iterable[Job], stage: Callable[[Job], Any], remark: Callable[[Job], str] | None = None) -> None:
    """Run a stage on every job that has not failed; a failure is reported with its prompt and ends that job alone.

    Args:
        remark: gives what to add to the report of a failure.
    """
    for job in jobs:
        if job.failure is not None:
            continue
        try:
            stage(job)
        except Exception as error:
            job.full = is_out_of_memory(error)
            seen_by_all = isinstance(error, UserError) and not job.full
            if mpu.get_model_parallel_world_size() > 1 and not seen_by_all:
                raise  # the others are inside the network and would pair this one's next call with their present one
            job.failure = describe(error)
            where = None if job.full or isinstance(error, UserError) else error
            number, text = job.video.request.index + 1, job.video.request.text
            if remark is not None:
                job.failure += remark(job)
            logger.error("failed: prompt %d ('%.60s'): %s", number, text, job.failure, exc_info=where)
        if job.full and torch.cuda.is_available():
            torch.cuda.empty_cache()  # now that nothing of the failed stage is referred to any more


def describe(error: Exception) -> str:
    if is_out_of_memory(error) and not isinstance(error, UserError):
        return describe_shortage(error)
    return next(iter(str(error).splitlines()), type(error).__name__)


# Latents that are not lost


@contextmanager
def keeping_latents(jobs: list[Job], recorder: Recorder) -> Iterator[None]:
    """Have the latents of sampled jobs in files while the block decodes them, so that nothing can lose them: no full
    memory or disk, and not the end of the process. Those of complete videos are removed."""
    sampled = [job for job in jobs if job.failure is None]
    for job in sampled:
        keep(job, kept_path(job.video.path), recorder)
    try:
        yield
    except BaseException:
        for job in sampled:
            if job.failure is None and (job.kept is None or job.kept.exists()):
                number, text = job.video.request.index + 1, job.video.request.text
                logger.error("not decoded: prompt %d ('%.60s')%s", number, text, where_latents_are(job, recorder))
        raise


def keep(job: Job, path: Path, recorder: Recorder) -> str | None:
    """Write the job's latents to `path`, `job.kept`; return why that is not possible, or None."""
    try:
        save_latents(path, job.latents, recorder.metadata(job.video, wait=False))
    except UserError as error:
        return str(error)
    job.kept = path
    return None


def where_latents_are(job: Job, recorder: Recorder) -> str:
    """Return the end of the report of a video that cannot be decoded: the command that decodes it later."""
    if job.kept is None:  # beside the video there is no place; perhaps there is in the folder of temporary files
        name = f"{job.video.request.index}_{job.video.seed}{KEPT_SUFFIX}"
        if problem := keep(job, Path(tempfile.mkdtemp(prefix="cogvideox-")) / name, recorder):
            return f"; its latents are lost: {problem}"
    tool = os.path.relpath(DECODE_TOOL) if Path.cwd() == DECODE_TOOL.parents[1] else DECODE_TOOL
    flags = " --vae_tile_size 256" if job.full else ""
    if job.kept == kept_path(job.video.path) and job.video.path.exists():  # without its record, or one of before
        flags += " --overwrite"
    return f"; its latents are kept, decode them with: python {tool} {shlex.quote(str(job.kept))}{flags}"


def complete(job: Job, recorder: Recorder) -> None:
    """Write the record beside the job's video, and remove the latents that were kept for the case that it fails."""
    recorder.tell_differences(job.video, wait=True)
    write_record(job.video.path, recorder.with_content(job.video, job.video.path))
    if job.kept is not None:
        job.kept.unlink(missing_ok=True)


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
    if not (torch.isfinite(job.cond).all() and torch.isfinite(job.uncond).all()):
        raise UserError(f"the text encoder's output is not finite: {other_precision(engine.dtype)}")
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
        check_finite=True,
    )
    job.latents = engine.drop_extra_frame(latents).cpu()


def decode_video(engine: SATVideoDiffusionEngine, job: Job, fps: int | None) -> None:
    """Decode `latents` into the job's video file, chunk by chunk; without `fps` only for the other processes that
    decode it too."""
    chunks = engine.decode_stream(rearrange(job.latents, "1 t c h w -> 1 c t h w"))
    try:
        if fps is not None:
            with VideoWriter(job.video.path, fps, *job.video.size) as video:
                for frames in chunks:
                    video.write(rearrange(frames, "1 c t h w -> t c h w"))
                record_path(job.video.path).unlink(missing_ok=True)  # of the video that this one now replaces
    finally:
        if get_context_parallel_world_size() > 1:  # the others wait for this process, whatever became of the file
            for _ in chunks:
                pass

"""The sampling command: take many videos through the stages of a session and write them."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from arguments import SamplingArguments
from cogvideox_sat.configuration.memory_advice import DECODING, ENCODING, SAMPLING, TEXT, sampling_advice
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs
from cogvideox_sat.configuration.video_layout import layout_of
from cogvideox_sat.configuration.video_records import record_path, write_record
from cogvideox_sat.engine.parts import PART_NAMES
from cogvideox_sat.media.contact_sheet import write_contact_sheet
from cogvideox_sat.media.looping_previews import write_looping_preview
from cogvideox_sat.media.video_output import VideoWriter, save_latents
from cogvideox_sat.parallel.agreement import total_over_processes
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.sampling.fitting import fitted
from cogvideox_sat.sampling.kept_latents import keeping_latents, where_latents_are
from cogvideox_sat.sampling.open_sessions import sessions_of_process
from cogvideox_sat.sampling.plan import SamplingPlan, with_inputs_of_run
from cogvideox_sat.sampling.planned_videos import PlannedVideo, plan_videos, refine_videos
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.record_making import Recorder
from cogvideox_sat.sampling.request_checks import check_request
from cogvideox_sat.sampling.request_making import sample_request
from cogvideox_sat.sampling.requests import Frames, Latents, Progress, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from cogvideox_sat.sampling.typed_prompts import typed_prompts
from cogvideox_sat.sampling.video_in_progress import VideoInProgress, attempt_each
from sgm.context_parallel import get_context_parallel_world_size
from sgm.errors import UserError
from sgm.memory_errors import memory_guard

logger = logging.getLogger(__name__)

# With offloading, this many videos are sampled before they are decoded: few enough that an interrupted run loses
# little, enough that the time to exchange the parts does not matter.
STAGE_GROUP = 8


def run(args: SamplingArguments, plan: SamplingPlan | None) -> int:
    """Make the videos of the plan, or of typed prompts without a plan; return the exit code.

    Raises:
        UserError: the device or a checkpoint cannot be used, so that no video can be made.
    """
    others = sessions_of_process.count  # sessions of the calling program, which still need the process groups
    initialize_process_groups(args.model_parallel_size)
    try:
        with failing_together():
            args = fitted(args, plan)
            failed = sample_everywhere(args, plan.videos if plan else None)
        if plan and dist.get_rank() == 0:
            failed += write_previews(args, [(text, path) for text, path in plan.files if path.exists()])
        return 1 if failed else 0
    finally:
        if not others:
            destroy_process_groups()


def write_previews(args: SamplingArguments, videos: list[tuple[str, Path]]) -> int:
    """Write the contact sheet and looping previews that are asked for; return how many failed."""
    writers: list[Callable[[], object]] = []
    if args.contact_sheet is not None:
        writers.append(partial(write_contact_sheet, Path(args.contact_sheet), videos))
    if args.looping_previews:
        writers += [partial(write_looping_preview, path) for _, path in videos]
    failed = 0
    for write in writers:
        try:
            write()
        except UserError as error:
            logger.error("%s", error)
            failed += 1
    return failed


def sample_everywhere(args: SamplingArguments, videos: list[PlannedVideo] | None) -> int:
    """Make each process's videos; return how many failed in all processes together."""
    try:
        if args.refine_prompts and videos:
            videos = refine_once(videos)
        failed = sample_all(args, videos)
    except Exception:
        # The other processes finish their videos first. Processes that share a network with this one wait inside the
        # network, until the launcher notices that this process has ended and ends them.
        if args.model_parallel_size == 1 and layout_of(args).processes == 1:
            total_over_processes(1)
        raise
    return total_over_processes(failed)


def refine_once(videos: list[PlannedVideo]) -> list[PlannedVideo]:
    """Return the videos that the first process refines, in every process.

    Each process would get other answers.
    """
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
    """Make this process's videos; return how many failed."""
    with SamplingSession(SessionSettings.of_command(args)) as session:
        asked = {(video.steps, video.knobs) for video in videos or ()}
        for steps, knobs in asked or [(args.sampling_num_steps, SamplerKnobs.of(args))]:
            session.steps_of(steps, knobs)  # raises before any weights are read
        if dist.get_rank() == 0:
            logger.info("attention: %s", session.engine.attention)
        recorder = Recorder(session.engine, args, args.record)
        with closing(recorder):
            run = CommandRun(session, recorder, args)
            if not args.only_save_latents:
                run.load("first_stage_model")  # weights that do not fit are noticed before sampling
            if videos is None:
                return sum(run.sample_typed(request) for request in typed_prompts(args.image2video))
            own = videos[session.groups.video :: session.groups.videos]
            return run.sample_videos(own, keep_text_encoder=False)


class CommandRun:
    """Takes many videos at a time through the stages of a session, and writes their files.

    A failure ends only its own video, unless other processes take part in it.

    Args:
        recorder: makes the records beside the videos.
    """

    def __init__(self, session: SamplingSession, recorder: Recorder, args: SamplingArguments):
        self.session, self.recorder, self.args = session, recorder, args
        self.advice = sampling_advice(args)
        self.attempt = partial(attempt_each, together=session.groups.size > 1, tells=session.groups.first)

    def load(self, part: str) -> None:
        """Load a part of the model onto the device.

        Raises:
            UserError: its weights cannot be read or do not fit, or memory is full; the message contains advice.
        """
        with memory_guard(f"loading {PART_NAMES[part]}", self.advice):
            self.session.load(part)

    def advised(self, where: str, stage: Callable[[VideoInProgress], Any]) -> Callable[[VideoInProgress], Any]:
        """Return the stage, with advice added to the error if memory is full.

        Args:
            where: what the run does in the stage, for the message.
        """

        def run_stage(video: VideoInProgress) -> Any:
            with memory_guard(where, self.advice):
                return stage(video)

        return run_stage

    def sample_typed(self, request: PromptRequest) -> int:
        """Make the videos of one typed prompt; return how many failed."""
        try:
            request = with_inputs_of_run(request, self.args)
            check_request(request, self.args, f"prompt {request.index + 1}: ")
            videos = plan_videos([request], self.args)
            if self.args.refine_prompts:
                videos = refine_videos(videos)
        except UserError as error:  # for example, an output exists; the next prompt may succeed
            logger.error("%s", error)
            return self.args.batch_size
        return self.sample_videos(videos, keep_text_encoder=True)

    def sample_videos(self, planned: Sequence[PlannedVideo], keep_text_encoder: bool) -> int:
        """Take videos through the stages; return how many failed.

        Args:
            keep_text_encoder: for further prompts; otherwise, it leaves memory after the last prompt.

        Raises:
            UserError: a part cannot be loaded, or every video failed because memory is full.
        """
        if not planned:
            return 0
        args = self.args
        videos = [VideoInProgress(video, video.fps) for video in planned]
        self.recorder.log_differences(planned[0])
        self.load("conditioner")
        self.attempt(videos, self.advised(TEXT, self.encode_prompt))
        if not keep_text_encoder:
            self.session.release("conditioner")
        if showing := [video for video in videos if video.asked is not None and video.asked.shows]:
            self.load("first_stage_model")
            pictures = all(video.asked is not None and video.asked.shows == "image" for video in showing)
            where = "encoding images" if pictures else ENCODING
            self.attempt(showing, self.advised(where, lambda video: next(video.events)))
        pending = [video for video in videos if video.failure is None]
        steps = sum(self.session.steps_taken(video.asked) for video in pending if video.asked is not None)
        bar = tqdm(total=steps, desc="sampling", unit="step", disable=dist.get_rank() != 0)
        with bar, logging_redirect_tqdm():
            group_size = 1 if args.offload == "none" else STAGE_GROUP
            for start in range(0, len(pending), group_size):
                self.sample_group(pending[start : start + group_size], bar)
        failed = [video for video in videos if video.failure is not None]
        if len(failed) == len(videos) and all(video.full for video in videos) and args.input_type != "cli":
            raise UserError(f"no video could be made, since memory is full: {videos[0].failure}")
        return len(failed)

    def sample_group(self, videos: list[VideoInProgress], bar: tqdm) -> None:
        """Take videos from embeddings to files."""
        self.load("model")
        self.attempt(videos, self.advised(SAMPLING, lambda video: sample_latents(video, bar)))
        writes = self.session.groups.first  # one process writes for all that make the video
        written = videos if writes else []
        if self.args.only_save_latents:
            self.attempt(written, self.save_latents)
        elif writes or self.decodes_together:
            with keeping_latents(written, self.recorder):
                self.load("first_stage_model")
                remark = (lambda video: where_latents_are(video, self.recorder)) if writes else None
                decode = partial(self.decode_to_file, bar=bar) if writes else decode_for_others
                self.attempt(videos, self.advised(DECODING, decode), remark)
                self.attempt(written, self.complete, remark)
        for video in videos:
            video.drop()
            if writes and video.failure is None:
                logger.info("wrote %s", video.planned.path)

    @property
    def decodes_together(self) -> bool:
        """Return whether the processes that make a video share the work of the autoencoder."""
        return self.session.groups.splits_work or get_context_parallel_world_size() > 1

    def encode_prompt(self, video: VideoInProgress) -> None:
        """Start the video's request, up to its encoded prompt."""
        video.asked = sample_request(video.planned, self.args)
        video.events = self.session.sample(video.asked)
        next(video.events)

    def save_latents(self, video: VideoInProgress) -> None:
        """Write the latents as the video's output."""
        save_latents(video.planned.path, video.latents, self.recorder.metadata(video.planned))

    def decode_to_file(self, video: VideoInProgress, bar: tqdm) -> None:
        """Write the frames of the video's request to its file, chunk by chunk.

        Further windows of the video are sampled here, too.
        """
        planned = video.planned
        try:
            with VideoWriter(planned.path, video.fps, *planned.size) as writer:
                for event in video.events:
                    if isinstance(event, Frames):
                        writer.write(event.frames)
                    elif isinstance(event, Progress):
                        bar.update()
                record_path(planned.path).unlink(missing_ok=True)  # the record of a video that is being replaced
        finally:
            if self.decodes_together:  # the others wait for this process, even if the file could not be written
                decode_for_others(video)

    def complete(self, video: VideoInProgress) -> None:
        """Write the record beside the video, and remove the latents kept in case of a failure."""
        planned = video.planned
        self.recorder.log_differences(planned, wait=True)
        write_record(planned.path, self.recorder.with_content(planned, planned.path))
        if video.kept is not None:
            video.kept.unlink(missing_ok=True)


def sample_latents(video: VideoInProgress, bar: tqdm) -> None:
    """Take the video's request up to its latents."""
    for event in video.events:
        if isinstance(event, Latents):
            video.latents = event.latents
            return
        if isinstance(event, Progress):
            bar.update()


def decode_for_others(video: VideoInProgress) -> None:
    """Take the video's request to its end, for the other processes that decode it."""
    for _ in video.events:
        pass

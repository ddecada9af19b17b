"""Make the videos of `valid_prompts` with the network in its current training state."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.engine_choice import build_engine
from cogvideox_sat.media.video_output import VideoWriter, pixels_of, save_latents
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import from_first_process, meet
from cogvideox_sat.parallel.first_process import made_by_first
from cogvideox_sat.parallel.video_groups import VideoGroups
from cogvideox_sat.runs import random_state
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.sampling.borrowed_session import BorrowedSession, Texts
from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.record_making import latents_metadata
from cogvideox_sat.sampling.request_making import sample_request
from cogvideox_sat.sampling.requests import Frames, Latents, SampleEvent, SampleRequest, SessionSettings
from cogvideox_sat.sampling.text_embedding import embedded_texts
from cogvideox_sat.sampling.video_in_progress import describe
from cogvideox_sat.sampling.visual_inputs import load_pixels
from cogvideox_sat.training.given_frames import GivenFrames, given_frames
from cogvideox_sat.training.prompt_plan import PromptPlan
from cogvideox_sat.training.validation import evaluating
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.memory_errors import is_out_of_memory, memory_guard

logger = logging.getLogger(__name__)

VIDEOS, COMPARISONS = "valid_prompts", "comparisons"  # names of folders, and first parts of videos' names


# ---------------------------------------------------------------- before the network is loaded


def check_inputs(plan: PromptPlan) -> None:
    """Check that the pictures and clips of all prompts can be read and fit.

    Raises:
        UserError: they cannot be used.
    """
    limits = ModelLimits.from_config(plan.args.model_config)
    for video in plan.videos:
        try:
            load_pixels(sample_request(video, plan.args), limits)
        except UserError as error:
            raise UserError(f"valid_prompts: {name_of(video)}: {error}") from error


def encode_texts(plan: PromptPlan, settings: EngineSettings, device: torch.device) -> Texts:
    """Return the embeddings of all texts, for a run on precomputed embeddings.

    The first process loads the text encoder and drops it again. The random state is not changed.

    Raises:
        UserError: the text encoder cannot be loaded.
    """

    def encode() -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        engine = build_engine(settings, ("conditioner",), device)
        try:
            with memory_guard("the text encoder"):
                return {texts: embedded_texts(engine, *texts) for texts in plan.texts}
        finally:
            engine.release("conditioner")

    with random_state.kept(device):
        return from_first_process(encode, "the texts of valid_prompts")


# ---------------------------------------------------------------- while training


class Interrupted(Exception):
    """Signal that the run should stop, so that the video is abandoned."""


@dataclass(frozen=True)
class Outcome:
    """The result of a video on one process.

    Args:
        made: whether the video was made; set on one of the processes that made it.
        files: the resulting video files by name, with the details for `MetricsWriter.write_video`.
        failure: the reason if the video was not made, in one line.
        stopped: whether the run should stop.
    """

    made: bool = False
    files: tuple[tuple[str, Path, dict[str, Any]], ...] = ()
    failure: str | None = None
    stopped: bool = False


class PromptVideos:
    """Makes the videos of `valid_prompts`.

    Processes work on different prompts at the same time. Processes that need each other inside the network (`together`,
    or as `groups` say) make each video together.

    Args:
        engine: engine of the run, with its network in DeepSpeed's engine.
        folder: folder of the run.
        groups: groups of processes that share a clip or the network.
        together: the network is divided over all processes, as with ZeRO-3.
        texts: see `encode_texts`.
        only_latents: save latents, and decode nothing.
        name: name of the model, for the metadata of latents.
        advice: returns what to do when memory is full; see `memory_guard`.
    """

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        plan: PromptPlan,
        folder: Path,
        groups: VideoGroups,
        *,
        together: bool,
        texts: Texts,
        only_latents: bool,
        name: str,
        advice: Callable[[str], str],
    ):
        self.engine, self.plan, self.folder = engine, plan, folder
        self.texts, self.only_latents, self.name, self.advice = texts, only_latents, name, advice
        together = together and dist.get_world_size() > 1
        self.shared = together or groups.size > 1
        self.number, self.at_once = (0, 1) if together else (groups.video, groups.videos)
        self.writes = dist.get_rank() == 0 if together else groups.first
        self.from_first = None
        if self.shared:
            group = None if together else groups.group
            self.from_first = partial(made_by_first, leads=self.writes, group=group)
        shares = groups.size if groups.splits_work else None
        self.settings = SessionSettings.from_args(
            engine.settings,
            model_parallel_size=engine.settings.model_parallel_size or 1,
            processes_per_video=shares,
            sequence_parallel=shares,
        )

    def make(self, step: int, writer: MetricsWriter | None, stopping: Callable[[], bool]) -> None:
        """Make the videos of a step; all processes call this.

        Failures are logged as warnings. The network's mode, all random generators and the parts of the engine are
        restored.

        Args:
            writer: shows the videos; on one process.
            stopping: returns whether the run should stop; then, remaining videos are skipped.
        """
        count, made = len(self.plan.videos), 0
        with ExitStack() as stack:
            stack.enter_context(process_watch.phase("making the videos of valid_prompts"))
            stack.enter_context(random_state.kept(self.engine.device))
            stack.enter_context(evaluating(self.engine))
            if self.engine.compiled:  # graphs of other sizes would make those of training dynamic
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            session = stack.enter_context(BorrowedSession(self.engine, self.settings, self.texts, self.from_first))
            for first in range(0, count, self.at_once):
                outcome = Outcome(stopped=stopping())
                if first + self.number < count:
                    outcome = self._attempt(session, self.plan.videos[first + self.number], step, stopping)
                outcomes = self._outcomes(outcome)
                made += sum(each.made for each in outcomes)
                tell(step, outcomes, writer)
                if any(each.stopped for each in outcomes):
                    if made < count:
                        logger.info("step %d: valid_prompts: the run stops, after %d of %d videos", step, made, count)
                    break
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs blocks of other sizes
        if made:
            folder = self.folder / VIDEOS / str(step)
            logger.info("step %d: valid_prompts: %d of %d videos are in %s", step, made, count, folder)

    def _outcomes(self, own: Outcome) -> list[Outcome]:
        """Return the outcomes of all processes, after waiting for them."""
        meet("the videos of valid_prompts")
        outcomes = [own] * dist.get_world_size()
        dist.all_gather_object(outcomes, own)
        return outcomes

    def _attempt(
        self, session: BorrowedSession, video: PlannedVideo, step: int, stopping: Callable[[], bool]
    ) -> Outcome:
        """Make a video; return its outcome.

        A failure that other processes inside the network do not see is raised.
        """
        failure, files = None, []
        try:
            with memory_guard("evaluation", self.advice):
                files = self._make(session, video, step, stopping)
        except Interrupted:
            return Outcome(stopped=True)
        except Exception as error:
            full = is_out_of_memory(error)
            if self.shared and (full or not isinstance(error, UserError)):
                raise
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failure = f"{name_of(video)}: {kind}{describe(error)}"
        if failure is None:
            return Outcome(self.writes, tuple(files), stopped=stopping())
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()  # tensors of the failed video are no longer referenced
        return Outcome(failure=failure if self.writes else None, stopped=stopping())

    def _make(
        self, session: BorrowedSession, video: PlannedVideo, step: int, stopping: Callable[[], bool]
    ) -> list[tuple[str, Path, dict[str, Any]]]:
        """Return the files of a video, on the process that writes them."""
        request = sample_request(video, self.plan.args)
        with closing(session.sample(request)) as events:
            try:
                return self._write(video, request, self._going_on(events, stopping), step)
            finally:
                if self.shared and not self.only_latents:
                    for _ in events:  # the others wait for this process, even if the file could not be written
                        pass

    def _going_on(self, events: Iterator[SampleEvent], stopping: Callable[[], bool]) -> Iterator[SampleEvent]:
        """Yield events until the run should stop; a video that processes share is finished."""
        for event in events:
            yield event
            if not self.shared and stopping():
                raise Interrupted

    def _write(
        self, video: PlannedVideo, request: SampleRequest, events: Iterator[SampleEvent], step: int
    ) -> list[tuple[str, Path, dict[str, Any]]]:
        """Write the files of a request's events; return them, on the process that writes them."""
        latents = next(event.latents for event in events if isinstance(event, Latents))
        number, text = video.request.index, video.request.text
        stem = self.folder / VIDEOS / str(step) / video.path.name
        if self.only_latents:
            path = stem.with_name(f"{stem.name}.safetensors")
            if self.writes:
                save_latents(path, latents[0], latents_metadata(self.engine, self.name, text, video.fps))
            return []
        if not self.writes:
            for _ in events:
                pass
            return []
        given = given_frames(request, ModelLimits.from_config(self.plan.args.model_config))
        path = stem.with_name(f"{stem.name}.mp4")
        files: list[tuple[str, Path, dict[str, Any]]] = [(f"{VIDEOS}/{number}", path, {"prompt": text})]
        beside = None
        if given is not None:
            beside = self.folder / COMPARISONS / str(step) / f"prompt_{path.name}"
            details = {"prompt": text, "shows": [given.kind, "sample"]}
            files.append((f"{COMPARISONS}/prompt_{number}", beside, details))
        with video_files(path, beside, given, video) as write:
            for event in events:
                if isinstance(event, Frames):
                    write(event.frames)
        return files


def name_of(video: PlannedVideo) -> str:
    """Return the name in the log: the number of the prompt, from 1, and its beginning."""
    return f"prompt {video.request.index + 1} ('{video.request.text:.60}')"


@contextmanager
def video_files(
    path: Path, beside: Path | None, given: GivenFrames | None, video: PlannedVideo
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that appends frames (t, 3, height, width) to a video's files.

    These are the video itself, and the video beside its inputs.
    """
    (height, width), shown = video.size, 0
    with ExitStack() as stack:
        sample = stack.enter_context(VideoWriter(path, video.fps, height, width))
        comparison = None
        if beside is not None:
            comparison = stack.enter_context(VideoWriter(beside, video.fps, height, 2 * width))

        def write(frames: Tensor) -> None:
            nonlocal shown
            pixels = pixels_of(frames, f"{path}: ")
            sample.write_pixels(pixels)
            if comparison is not None and given is not None:
                panels = (given.frames(shown, len(pixels)), pixels)
                comparison.write_pixels(torch.cat(panels, dim=2))
            shown += len(pixels)

        yield write


def tell(step: int, outcomes: list[Outcome], writer: MetricsWriter | None) -> None:
    """Log failures, and show written videos."""
    for outcome in outcomes:
        if outcome.failure is not None:
            logger.warning("step %d: valid_prompts: left out: %s", step, outcome.failure)
        if writer is not None:
            for name, path, details in outcome.files:
                writer.write_video(step, name, path, details)

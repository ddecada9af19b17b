"""The evaluations of a fine-tuning run: validation loss, samples, videos of prompts."""

import logging
from collections.abc import Callable
from pathlib import Path

from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.runs.clips import share_timeouts
from cogvideox_sat.runs.data import ValidationData
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.sampling.record_making import model_name
from cogvideox_sat.training import validation
from cogvideox_sat.training.prompt_videos import PromptVideos
from diffusion_video import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


class Evaluations:
    """Evaluates a run, on all processes together.

    Args:
        data: validation clips; None: none.
        prompts: makes the videos of `valid_prompts`; None: none.
        folder: folder of the run.
        writer: writer of the run's metrics, on one process.
    """

    def __init__(
        self,
        args: TrainingArguments,
        engine: SATVideoDiffusionEngine,
        data: ValidationData | None,
        prompts: PromptVideos | None,
        folder: Path,
        writer: MetricsWriter | None,
    ):
        self.args, self.engine, self.data, self.prompts = args, engine, data, prompts
        self.folder, self.writer = folder, writer

    def begin(self, stopping: Callable[[], bool]) -> None:
        """Make the videos of `valid_prompts` before the first step.

        Args:
            stopping: returns whether the run should stop.
        """
        if self.prompts is not None:
            self.prompts.make(0, self.writer, stopping)

    def evaluate(self, step: int, stopping: Callable[[], bool]) -> None:
        """Compute the validation loss, and make the videos of captions and of `valid_prompts`."""
        with process_watch.phase("evaluating"):
            if self.data is not None:
                self._validate(step, self.data)
            if self.prompts is not None:
                self.prompts.make(step, self.writer, stopping)

    def _validate(self, step: int, data: ValidationData) -> None:
        args = self.args
        data.loader.step = step
        loss = validation.validation_loss(self.engine, data.loader)
        logger.info("step %d: validation loss %.6f", step, loss)
        if self.writer:
            self.writer.write(step, {"validation_loss": loss})
        validation.save_samples(
            self.engine,
            data.dataset,
            self.folder,
            step,
            count=args.num_log_videos,
            seed=args.seed,
            fps=args.sampling_fps,
            only_latents=args.only_log_video_latents,
            num_steps=args.sampling_num_steps,
            writer=self.writer,
            name=model_name(args),
            clip_timeout=args.clip_timeout,
            timeouts=data.timeouts,
            share=share_timeouts,
        )

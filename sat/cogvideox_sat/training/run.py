"""One fine-tuning run: its assembly and its loop.

It is the part of `train_video.py` that needs PyTorch.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.configuration.determinism import deterministic_arithmetic
from cogvideox_sat.configuration.memory_advice import training_advice
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.model_section import has_adapter
from cogvideox_sat.configuration.settings import DataSettings, EngineSettings, LoopSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments, saves_all
from cogvideox_sat.configuration.video_layout import VideoLayout
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.files.training_state import STATE_ERRORS, taken_from
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import (
    flags_of_any_process,
    from_first_process,
    limit_collectives,
    limited_collectives,
    meet,
)
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.parallel.video_groups import video_groups
from cogvideox_sat.runs.background_writing import settled_at_the_end
from cogvideox_sat.runs.data import StepShare, open_training_data, open_validation_data
from cogvideox_sat.runs.folders import new_run_folder, open_run_folder, removed_if_empty
from cogvideox_sat.runs.progress import format_values, progress_bar
from cogvideox_sat.runs.retention import last_saved
from cogvideox_sat.runs.schedule import Schedule
from cogvideox_sat.runs.skipped_steps import SkippedSteps
from cogvideox_sat.runs.step_clock import StepClock, peak_memory
from cogvideox_sat.runs.stop_signals import stop_requests
from cogvideox_sat.sampling.borrowed_session import Texts
from cogvideox_sat.sampling.record_making import model_name
from cogvideox_sat.training import deepspeed_engine, prompt_videos
from cogvideox_sat.training.checkpoint_reading import read_state
from cogvideox_sat.training.checkpoint_saver import CheckpointSaver
from cogvideox_sat.training.deepspeed_adapter import current_scale, inner_optimizer, step_was_skipped
from cogvideox_sat.training.engine_loading import load_engine
from cogvideox_sat.training.evaluations import Evaluations
from cogvideox_sat.training.optimizer_state import check_storable
from cogvideox_sat.training.parameter_report import report
from cogvideox_sat.training.plan import STATE_FILE, TrainingPlan
from cogvideox_sat.training.run_state import restore, run_state
from sgm import randomness
from sgm.context_parallel import all_reduce_sum
from sgm.memory_errors import memory_guard
from sgm.modules.diffusionmodules.sampling_bar import hide_bar

logger = logging.getLogger(__name__)


def run(args: TrainingArguments, plan: TrainingPlan) -> int:
    """Train as planned; return the exit code.

    Raises:
        UserError: the device, the data, a checkpoint or DeepSpeed cannot be used.
    """
    initialize_process_groups(args.model_parallel_size, args.collective_timeout)
    try:
        with (
            failing_together(),
            limited_collectives(args.collective_timeout),
            deterministic_arithmetic(args.deterministic),
        ):
            Trainer(args, plan).train()
        return 0
    finally:
        destroy_process_groups()


class Trainer:
    """All parts of a run, and the loop over its steps.

    A step is one update of the weights; it takes `gradient_accumulation_steps` micro-batches on every data-parallel
    process. All random numbers of a sample follow from the seed of the run, the epoch and the sample's index.
    """

    def __init__(self, args: TrainingArguments, plan: TrainingPlan):
        self.device = choose_device(args.device)
        self.args = args = settle_precision(args, self.device)
        self.settings = LoopSettings.from_args(args)
        self.schedule = Schedule(self.settings)
        self.groups = video_groups(VideoLayout(sequence=args.sequence_parallel_size))
        self.leads = dist.get_rank() == 0
        self.batch, self.cached, self.prompts = plan.batch, plan.cached, plan.prompts
        self._check_before_reading()
        resume = from_first_process(lambda: plan.resume)
        state = read_state(resume) if resume else None
        self.step = state["step"] if state else 0
        self.run_folder = resume.parent if resume else self._new_run_folder()
        torch.manual_seed(args.seed)  # all processes initialise the same values
        with removed_if_empty(self.run_folder):
            self._load_data(state)
            self._load_engine(resume)
            self._make_optimizer()
        limit_collectives(args.collective_timeout)
        self._set_counters(state)
        if state:
            restore(self.network, resume, state, self.device)
        self.untried = resume / STATE_FILE if state else None  # the restored values have not been used in a step yet
        self._open_outputs()

    # Assembly

    def _check_before_reading(self) -> None:
        """Check the model and the inputs of `valid_prompts`, before clips and weights are read."""
        parts = ("model",) if self.cached and not self.prompts else PARTS
        check_model(EngineSettings.from_args(self.args), parts, self.args.sampling_num_steps)
        if self.prompts:
            from_first_process(partial(prompt_videos.check_inputs, self.prompts), "the inputs of valid_prompts")

    def _new_run_folder(self) -> Path:
        return from_first_process(lambda: new_run_folder(self.settings, datetime.now()))

    def _load_data(self, state: dict[str, Any] | None) -> None:
        settings = DataSettings.from_args(self.args)
        share = StepShare(
            self.batch.micro,
            self.batch.accumulation,
            self.groups.video,
            self.groups.videos,
        )
        self.data = open_training_data(self.run_folder, settings, share, self.settings.train_iters, state, logger)
        self.consumed = 0  # number of micro-batches since the order was created
        self.batches = iter(self.data.loader)
        self.validation = None
        if settings.valid_data and self.settings.eval_interval:
            self.validation = open_validation_data(self.run_folder, settings, share)

    def _load_engine(self, resume: Path | None) -> None:
        """Load the model; encode the texts of `valid_prompts` if the model cannot."""
        args = self.args
        with self.memory_guard("loading the model"), process_watch.phase("loading the model"):
            self.texts: Texts = {}
            if self.prompts and self.cached:  # the conditioner for caches encodes no texts
                self.texts = prompt_videos.encode_texts(self.prompts, EngineSettings.from_args(args), self.device)
            self.engine = load_engine(args, self.device, self.groups, cached=self.cached, resume=resume)
        hide_bar(self.engine.sampler)
        self.engine.disable_untrainable_params()
        self.engine.model.train()
        for line in report(self.engine, args, self.data.dataset):
            logger.info("%s", line)

    def _evaluations(self) -> Evaluations:
        prompts = None
        if self.prompts:
            prompts = prompt_videos.PromptVideos(
                self.engine,
                self.prompts,
                self.run_folder,
                self.groups,
                together=self.args.deepspeed_config["zero_optimization"]["stage"] == 3,
                texts=self.texts,
                only_latents=self.args.only_log_video_latents,
                name=model_name(self.args),
                advice=self.advice,
            )
        return Evaluations(self.args, self.engine, self.validation, prompts, self.run_folder, self.writer)

    def _make_optimizer(self) -> None:
        """Put the network into DeepSpeed's engine, which creates the optimizer."""
        with self.memory_guard("making the optimizer"):
            meet("the model to be loaded")
            self.network = deepspeed_engine.initialize(
                self.engine.model,
                self.args.deepspeed_config,
                self.settings,
                self.engine.dtype,
                self.args.sequence_parallel_size,
            )
        self.engine.model = self.network

    def _set_counters(self, state: Mapping[str, Any] | None) -> None:
        """Start counting losses and skipped steps, or continue from the state of a checkpoint."""
        self.losses = torch.zeros(2, device=self.device)  # sum and number since the last line of the log
        if state:
            self.losses += torch.tensor(state["losses"], device=self.device)
        skipped, limit = state["skipped"] if state else None, self.settings.max_skipped_steps
        self.skipped = SkippedSteps(limit, "the learning rate", logger, skipped)

    def _open_outputs(self) -> None:
        """Open what the loop writes to: checkpoints, metrics and evaluations."""
        self.saver = CheckpointSaver(
            self.run_folder,
            self.network,
            full=saves_all(self.args),
            keep_last=self.settings.keep_last,
            background=self.settings.background_checkpoints,
        )
        self.clock = StepClock()
        self.writer = None
        if self.leads:
            reader = None if self.cached else self.data.reader
            self.writer = open_run_folder(self.run_folder, self.settings, reader, self.step)
        self.evaluations = self._evaluations()

    # The loop

    def train(self) -> None:
        """Run steps until `train_iters` or a signal, and then write a checkpoint."""
        first = self.step + 1
        bar = progress_bar(self.settings.train_iters, self.step, disabled=not self.leads)
        ending = settled_at_the_end(self.saver.settle)
        with stop_requests() as signals, bar, logging_redirect_tqdm(), ending:
            if self.step == 0:
                self._evaluate(signals)
            while not self.schedule.is_last(self.step):
                with self.memory_guard("training"):
                    self.train_step()
                self.step += 1
                bar.update()
                if self.step == first:
                    check_storable(self.network)
                if self.schedule.logs(self.step):
                    self.log(bar)
                if self.schedule.evaluates(self.step):
                    self._evaluate(signals)
                if self._save_if_due(signals):
                    break
        if self.writer:
            self.writer.close()
            argument = "--lora_load" if has_adapter(self.args.model_config) else "--load"
            logger.info("the run is in %s; to sample with it, add %s %s", self.run_folder, argument, self.run_folder)

    def _evaluate(self, signals: Sequence[int]) -> None:
        """Evaluate; before the first step, only make the videos of `valid_prompts`."""
        with self.clock.paused(), self.memory_guard("evaluation"):
            if self.step == 0:
                self.evaluations.begin(lambda: bool(signals))
            else:
                self.evaluations.evaluate(self.step, lambda: bool(signals))

    def _save_if_due(self, signals: Sequence[int]) -> bool:
        """Write a checkpoint if it is due; return whether a signal ends the run.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        stopped, failed = flags_of_any_process(bool(signals), self.saver.failed)
        if failed:
            self.saver.finish()  # raises the error
        if stopped or self.schedule.saves(self.step):
            with self.clock.paused(), self.memory_guard("saving a checkpoint"):
                self.save(wait=stopped or self.schedule.is_last(self.step))
        if stopped:
            logger.info("stopped after step %d, which is saved; continue with --resume latest", self.step)
        return stopped

    def memory_guard(self, where: str) -> AbstractContextManager[None]:
        """Return a `memory_guard` with the run's advice."""
        return memory_guard(where, self.advice)

    def advice(self, where: str) -> str:
        """Return advice for full memory, depending on the setup and on saved checkpoints."""
        return training_advice(self.args, self.cached, last_saved(self.run_folder))(where)

    def train_step(self) -> None:
        """Make one update of the weights, unless the gradients are not finite."""
        self.learning_rate = inner_optimizer(self.network).param_groups[0]["lr"]
        losses = torch.zeros_like(self.losses[0])
        for _ in range(self.batch.accumulation):
            with self.clock.waiting():
                batch = next(self.batches)
            self.consumed += 1
            process_watch.begin(f"step {self.step + 1}", limited=True)
            self.data.unreadable.add(chain.from_iterable(batch["unreadable"]))
            with randomness.per_sample(batch["seed"]):
                loss, _ = self.engine.shared_step(batch)
            self.network.backward(loss)
            with taken_from(self.untried, STATE_ERRORS) if self.untried else nullcontext():
                self.network.step()
            losses += loss.detach() / self.batch.accumulation
        self.untried = None
        self.clock.step(self.batch.total)
        if step_was_skipped(self.network):
            self.skipped.left_out(self.step + 1, finite_loss=bool(torch.isfinite(losses)))
        else:
            self.skipped.made()
            self.losses += torch.stack((losses, torch.ones_like(losses)))

    # Between the steps

    def log(self, bar: Any) -> None:
        """Write the mean loss since the last line, over all processes, and other metrics."""
        sums = torch.cat((self.losses, self.losses.new_tensor([self.data.unreadable.found])))
        total, count, found = all_reduce_sum(sums, self.groups.peers).tolist()
        self.losses.zero_()
        values = {
            "loss": total / count if count else float("nan"),
            "lr": self.learning_rate,
            "grad_norm": float(self.network.get_global_grad_norm() or 0.0),
            "skipped_steps": self.skipped.in_all,
            "unreadable_clips": self.data.unreadable.check(int(found)),
            "peak_memory_gib": peak_memory(self.device),
            **self.clock.rates(),
        }
        if self.engine.dtype == torch.float16:
            values["loss_scale"] = current_scale(self.network)
        bar.show(values)
        logger.info("step %d: %s", self.step, format_values(values))
        if self.writer:
            self.writer.write(self.step, values)

    def save(self, wait: bool) -> None:
        """Write a checkpoint; with `wait`, return when it is written."""
        losses = all_reduce_sum(self.losses.clone(), self.groups.peers)
        state = run_state(
            self.network,
            self.device,
            data=self.data.order.state(self.consumed),
            losses=(losses / self.groups.videos).tolist(),
            skipped=self.skipped.state(),
            reader=self.data.reader,
        )
        self.saver.save(self.step, state, wait=wait)

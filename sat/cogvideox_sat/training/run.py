"""One fine-tuning run: its assembly, and the loop. What `train_video.py` does once PyTorch is needed."""

import logging
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sat import mpu
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.clips.batch_order import BatchOrder
from cogvideox_sat.clips.latent_identity import conditioner_for_cache
from cogvideox_sat.clips.loader import ClipLoader
from cogvideox_sat.clips.reader_record import KEY, warn_of_other_reader, with_backend
from cogvideox_sat.clips.validation_clips import ValidationLoader
from cogvideox_sat.configuration.determinism import deterministic_arithmetic
from cogvideox_sat.configuration.memory_advice import training_advice
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.engine_choice import build_engine
from cogvideox_sat.files.training_state import STATE_ERRORS, taken_from
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import (
    any_process,
    from_first_process,
    limit_collectives,
    limited_collectives,
    meet,
)
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups, parallel_groups
from cogvideox_sat.runs import random_state
from cogvideox_sat.runs.clips import UnreadableClips, describe_data, open_clips, share_timeouts
from cogvideox_sat.runs.folders import new_run_folder, removed_if_empty, write_config
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.runs.progress import format_values, progress_bar
from cogvideox_sat.runs.step_clock import StepClock, peak_memory
from cogvideox_sat.runs.stop_signals import stop_requests
from cogvideox_sat.sampling.record_making import model_name
from cogvideox_sat.training import deepspeed_engine, validation
from cogvideox_sat.training.checkpoint import read_state, restore_optimizer, save_checkpoint
from cogvideox_sat.training.deepspeed_adapter import current_scale, inner_optimizer, step_was_skipped
from cogvideox_sat.training.optimizer_state import check_storable
from cogvideox_sat.training.parameter_report import report
from cogvideox_sat.training.plan import STATE_FILE, TrainingPlan
from data_video import make_dataset
from diffusion_video import PARTS
from sgm import randomness
from sgm.context_parallel import all_reduce_sum, group_size
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.modules.diffusionmodules.sampling_bar import hide_bar

logger = logging.getLogger("train_video")


def run(args: TrainingArguments, plan: TrainingPlan) -> int:
    """Train as planned; the exit code.

    Raises:
        UserError: the device, the data, a checkpoint or DeepSpeed stands in the way.
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
    """Everything a run consists of, and the loop over its steps.

    A step is one update of the weights; it takes `gradient_accumulation_steps` micro-batches on every data-parallel
    process. All random numbers of a sample follow from the seed of the run, the epoch and the sample's index.
    """

    def __init__(self, args: TrainingArguments, plan: TrainingPlan):
        self.device = choose_device(args.device)
        self.args = args = settle_precision(args, self.device)
        self.leads = dist.get_rank() == 0
        self.batch, self.cached = plan.batch, plan.cached
        check_model(args, ("model",) if plan.cached else PARTS)  # before clips and weights are read
        resume = from_first_process(lambda: plan.resume)
        state = read_state(resume) if resume else None
        self.run_folder = resume.parent if resume else from_first_process(lambda: new_run_folder(args, datetime.now()))
        self.step = state["step"] if state else 0
        torch.manual_seed(args.seed)  # for what is initialised, the same on all processes
        with removed_if_empty(self.run_folder):
            self._load_data(state)
            with self.memory_guard("loading the model"), process_watch.phase("loading the model"):
                self._build_engine(resume, plan.cached)
            with self.memory_guard("making the optimizer"):
                meet("the model to be loaded")
                self.network = deepspeed_engine.initialize(self.engine.model, args, self.engine.dtype)
        limit_collectives(args.collective_timeout)
        self.engine.model = self.network
        self.untried = resume / STATE_FILE if state else None  # whose values the optimizer has made no step with yet
        if state:
            optimizer = type(inner_optimizer(self.network)).__name__
            if state["optimizer_type"] != optimizer:
                raise UserError(f"resume: {resume} was trained with {state['optimizer_type']}, not with {optimizer}")
            restore_optimizer(self.network, resume, state)
            with taken_from(resume / STATE_FILE):
                self.network.lr_scheduler.load_state_dict(state["schedule"])
                if len(state["random"]) == dist.get_world_size():
                    random_state.restore(state["random"][dist.get_rank()], self.device)

        self.clock = StepClock()
        self.losses = torch.zeros(2, device=self.device)  # since the last line of the log: their sum and number
        self.skipped = {"in a row": 0, "in all": 0}
        if state:
            self.losses += torch.tensor(state["losses"], device=self.device)
            self.skipped = state["skipped"]
        self._open_run_folder()

    # Assembly

    def _load_data(self, state: dict[str, Any] | None) -> None:
        args = self.args
        # Whether too many clips are unreadable is decided here, where there is a folder to list them in.
        training_args = replace(args, max_unreadable_share=1.0)
        self.dataset, timeouts = open_clips(
            self.run_folder,
            "train_data",
            lambda: make_dataset(
                args.train_data,
                args.data_config,
                training_args,
                repeats=args.train_data_repeats,
                weights=args.train_data_weights,
            ),
        )
        self.unreadable = UnreadableClips(self.run_folder, self.dataset, args.max_unreadable_share)
        self.unreadable.check(0)
        self.reader = getattr(self.dataset, "reader", None)
        if state:
            warn_of_other_reader("resume", state, self.reader)
        logger.info("train_data: %s", describe_data(self.dataset, args.train_iters * self.batch.total))
        self.order = BatchOrder(
            [self.dataset.bucket(index) for index in range(len(self.dataset))],
            self.batch.micro,
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
            args.seed,
            state=state["data"] if state else None,
            locality=getattr(self.dataset, "locality", None),
            draws=getattr(self.dataset, "draws", None),
        )
        self.consumed = 0  # micro-batches since the order was made
        first = self.step + 1
        loader = ClipLoader(
            self.dataset,
            self.order,
            args.num_workers,
            args.clip_timeout,
            timeouts,
            step_of=lambda number: first + number // self.batch.accumulation,
            share=share_timeouts,
        )
        self.batches = iter(loader)
        self.validation_data = self.validation_batches = None
        if args.valid_data and args.eval_interval:
            self.validation_data, self.validation_timeouts = open_clips(
                self.run_folder,
                "valid_data",
                lambda: make_dataset(
                    args.valid_data, args.data_config, args, random_start=False, argument="valid_data"
                ),
                repeats=True,
            )
            self.validation_batches = ValidationLoader(
                self.validation_data,
                batches=args.eval_iters,
                batch_size=args.eval_batch_size,
                seed=args.seed,
                rank=mpu.get_data_parallel_rank(),
                world_size=mpu.get_data_parallel_world_size(),
                num_workers=min(args.num_workers, 1),
                clip_timeout=args.clip_timeout,
                timeouts=self.validation_timeouts,
                share=share_timeouts,
            )

    def _build_engine(self, resume: Path | None, cached: bool) -> None:
        args, model = self.args, deepcopy(self.args.model_config)
        params = model["network_config"]["params"]
        if args.checkpoint_activations is not None:
            params["transformer_args"]["checkpoint_activations"] = args.checkpoint_activations
        self.has_adapter = "lora_config" in params["modules"]
        parts = ("conditioner", "model") if cached else ("conditioner", "first_stage_model", "model")
        if cached:
            model["conditioner_config"] = conditioner_for_cache(model["conditioner_config"])
        weights = {"load": args.load, "lora_load": args.lora_load}
        if resume:  # what was trained lies there, the rest where it lay at first
            weights["lora_load" if self.has_adapter else "load"] = resume
        engine_args = Namespace(
            **{**vars(args), **weights},
            new_adapter=True,
            force_inference=args.force_train,
        )
        engine_args.model_config = model
        self.engine = build_engine(engine_args, parts, self.device)
        hide_bar(self.engine.sampler)
        self.engine.disable_untrainable_params()
        self.engine.model.train()
        for line in report(self.engine, args, self.dataset):
            logger.info("%s", line)

    def _open_run_folder(self) -> None:
        self.writer = None
        if not self.leads:
            return
        self.run_folder.mkdir(parents=True, exist_ok=True)
        args = self.args
        config = with_backend(args.merged_config, None if self.cached else self.reader)
        write_config(self.run_folder, config)
        self.writer = MetricsWriter(
            self.run_folder,
            tensorboard=args.tensorboard,
            wandb=args.wandb,
            wandb_project=args.wandb_project,
            name=self.run_folder.name,
            config=config,
            start_step=self.step,
        )

    # The loop

    def train(self) -> None:
        """Step until `train_iters` or a signal; the checkpoint is then written."""
        args, first = self.args, self.step + 1
        bar = progress_bar(args.train_iters, self.step, disabled=not self.leads)
        with stop_requests() as signals, bar, logging_redirect_tqdm():
            while self.step < args.train_iters:
                with self.memory_guard("training"):
                    self.train_step()
                self.step += 1
                bar.update()
                if self.step == first:
                    check_storable(self.network)
                if self.is_due(args.log_interval):
                    self.log(bar)
                if self.validation_batches and self.is_due(args.eval_interval):
                    with self.clock.paused(), self.memory_guard("evaluation"):
                        self.evaluate()
                stopped = any_process(bool(signals))
                if stopped or self.is_due(args.save_interval):
                    with self.clock.paused(), self.memory_guard("saving a checkpoint"):
                        self.save()
                if stopped:
                    logger.info("stopped after step %d, which is saved: go on with --resume latest", self.step)
                    break
        if self.writer:
            self.writer.close()
            argument = "--lora_load" if self.has_adapter else "--load"
            logger.info("the run is in %s; to sample with it, give it to inference.sh as %s", self.run_folder, argument)

    def memory_guard(self, where: str) -> AbstractContextManager[None]:
        """Return a `memory_guard` whose advice knows how the run is set up, and from where it can resume."""
        saved = self.run_folder if (self.run_folder / "latest").exists() else None
        return memory_guard(where, training_advice(self.args, self.cached, saved))

    def is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.args.train_iters

    def train_step(self) -> None:
        """One update of the weights, unless the gradients are not finite."""
        self.learning_rate = inner_optimizer(self.network).param_groups[0]["lr"]
        losses = torch.zeros_like(self.losses[0])
        for _ in range(self.batch.accumulation):
            with self.clock.waiting():
                batch = next(self.batches)
            self.consumed += 1
            process_watch.begin(f"step {self.step + 1}", limited=True)
            self.unreadable.add(chain.from_iterable(batch["unreadable"]))
            with randomness.per_sample(batch["seed"]):
                loss, _ = self.engine.shared_step(batch)
            self.network.backward(loss)
            with taken_from(self.untried, STATE_ERRORS) if self.untried else nullcontext():
                self.network.step()
            losses += loss.detach() / self.batch.accumulation
        self.untried = None
        self.clock.step(self.batch.total)
        if step_was_skipped(self.network):
            self.count_skipped(losses)
        else:
            self.skipped["in a row"] = 0
            self.losses += torch.stack((losses, torch.ones_like(losses)))

    def count_skipped(self, loss: Tensor) -> None:
        """Tell of a step that was left out; raises UserError when there were too many in a row."""
        for count in self.skipped:
            self.skipped[count] += 1
        what = "gradients are" if torch.isfinite(loss) else "loss is"
        logger.warning(
            "step %d is left out: the %s not finite (%d in a row, %d in all)",
            self.step + 1,
            what,
            self.skipped["in a row"],
            self.skipped["in all"],
        )
        if self.skipped["in a row"] >= self.args.max_skipped_steps:
            raise UserError(
                f"{self.skipped['in a row']} steps in a row had no finite loss and gradients: lower the learning rate, "
                "or train in bf16 or float32; the last checkpoint is as it was"
            )

    # Beside the steps

    def log(self, bar: Any) -> None:
        """Write the mean loss since the last line, over all processes, and how the run goes."""
        sums = torch.cat((self.losses, self.losses.new_tensor([self.unreadable.found])))
        total, count, found = all_reduce_sum(sums, parallel_groups()[1]).tolist()
        self.losses.zero_()
        values = {
            "loss": total / count if count else float("nan"),
            "lr": self.learning_rate,
            "grad_norm": float(self.network.get_global_grad_norm() or 0.0),
            "skipped_steps": self.skipped["in all"],
            "unreadable_clips": self.unreadable.check(int(found)),
            "peak_memory_gib": peak_memory(self.device),
            **self.clock.rates(),
        }
        if self.engine.dtype == torch.float16:
            values["loss_scale"] = current_scale(self.network)
        bar.show(values)
        logger.info("step %d: %s", self.step, format_values(values))
        if self.writer:
            self.writer.write(self.step, values)

    def evaluate(self) -> None:
        """Validation loss, and videos sampled from validation captions."""
        args = self.args
        self.validation_batches.step = self.step
        loss = validation.validation_loss(self.engine, self.validation_batches)
        logger.info("step %d: validation loss %.6f", self.step, loss)
        if self.writer:
            self.writer.write(self.step, {"validation_loss": loss})
        validation.save_samples(
            self.engine,
            self.validation_data,
            self.run_folder,
            self.step,
            count=args.num_log_videos,
            seed=args.seed,
            fps=args.sampling_fps,
            only_latents=args.only_log_video_latents,
            num_steps=args.sampling_num_steps,
            writer=self.writer,
            name=model_name(args),
            clip_timeout=args.clip_timeout,
            timeouts=self.validation_timeouts,
            share=share_timeouts,
        )

    def save(self) -> None:
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, random_state.capture(self.device))
        losses = all_reduce_sum(self.losses.clone(), parallel_groups()[1])
        state = {
            "optimizer_type": type(inner_optimizer(self.network)).__name__,
            "data": self.order.state(self.consumed),
            "schedule": self.network.lr_scheduler.state_dict(),
            "random": states,
            "losses": (losses / group_size(parallel_groups()[1])).tolist(),
            "skipped": self.skipped,
            KEY: self.reader,
        }
        folder = save_checkpoint(
            self.run_folder,
            self.step,
            self.network,
            state,
            full=self.args.save_full or not self.has_adapter,
            keep_last=self.args.keep_last,
        )
        logger.info("step %d: wrote %s", self.step, folder)

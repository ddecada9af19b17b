"""Checkpoints of a training run: complete or not there at all, for any number of processes.

    {run}/latest                                      the name of the newest iteration
    {run}/{iteration}/mp_rank_00_model_states.pt      weights, as SwissArmyTransformer and `load:` take them
    {run}/{iteration}-ema/mp_rank_00_model_states.pt  their moving average, if the optimizer keeps one
    {run}/{iteration}/training_state/                 what else a run needs to go on:
        state.json                                    step, position in the data, schedule, loss scale, random states
        optimizer-mp00-00000.safetensors, ...         moments and float32 weights, whole tensors by `kind/parameter`

Everything is written into a hidden folder, synced and renamed; `latest` moves last. A process that is killed at any
moment leaves the previous checkpoint in place.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sat import mpu
from torch import Tensor, nn

from cogvideox_sat.files.training_state import TRAINING_STATE, damaged, find_misfit
from cogvideox_sat.parallel.agreement import meet
from cogvideox_sat.runs.disk_errors import WRITE_ERRORS, cannot_write, check_room
from cogvideox_sat.runs.retention import mark_newest, outdated, remove_unfinished
from cogvideox_sat.training import optimizer_state
from cogvideox_sat.training.deepspeed_adapter import full_shape, is_partitioned
from cogvideox_sat.training.plan import STATE_FILE
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from sgm.errors import UserError
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

SHADOW = "shadow"  # what the optimizer calls its moving average of a weight
SHARD_BYTES = 2 * 2**30


# Writing


def save_checkpoint(
    run_folder: Path,
    step: int,
    engine: deepspeed.DeepSpeedEngine,
    state: dict[str, Any],
    *,
    full: bool,
    keep_last: int | None,
) -> Path:
    """Write the checkpoint of `step`; all processes call it. Returns its folder.

    Args:
        state: what goes into state.json beside the optimizer's numbers; JSON-able, the first process's is taken.
        full: write the whole network, rather than what is trained of it.
        keep_last: how many checkpoints to keep; None: all.

    Raises:
        UserError: the disk is full or cannot be written to; the previous checkpoint is still there. On all processes.
    """
    leads = dist.get_rank() == 0
    folder, ema_folder = run_folder / str(step), run_folder / f"{step}-ema"
    part, ema_part = run_folder / f".{step}.part", run_folder / f".{step}-ema.part"
    has_ema = SHADOW in optimizer_state.tensor_kinds(engine)
    needed = estimated_bytes(engine, full)

    def prepare() -> None:
        remove_unfinished(run_folder)
        check_room(folder, needed)
        (part / STATE_FILE.parent).mkdir(parents=True)
        if has_ema:
            ema_part.mkdir()

    def publish() -> None:
        content = {"step": step, "optimizer": optimizer_state.counters(engine), **state}
        (part / STATE_FILE).write_text(json.dumps(content))
        for source, target in ((ema_part, ema_folder), (part, folder)):
            if source.exists():
                _sync(source)
                if target.exists():
                    shutil.rmtree(target)
                source.rename(target)
        _sync(run_folder)
        mark_newest(run_folder, str(step))
        _sync(run_folder)
        prune(run_folder, step, keep_last)

    _together(prepare if leads else _nothing, folder, needed)
    _together(lambda: _write_weights(part, ema_part if has_ema else None, engine, full), folder, needed)
    _together(publish if leads else _nothing, folder, needed)
    return folder


def _write_weights(part: Path, ema_part: Path | None, engine: deepspeed.DeepSpeedEngine, full: bool) -> None:
    """This process's part of the files. The tensors are put together by all, whether or not they write."""
    writes = mpu.get_data_parallel_rank() == 0
    share = mpu.get_model_parallel_rank()
    file = f"mp_rank_{share:02d}_model_states.pt"
    weights = dict(gathered_weights(engine.module, full, keep=writes))
    shards = _Shards(part / STATE_FILE.parent, f"optimizer-mp{share:02d}")
    if writes:
        shards.attempt(lambda: _save_weights(weights, part / file))
    for kind, name, tensor in optimizer_state.full_tensors(engine):
        if writes:
            tensor = tensor.to("cpu", copy=True)
            shards.add(f"{kind}/{name}", tensor)
            if kind == SHADOW:
                weights[name] = tensor.to(weights[name].dtype)
    shards.close()
    if writes and ema_part is not None:
        _save_weights(weights, ema_part / file)


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    torch.save({"module": {checkpoint_name(name): tensor for name, tensor in weights.items()}}, path)


def checkpoint_name(name: str) -> str:
    """The name of a tensor of the wrapped network in files; the wrapper calls the network `diffusion_model`."""
    return NETWORK_PREFIX + name.removeprefix("diffusion_model.")


def gathered_weights(network: nn.Module, full: bool, keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Trained parameters, or with `full` all entries of the state dict, as copies on the CPU; collective.

    Processes that do not `keep` them only help to put together what ZeRO-3 has partitioned.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not (full or tensor.requires_grad):
            continue
        with deepspeed.zero.GatheredParameters([tensor]) if is_partitioned(tensor) else nullcontext():
            if keep:
                yield name, tensor.detach().to("cpu", copy=True)


class _Shards:
    """Safetensors files of limited size. After an error it takes tensors without writing, since the other processes go
    on putting them together; `close` then raises it."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.count = self.bytes = 0
        self.tensors: dict[str, Tensor] = {}
        self.error: Exception | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        self.bytes += tensor.nbytes
        if self.bytes >= SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        if self.tensors:
            path = self.folder / f"{self.name}-{self.count:05d}.safetensors"
            path.touch()  # with the permissions of all other files; safetensors' own are its owner's alone
            mode = path.stat().st_mode
            self.attempt(lambda: save_file(self.tensors, path))
            self.attempt(lambda: path.chmod(mode))
        self.count, self.bytes, self.tensors = self.count + 1, 0, {}

    def attempt(self, write: Callable[[], Any]) -> None:
        """Write something, unless something could not be written before."""
        try:
            if self.error is None:
                write()
        except WRITE_ERRORS as error:
            self.error = error

    def close(self) -> None:
        self._write()
        if self.error:
            raise self.error


def _nothing() -> None:
    """Do nothing, where the first process writes and this one waits."""


def _together(action: Callable[[], Any], folder: Path, needed: int) -> None:
    """Run an action that may differ between processes; if it fails on one, all raise a UserError."""
    problem = ""
    try:
        action()
    except UserError as error:
        problem = str(error)
    except WRITE_ERRORS as error:
        problem = str(cannot_write(folder, error, needed))
    meet("the checkpoint")
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        if dist.get_rank() == 0:
            remove_unfinished(folder.parent)
        raise UserError(first)


def estimated_bytes(engine: deepspeed.DeepSpeedEngine, full: bool) -> int:
    """Size of a checkpoint, all model-parallel shares together."""
    network = engine.module
    kinds = optimizer_state.tensor_kinds(engine)
    entries = [tensor for tensor in network.state_dict(keep_vars=True).values() if full or tensor.requires_grad]
    weights = sum(full_shape(tensor).numel() * tensor.element_size() for tensor in entries)
    trained = optimizer_state.trained_parameters(network).values()
    state = sum(4 * full_shape(parameter).numel() for parameter in trained) * len(kinds)
    return (weights * (2 if SHADOW in kinds else 1) + state) * mpu.get_model_parallel_world_size()


def prune(run_folder: Path, newest: int, keep_last: int | None) -> None:
    """Delete the checkpoints that are outdated once that of the step `newest` is written."""
    steps = [int(folder.name) for folder in run_folder.iterdir() if re.fullmatch(r"\d+", folder.name)]
    for step in outdated(steps, newest, keep_last):
        for name in (str(step), f"{step}-ema"):
            if (run_folder / name).exists():  # under a name that is no checkpoint's, whenever it is interrupted
                (run_folder / name).rename(run_folder / f".{name}.part")
    remove_unfinished(run_folder)


def _sync(folder: Path) -> None:
    """Make sure that a folder and all in it would survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


# Reading


def read_state(folder: Path) -> dict[str, Any]:
    """The content of state.json in an iteration folder.

    Raises:
        UserError: there is none, and the folder then holds weights alone; or it is none that a run can go on with.
    """
    path = folder / STATE_FILE
    try:
        state = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"resume: {folder} has no whole training state ({STATE_FILE}); to start from its weights name it as load"
        ) from error
    if misfit := find_misfit(state, TRAINING_STATE):
        raise UserError(
            f"resume: {folder} has no whole training state ({STATE_FILE}): {misfit}; to start from its weights name it "
            "as load"
        )
    if folder.name.isdecimal() and int(folder.name) != state["step"]:
        raise UserError(
            f"resume: {folder} holds the training state of step {state['step']}: give the folder that name, or name "
            "another checkpoint"
        )
    shares = state["optimizer"]["model_parallel_size"]
    if shares != mpu.get_model_parallel_world_size():
        raise UserError(
            f"resume: {folder} is of a run with model_parallel_size {shares}, not {mpu.get_model_parallel_world_size()}"
        )
    return state


def restore_optimizer(engine: deepspeed.DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Put the optimizer's part of a checkpoint back.

    Raises:
        UserError: files are missing or damaged.
    """
    optimizer_state.restore(
        engine, StoredTensors(folder / STATE_FILE.parent, mpu.get_model_parallel_rank()), state["optimizer"]
    )


class StoredTensors(Mapping[tuple[str, str], Tensor]):
    """The tensors of the optimizer's files by (kind, parameter), each read when it is asked for."""

    def __init__(self, folder: Path, share: int):
        self.files: dict[tuple[str, str], tuple[Path, Any]] = {}
        for path in sorted(folder.glob(f"optimizer-mp{share:02d}-*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise damaged(path, str(error)) from error
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                self.files[kind, name] = path, file

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        path, file = self.files[key]
        try:
            return file.get_tensor("/".join(key))
        except SafetensorError as error:
            raise damaged(path, str(error)) from error

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

"""Checkpoints of a training run, written atomically, for any number of processes.

    {run}/latest                                      the name of the newest iteration
    {run}/{iteration}/mp_rank_00_model_states.pt      weights, as SwissArmyTransformer and `load:` take them
    {run}/{iteration}-ema/mp_rank_00_model_states.pt  their moving average, if the optimizer keeps one
    {run}/{iteration}/training_state/                 the other state that resuming needs:
        state.json                                    step, position in the data, schedule, loss scale, random states
        optimizer-mp00-00000.safetensors, ...         moments and float32 weights, whole tensors by `kind/parameter`

All files are written into a hidden folder, synced and renamed; `latest` is updated last. If a process is killed at any
moment, also while it writes in the background, the previous checkpoint remains.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
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
from cogvideox_sat.parallel.agreement import any_process, meet, patient_group
from cogvideox_sat.runs.background_writing import BackgroundSaver, wait_while_growing
from cogvideox_sat.runs.disk_errors import WRITE_ERRORS, cannot_write, check_room_for_checkpoint
from cogvideox_sat.runs.retention import mark_newest, outdated, remove_unfinished
from cogvideox_sat.runs.staging import StagingMemory
from cogvideox_sat.training import optimizer_state
from cogvideox_sat.training.deepspeed_adapter import full_shape, is_partitioned
from cogvideox_sat.training.plan import STATE_FILE
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from cogvideox_sat.weights.rank_shares import cuts_of, plain, recut_tensor
from sgm.errors import UserError
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

SHADOW = "shadow"  # the optimizer's name for the moving average of a weight
SHARD_BYTES = 2 * 2**30
OPTIMIZER_FILE = re.compile(r"optimizer-mp(\d+)-\d+\.safetensors")

_Weights = Iterable[tuple[str, Tensor]]
_Tensors = Iterable[tuple[str, str, Tensor]]  # kind, parameter, tensor
_Exchange = Callable[[str], list[str]]


# Writing


class CheckpointSaver(BackgroundSaver["_Checkpoint"]):
    """Writes the checkpoints of a run, between its steps or in the background.

    All processes call each of its methods. In the background, one checkpoint at a time is written, from a copy in host
    memory, by a thread of each process that writes. These threads have their own process group. Their errors are raised
    when the run waits for them.

    Args:
        full: write the whole network, rather than only its trained parameters.
        keep_last: number of checkpoints to keep; None: all.
        background: write in the background, if host memory has room for a copy.
    """

    def __init__(
        self,
        run_folder: Path,
        engine: deepspeed.DeepSpeedEngine,
        *,
        full: bool,
        keep_last: int | None,
        background: bool = False,
    ):
        super().__init__()
        self.run_folder, self.engine, self.full, self.keep_last = run_folder, engine, full, keep_last
        self.leads, self.writes = dist.get_rank() == 0, mpu.get_data_parallel_rank() == 0
        on_gpu = next(engine.module.parameters()).is_cuda
        self.memory = StagingMemory(pinned=on_gpu) if background else None
        self.asked = False  # whether the room in host memory was checked
        self.writers = patient_group(self.writes) if background else None

    def save(self, step: int, state: dict[str, Any], *, wait: bool = True) -> None:
        """Write the checkpoint of `step`, after finishing the one before.

        Args:
            state: content of state.json besides the optimizer's numbers; JSON-able, taken from the first process.
            wait: return when the checkpoint is written. Otherwise, with background writing, return when it is copied.

        Raises:
            UserError: the disk is full or cannot be written to; the previous checkpoint is kept. On all processes.
        """
        self.finish()
        checkpoint = _Checkpoint(
            self.run_folder,
            step,
            needed=estimated_bytes(self.engine, self.full),
            has_ema=SHADOW in optimizer_state.tensor_kinds(self.engine),
            state=json.dumps({"step": step, "optimizer": optimizer_state.counters(self.engine), **state}),
        )
        _together(checkpoint.prepare if self.leads else _nothing, checkpoint, _from_all)
        memory = None if wait else self.memory_for(checkpoint.needed)
        copy = memory.copy if memory else on_host
        weights = gathered_weights(self.engine.module, self.full, self.writes, copy)
        tensors = _copies(optimizer_state.full_tensors(self.engine), self.writes, copy)
        if memory is None:
            self.write(checkpoint, weights, tensors, _from_all)
            return
        start = time.perf_counter()
        memory.start_over(checkpoint.needed)
        staged = list(weights), list(tensors)
        memory.wait()
        self.unfinished = checkpoint
        if self.writes:
            exchange = partial(_from_group, self.writers)
            self.write_behind(step, start, lambda: self.write(checkpoint, *staged, exchange))

    def write(self, checkpoint: "_Checkpoint", weights: _Weights, tensors: _Tensors, exchange: _Exchange) -> None:
        """Write all files, and mark them as the newest checkpoint."""
        _together(lambda: checkpoint.write(weights, tensors, self.writes), checkpoint, exchange)
        _together(lambda: checkpoint.publish(self.keep_last) if self.leads else None, checkpoint, exchange)
        logger.info("step %d: wrote %s", checkpoint.step, checkpoint.folder)

    def memory_for(self, needed: int) -> StagingMemory | None:
        """Return the memory for copies of checkpoints, or None to write between steps.

        The room in host memory is checked once.
        """
        if self.memory is not None and not self.asked:
            self.asked = True
            if any_process(self.writes and not self.memory.allows(needed)):
                self.memory = None
        return self.memory

    def on_all(self, finish: Callable[[], None], content: "_Checkpoint") -> None:
        """Call `finish` on all processes, and share their errors; see `BackgroundSaver`."""
        _together(finish, content, _from_all)

    def await_writer(self, content: "_Checkpoint") -> None:
        """Wait for the writing process; see `BackgroundSaver`.

        A launcher may end all processes when this one has ended.
        """
        if not self.writes:
            wait_while_growing(content.part)


class _Checkpoint:
    """The files of a checkpoint, in folders that are renamed when everything is complete.

    Args:
        needed: approximate size in bytes.
        state: content of state.json.
    """

    def __init__(self, run_folder: Path, step: int, *, needed: int, has_ema: bool, state: str):
        self.run_folder, self.step, self.needed, self.has_ema, self.state = run_folder, step, needed, has_ema, state
        self.folder, self.ema_folder = run_folder / str(step), run_folder / f"{step}-ema"
        self.part, self.ema_part = _part_of(self.folder), _part_of(self.ema_folder)

    def prepare(self) -> None:
        """Create the hidden folders, and remove what a killed process has left."""
        remove_unfinished(self.run_folder)
        check_room_for_checkpoint(self.folder, self.needed)
        (self.part / STATE_FILE.parent).mkdir(parents=True)
        if self.has_ema:
            self.ema_part.mkdir()

    def write(self, weights: "_Weights", tensors: "_Tensors", writes: bool) -> None:
        """Write this process's part of the files.

        All processes help to assemble the tensors, whether they write or not.
        """
        share = mpu.get_model_parallel_rank()
        file = f"mp_rank_{share:02d}_model_states.pt"
        by_name = dict(weights)
        shards = _Shards(self.part / STATE_FILE.parent, f"optimizer-mp{share:02d}")
        if writes:
            shards.attempt(lambda: _save_weights(by_name, self.part / file))
        for kind, name, tensor in tensors:
            shards.add(f"{kind}/{name}", tensor)
            if kind == SHADOW:
                by_name[name] = tensor.to(by_name[name].dtype)
        shards.close()
        if writes and self.has_ema:
            _save_weights(by_name, self.ema_part / file)

    def publish(self, keep_last: int | None) -> None:
        """Rename the folders, mark them as the newest, and delete outdated checkpoints."""
        (self.part / STATE_FILE).write_text(self.state)
        for source, target in ((self.ema_part, self.ema_folder), (self.part, self.folder)):
            if source.exists():
                _sync(source)
                if target.exists():
                    shutil.rmtree(target)
                source.rename(target)
        _sync(self.run_folder)
        mark_newest(self.run_folder, str(self.step))
        _sync(self.run_folder)
        prune(self.run_folder, self.step, keep_last)

    def give_up(self) -> None:
        """Remove the files written so far."""
        for part in (self.part, self.ema_part):
            shutil.rmtree(part, ignore_errors=True)


def _part_of(folder: Path) -> Path:
    """Return the name of an incomplete folder; see `retention.remove_unfinished`."""
    return folder.with_name(f".{folder.name}.part")


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    torch.save({"module": {checkpoint_name(name): tensor for name, tensor in weights.items()}}, path)


def checkpoint_name(name: str) -> str:
    """Return the name in files for a tensor of the wrapped network.

    The wrapper calls the network `diffusion_model`.
    """
    return NETWORK_PREFIX + name.removeprefix("diffusion_model.")


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in host memory."""
    return tensor.to("cpu", copy=True)


def gathered_weights(
    network: nn.Module, full: bool, keep: bool = True, copy: Callable[[Tensor], Tensor] = on_host
) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of the trained parameters, or with `full` of the whole state dict.

    This is collective. Processes without `keep` only help to assemble what ZeRO-3 has partitioned.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not (full or tensor.requires_grad):
            continue
        with deepspeed.zero.GatheredParameters([tensor]) if is_partitioned(tensor) else nullcontext():
            if keep:
                yield name, copy(tensor.detach())


def _copies(tensors: _Tensors, keep: bool, copy: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield copies of the optimizer's tensors; see `gathered_weights`."""
    for kind, name, tensor in tensors:
        if keep:
            yield kind, name, copy(tensor)


class _Shards:
    """Safetensors files of limited size.

    After an error, tensors are accepted without being written, because the other processes continue to assemble them;
    `close` then raises the error.
    """

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
            path.touch()  # with the usual permissions; safetensors would make the file private
            mode = path.stat().st_mode
            self.attempt(lambda: save_file(self.tensors, path))
            self.attempt(lambda: path.chmod(mode))
        self.count, self.bytes, self.tensors = self.count + 1, 0, {}

    def attempt(self, write: Callable[[], Any]) -> None:
        """Write something, unless an earlier write failed."""
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
    """Do nothing: the first process writes, and this one waits."""


def _together(action: Callable[[], Any], checkpoint: _Checkpoint, exchange: _Exchange) -> None:
    """Run an action that may differ between processes; if one fails, all raise UserError.

    Args:
        exchange: sends this process's error to the others, and returns the errors of all.
    """
    problem = ""
    try:
        action()
    except UserError as error:
        problem = str(error)
    except WRITE_ERRORS as error:
        problem = str(cannot_write(checkpoint.folder, error, checkpoint.needed))
    if first := next(filter(None, exchange(problem)), None):
        if dist.get_rank() == 0:
            checkpoint.give_up()
        raise UserError(first)


def _from_all(problem: str) -> list[str]:
    """Exchange errors with all processes, which wait without a time limit."""
    meet("the checkpoint")
    return _from_group(None, problem, size=dist.get_world_size())


def _from_group(group: dist.ProcessGroup | None, problem: str, size: int = 1) -> list[str]:
    """Exchange errors with the processes of a group."""
    problems = [problem] * (size if group is None else group.size())
    if len(problems) > 1:
        dist.all_gather_object(problems, problem, group=group)
    return problems


def estimated_bytes(engine: deepspeed.DeepSpeedEngine, full: bool) -> int:
    """Return the size of a checkpoint, for all model-parallel shares together."""
    network = engine.module
    kinds = optimizer_state.tensor_kinds(engine)
    entries = [tensor for tensor in network.state_dict(keep_vars=True).values() if full or tensor.requires_grad]
    weights = sum(full_shape(tensor).numel() * tensor.element_size() for tensor in entries)
    trained = optimizer_state.trained_parameters(network).values()
    state = sum(4 * full_shape(parameter).numel() for parameter in trained) * len(kinds)
    return (weights * (2 if SHADOW in kinds else 1) + state) * mpu.get_model_parallel_world_size()


def prune(run_folder: Path, newest: int, keep_last: int | None) -> None:
    """Delete checkpoints that are outdated after that of the step `newest`."""
    steps = [int(folder.name) for folder in run_folder.iterdir() if re.fullmatch(r"\d+", folder.name)]
    for step in outdated(steps, newest, keep_last):
        for name in (str(step), f"{step}-ema"):
            if (run_folder / name).exists():
                part = _part_of(
                    run_folder / name
                )  # renamed first, so that an interruption leaves no incomplete checkpoint
                (run_folder / name).rename(part)
                shutil.rmtree(part, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Sync a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


# Reading


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json in an iteration folder.

    Raises:
        UserError: the file is missing, so that the folder holds only weights; or a run cannot resume from it.
    """
    path = folder / STATE_FILE
    try:
        state = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"resume: {folder} has no complete training state ({STATE_FILE}); to start from its weights name it as load"
        ) from error
    if misfit := find_misfit(state, TRAINING_STATE):
        raise UserError(
            f"resume: {folder} has no complete training state ({STATE_FILE}): {misfit}; to start from its weights, "
            "name it as load"
        )
    if folder.name.isdecimal() and int(folder.name) != state["step"]:
        raise UserError(
            f"resume: {folder} holds the training state of step {state['step']}; rename the folder, or name another "
            "checkpoint"
        )
    return state


def restore_optimizer(engine: deepspeed.DeepSpeedEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Restore the optimizer's part of a checkpoint.

    Any number of model-parallel ranks may have written it.

    Raises:
        UserError: files are missing or damaged.
    """
    tensors = TensorsOfRank(folder / STATE_FILE.parent, state["optimizer"]["model_parallel_size"], engine.module)
    optimizer_state.restore(engine, tensors, state["optimizer"])


class TensorsOfRank(Mapping[tuple[str, str], Tensor]):
    """This model-parallel rank's share of the optimizer's tensors, by (kind, parameter).

    Tensors are read on access.

    Args:
        written_by: number of ranks that wrote them.
        network: determines how tensors are divided.

    Raises:
        UserError: the files of a rank are missing or damaged.
    """

    def __init__(self, folder: Path, written_by: int, network: nn.Module):
        self.rank, self.size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        is_own = written_by == self.size
        there = {match[1] for file in folder.iterdir() if (match := OPTIMIZER_FILE.fullmatch(file.name))}
        ranks = [f"{self.rank:02d}"] if is_own else sorted(there)
        self.shares = [StoredTensors(folder, rank) for rank in ranks]
        self.cuts = {} if is_own else cuts_of(network)
        if not is_own and (
            len(ranks) != written_by or any(share.files.keys() != self.shares[0].files.keys() for share in self.shares)
        ):
            raise UserError(
                f"resume: {folder} is of a run with model_parallel_size {written_by}, not {self.size}, and does not "
                "hold the optimizer's tensors of all ranks; name another checkpoint"
            )

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        if (cut := self.cuts.get(plain(key[1]))) is None:
            return self.shares[0][key]
        return recut_tensor([share[key] for share in self.shares], cut, self.rank, self.size)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.shares[0])

    def __len__(self) -> int:
        return len(self.shares[0])


class StoredTensors(Mapping[tuple[str, str], Tensor]):
    """The tensors in the optimizer's files by (kind, parameter), read on access.

    Args:
        rank: the model-parallel rank that wrote the files, in digits.
    """

    def __init__(self, folder: Path, rank: str):
        self.files: dict[tuple[str, str], tuple[Path, Any]] = {}
        for path in sorted(folder.glob(f"optimizer-mp{rank}-*.safetensors")):
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

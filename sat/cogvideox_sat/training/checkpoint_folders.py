"""The folders of a checkpoint of a training run, written atomically.

    {run}/latest                                      the name of the newest iteration
    {run}/{iteration}/mp_rank_00_model_states.pt      weights, as SwissArmyTransformer and `load:` take them
    {run}/{iteration}-ema/mp_rank_00_model_states.pt  their moving average, if the optimizer keeps one
    {run}/{iteration}/training_state/                 the other state that resuming needs:
        state.json                                    step, position in the data, schedule, loss scale, random states
        optimizer-mp00-00000.safetensors, ...         moments and float32 weights, whole tensors by `kind/parameter`

All files are written into a hidden folder, synced and renamed; `latest` is updated last. If a process is killed at any
moment, also while it writes in the background, the previous checkpoint remains.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sat import mpu
from torch import Tensor

from cogvideox_sat.files.atomic import sync, sync_tree
from cogvideox_sat.runs.disk_errors import WRITE_ERRORS, check_room_for_checkpoint
from cogvideox_sat.runs.retention import mark_newest, outdated, remove_unfinished
from cogvideox_sat.training.checkpoint_tensors import SHADOW, OptimizerTensors, Weights
from cogvideox_sat.training.plan import STATE_FILE
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX

SHARD_BYTES = 2 * 2**30


class CheckpointFolders:
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

    def write(self, weights: Weights, tensors: OptimizerTensors, writes: bool) -> None:
        """Write this process's part of the files.

        All processes help to assemble the tensors, whether they write or not.
        """
        share = mpu.get_model_parallel_rank()
        file = f"mp_rank_{share:02d}_model_states.pt"
        by_name = dict(weights)
        shards = TensorShards(self.part / STATE_FILE.parent, f"optimizer-mp{share:02d}")
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
                sync_tree(source)
                if target.exists():
                    shutil.rmtree(target)
                source.rename(target)
        sync(self.run_folder)  # its names alone: other files in it are not ours to open
        mark_newest(self.run_folder, str(self.step))
        sync(self.run_folder)
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


class TensorShards:
    """Writes safetensors files of limited size, `{name}-00000.safetensors` and so on.

    After an error, tensors are accepted without being written, because the other processes continue to assemble them;
    `close` then raises the error.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.count = self.bytes = 0
        self.tensors: dict[str, Tensor] = {}
        self.error: Exception | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, and write a file when `SHARD_BYTES` are collected."""
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
        """Write the last file.

        Raises:
            Exception: one of `WRITE_ERRORS`: this write or an earlier one failed.
        """
        self._write()
        if self.error:
            raise self.error


def prune(run_folder: Path, newest: int, keep_last: int | None) -> None:
    """Delete checkpoints that are outdated after that of the step `newest`."""
    steps = [int(folder.name) for folder in run_folder.iterdir() if re.fullmatch(r"\d+", folder.name)]
    for step in outdated(steps, newest, keep_last):
        for name in (str(step), f"{step}-ema"):
            if (run_folder / name).exists():
                # It is renamed first, so that an interruption leaves no incomplete checkpoint.
                part = _part_of(run_folder / name)
                (run_folder / name).rename(part)
                shutil.rmtree(part, ignore_errors=True)

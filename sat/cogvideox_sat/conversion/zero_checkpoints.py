"""Read checkpoints that DeepSpeed writes under ZeRO, without DeepSpeed or a GPU.

    {folder}/latest
    {folder}/global_step1000/[bf16_]zero_pp_rank_{process}_mp_rank_00_optim_states.pt  float32 pieces of weights
    {folder}/global_step1000/mp_rank_00_model_states.pt                  stages 1 and 2: the module, and the shapes
    {folder}/global_step1000/zero_pp_rank_{process}_mp_rank_00_model_states.pt    stage 3: the shapes, frozen weights

Stages 1 and 2 concatenate the parameters of a group and cut the result into one piece for each process. Stage 3 cuts
each parameter into equal pieces, of which the last is padded, and concatenates the pieces of a process.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.conversion.stored_weights import MappedFile, Stored, StoredWeights, Window
from cogvideox_sat.files.latest_file import newest
from cogvideox_sat.files.training_state import MISFITS
from sgm.errors import UserError, one_line
from sgm.weights import read_state_dict

COPY_ALL = "copy all files of one checkpoint there"  # ends the errors about files that do not fit together
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def zero_folder(path: Path) -> Path | None:
    """Return the folder of an iteration's pieces, if `path` is one or names one in `latest`."""
    if (name := newest(path, "load")) is not None:
        path = path / name
    if path.is_dir() and any(_OPTIMIZER_FILE.fullmatch(file.name) for file in path.iterdir()):
        return path
    return None


def read_zero(folder: Path) -> StoredWeights:
    """Return the module's tensors by name, trained ones in float32, others as in the module.

    Raises:
        UserError: files are missing, damaged, or do not fit together; also when a tensor is read.
    """
    with _damage_reported(folder):
        entries = _read_files(folder).entries
        return StoredWeights(
            {
                name: Stored(torch.Size(entry.shape), entry.dtype, partial(_read, folder, entry))
                for name, entry in entries.items()
            }
        )


@contextmanager
def _damage_reported(folder: Path) -> Iterator[None]:
    """Report errors of the block, which only takes values from files, as damage of the files."""
    try:
        yield
    except MISFITS as error:
        reason = one_line(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise UserError(f"{folder} holds damaged files: {reason}; {COPY_ALL}") from error


def _read(folder: Path, entry: Stored) -> Tensor:
    with _damage_reported(folder):
        return entry.read()


def _read_files(folder: Path) -> StoredWeights:
    files = _optimizer_files(folder)
    window = Window()
    groups = [_FlatGroups(file, window) for file in files]
    stage, count = groups[0].stage, groups[0].partitions
    if count != len(files):
        raise UserError(f"{folder} holds the pieces of {len(files)} of {count} processes; copy the others there too")
    if stage <= 2:
        return _whole(folder, groups, window)
    if stage == 3:
        return _partitioned(folder, groups, window)
    raise UserError(f"{folder} has ZeRO stage {stage}; known are 1, 2 and 3")


def _optimizer_files(folder: Path) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for file in folder.iterdir():
        if match := _OPTIMIZER_FILE.fullmatch(file.name):
            if int(match[2]):
                raise UserError(f"{folder} is split over model-parallel processes, which cannot be joined here")
            by_rank[int(match[1])] = file
    if sorted(by_rank) != list(range(len(by_rank))):
        missing = next(rank for rank in range(max(by_rank)) if rank not in by_rank)
        raise UserError(
            f"{folder} lacks the file of process {missing}, zero_pp_rank_{missing}_mp_rank_00_optim_states.pt; copy it "
            "there"
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


class _FlatGroups:
    """Float32 pieces of one process, one tensor for each group."""

    def __init__(self, file: Path, window: Window):
        self.name = file
        state = self._optimizer_state()
        stage, partitions = state.get("zero_stage"), state.get("partition_count")
        self.partitions = max(partitions) if isinstance(partitions, list) else partitions
        if not isinstance(stage, int) or not isinstance(self.partitions, int):
            raise UserError(f"{file} is not an optimizer state of ZeRO: it lacks its stage or its number of processes")
        self.stage = int(stage)
        self.paddings = state.get("param_alignment_paddings")
        self.file = MappedFile(self._groups, window)
        self.sizes = [tensor.numel() for tensor in self._pieces(state)]

    def _optimizer_state(self) -> Mapping[str, Any]:
        content = read_state_dict(self.name)
        state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping):
            raise UserError(f"{self.name} is not an optimizer state of ZeRO")
        return state

    def _groups(self) -> dict[str, Tensor]:
        """Return the pieces by the number of their group."""
        return {str(group): piece for group, piece in enumerate(self._pieces(self._optimizer_state()))}

    def _pieces(self, state: Mapping[str, Any]) -> list[Tensor]:
        pieces = state.get("single_partition_of_fp32_groups" if self.stage <= 2 else "fp32_flat_groups")
        if not isinstance(pieces, list) or not all(isinstance(piece, Tensor) for piece in pieces):
            raise UserError(f"{self.name} holds no float32 weights")
        return pieces

    def read(self, group: int, start: int, stop: int) -> Tensor:
        """Return the entries `start` to `stop` of a flat group of weights, in float32."""
        return self.file.read(str(group), start, stop)


def _model_states(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}, which describes the pieces beside it, does not exist; copy it there")
    content = read_state_dict(file)
    shapes = content.get("param_shapes") if isinstance(content, Mapping) else None
    if not isinstance(shapes, list) or not all(isinstance(group, Mapping) for group in shapes):
        raise UserError(f"{file} does not hold the shapes of the parameters")
    return content


def _module(file: Path, window: Window) -> dict[str, Stored]:
    def tensors() -> dict[str, Tensor]:
        module = _model_states(file).get("module") or {}
        return {name: value for name, value in module.items() if isinstance(value, Tensor) and value.numel()}

    return MappedFile(tensors, window).stored()


def _concatenated(parts: Sequence[tuple[_FlatGroups, int, int, int]], shape: torch.Size) -> Tensor:
    pieces = [groups.read(group, start, stop) for groups, group, start, stop in parts if stop > start]
    return torch.cat(pieces)[: shape.numel()].view(shape)


def _stored(parts: Sequence[tuple[_FlatGroups, int, int, int]], shape: torch.Size) -> Stored:
    return Stored(shape, torch.float32, lambda: _concatenated(parts, shape))


def _with_aliases(entries: dict[str, Stored], states: Mapping[str, Any]) -> StoredWeights:
    for name, other in (states.get("shared_params") or {}).items():
        if other in entries:
            entries[name] = entries[other]
    return StoredWeights(entries)


def _whole(folder: Path, ranks: list[_FlatGroups], window: Window) -> StoredWeights:
    """Return the tensors of stages 1 and 2."""
    file = folder / "mp_rank_00_model_states.pt"
    states = _model_states(file)
    entries = _module(file, window)
    if any(len(rank.sizes) != len(states["param_shapes"]) for rank in ranks):
        raise UserError(f"{folder}: the number of parameter groups differs between the files; {COPY_ALL}")
    for group, shapes in enumerate(states["param_shapes"]):
        paddings = ranks[0].paddings[group] if ranks[0].paddings else [0] * len(shapes)
        ends = [sum(rank.sizes[group] for rank in ranks[: i + 1]) for i in range(len(ranks))]
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            parts = []
            for rank, end in zip(ranks, ends, strict=True):
                begin = end - rank.sizes[group]
                start, stop = max(offset, begin), min(offset + shape.numel(), end)
                parts.append((rank, group, start - begin, stop - begin))
            entries[name] = _stored(parts, shape)
            offset += shape.numel() + padding
        align = 2 * len(ranks)  # DeepSpeed pads groups to this multiple on some devices
        if math.ceil(offset / align) != math.ceil(ends[-1] / align):
            raise UserError(
                f"{folder}: group {group} has {ends[-1]} numbers, but its parameters take {offset}; {COPY_ALL}"
            )
    return _with_aliases(entries, states)


def _frozen_fragments(file: Path) -> dict[str, Tensor]:
    return dict(_model_states(file)["frozen_param_fragments"])


def _partitioned(folder: Path, ranks: list[_FlatGroups], window: Window) -> StoredWeights:
    """Return the tensors of stage 3."""
    files = [folder / f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in range(len(ranks))]
    states = [_model_states(file) for file in files]
    entries = _module(files[0], window)
    for name in states[0].get("frozen_param_shapes") or {}:
        if any(name not in (state.get("frozen_param_fragments") or {}) for state in states):
            raise UserError(f"{folder}: a process has no piece of {name}; {COPY_ALL}")
    if states[0].get("frozen_param_shapes"):
        fragments = [MappedFile(partial(_frozen_fragments, file), window) for file in files]
        for name, shape in states[0]["frozen_param_shapes"].items():

            def read(name: str = name, shape: torch.Size = shape) -> Tensor:
                return torch.cat([fragment.read(name) for fragment in fragments])[: shape.numel()].view(shape)

            entries[name] = Stored(shape, states[0]["frozen_param_fragments"][name].dtype, read)
    offset = 0
    for shapes in states[0]["param_shapes"]:
        for name, shape in shapes.items():
            size = math.ceil(shape.numel() / len(ranks))
            parts = [part for rank in ranks for part in _spans(rank, offset, offset + size)]
            entries[name] = _stored(parts, shape)
            offset += size
    if any(sum(rank.sizes) != offset for rank in ranks):
        sizes = sorted({sum(rank.sizes) for rank in ranks})
        raise UserError(
            f"{folder}: processes hold {sizes} numbers, but the parameters take {offset} of each; {COPY_ALL}"
        )
    return _with_aliases(entries, states[0])


def _spans(rank: _FlatGroups, start: int, stop: int) -> list[tuple[_FlatGroups, int, int, int]]:
    """Return the positions of the numbers from `start` to `stop`, counted over all groups."""
    spans, begin = [], 0
    for group, size in enumerate(rank.sizes):
        low, high = max(start, begin), min(stop, begin + size)
        if low < high:
            spans.append((rank, group, low - begin, high - begin))
        begin += size
    return spans

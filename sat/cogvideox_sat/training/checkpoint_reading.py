"""Read the training state in a checkpoint, for resuming.

Any number of model-parallel ranks may have written it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
from safetensors import SafetensorError, safe_open
from sat import mpu
from torch import Tensor, nn

from cogvideox_sat.files.training_state import TRAINING_STATE, damaged, find_misfit
from cogvideox_sat.training import optimizer_state
from cogvideox_sat.training.plan import STATE_FILE
from cogvideox_sat.weights.rank_shares import cuts_of, plain, recut_tensor
from sgm.errors import UserError
from sgm.plain_json import parse_json

OPTIMIZER_FILE = re.compile(r"optimizer-mp(\d+)-\d+\.safetensors")


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

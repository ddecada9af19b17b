"""Find the file with the network's weights below a path, and read only these weights.

This module needs no network.
"""

import re
from pathlib import Path

from torch import Tensor

from cogvideox_sat.commands.input_paths import not_found
from cogvideox_sat.files.latest_file import newest
from cogvideox_sat.weights.diffusers_names import (
    EXTRA_TABLES,
    check_divisible,
    from_diffusers,
    is_diffusers_network,
    rows_of,
)
from cogvideox_sat.weights.stored_values import StoredValue
from sgm.errors import UserError
from sgm.weights import DIFFUSERS_FILES, PIPELINE_FILE, module_weights, read_state_dict, safetensors_in

NETWORK_PREFIX = "model.diffusion_model."
# Other parts that a checkpoint of the whole engine may contain; these parts are read from files of their own.
OTHER_PARTS = ("first_stage_model.", "conditioner.", "denoiser.", "loss_fn.", "sampler.")
RANK_FILE = re.compile(r"mp_rank_\d+_model_states\.pt")
ADAPTER_MARKS = (".matrix_A.", ".matrix_B.")


def checkpoint_file(path: str | Path) -> Path:
    """Return the only file with the weights of a network; see `checkpoint_shares`.

    Raises:
        UserError: no such file exists, or the network is split over several files.
    """
    shares = checkpoint_shares(path)
    if len(shares) > 1:
        raise UserError(
            f"load: {shares[0].parent} is split over {len(shares)} model-parallel ranks; name a checkpoint of one rank"
        )
    return shares[0]


def checkpoint_shares(path: str | Path) -> list[Path]:
    """Return the files with the weights of a network: one, or one per model-parallel rank.

    Args:
        path: a weight file, a folder with a file `latest` beside the iteration folders, an iteration folder with
            `mp_rank_XX_model_states.pt`, a folder of safetensors files, or a folder with a pipeline of diffusers. The
            file of one rank stands for the files of all ranks beside it.

    Raises:
        UserError: `path` is none of these, or the file of a rank is missing.
    """
    path = Path(path)
    if path.is_file():
        return shares_in(path.parent) if RANK_FILE.fullmatch(path.name) else [path]
    if not path.is_dir():
        raise UserError(not_found("load", path))
    folder = path / "transformer" if (path / PIPELINE_FILE).is_file() else path
    if (name := newest(path, "load")) is not None:
        folder = path / name
        if not folder.is_dir():
            raise UserError(
                f"load: {path / 'latest'} names the iteration '{name}', but {folder} does not exist; correct it, "
                "or name an iteration"
            )
    if shares := shares_in(folder):
        return shares
    if list(folder.glob("*.safetensors*")):
        return [safetensors_in(folder)]
    raise UserError(
        f"load: {path} holds no checkpoint; expected a file 'latest' beside iteration folders, "
        "mp_rank_00_model_states.pt, or safetensors"
    )


def shares_in(folder: Path) -> list[Path]:
    """Return the files of all model-parallel ranks in a folder, in order of the ranks.

    The list is empty if the folder has no such files.

    Raises:
        UserError: the file of a rank is missing.
    """
    shares = [file for file in folder.iterdir() if RANK_FILE.fullmatch(file.name)]
    expected = [folder / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(shares))]
    if missing := [file.name for file in expected if file not in shares]:
        raise UserError(
            f"load: {folder} holds {len(shares)} files of model-parallel ranks, but {missing[0]} is missing; copy it "
            "there"
        )
    return expected


def network_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of the network in a file, named as in the network's state dict.

    Files of diffusers lack `TABLES`, unless a file `EXTRA_TABLES` beside them holds some.

    Raises:
        UserError: the file cannot be read, or tensors of diffusers do not fit together.
    """
    return {name: value.tensor() for name, value in network_values(path).items()}


def network_values(path: Path) -> dict[str, StoredValue]:
    """Return the same as `network_weights`, without joining any pieces yet."""
    weights = module_weights(read_state_dict(path), what=str(path))
    if is_diffusers_network(weights):
        pieces = from_diffusers(weights, str(path))
        check_divisible(pieces, {name: tuple(tensor.shape) for name, tensor in weights.items()}, str(path))
        values = {name: StoredValue(rows_of(parts, weights)) for name, parts in pieces.items()}
        if (beside := path.parent / EXTRA_TABLES).is_file():
            values |= {name: StoredValue([tensor]) for name, tensor in read_state_dict(beside).items()}
        return values
    if any(name.startswith(NETWORK_PREFIX) for name in weights):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(OTHER_PARTS)}
    return {name.removeprefix(NETWORK_PREFIX): StoredValue([tensor]) for name, tensor in weights.items()}


def is_diffusers_file(file: Path) -> bool:
    """Return whether the network's weights in `file` are those of diffusers.

    Our checkpoints are never safetensors files with such names.
    """
    return file.name in DIFFUSERS_FILES


def is_adapter(name: str) -> bool:
    """Return whether a tensor of this name belongs to an adapter."""
    return any(mark in name for mark in ADAPTER_MARKS)

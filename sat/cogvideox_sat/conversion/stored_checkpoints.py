"""Open the network's tensors in any checkpoint of SwissArmyTransformer's form, as stored.

A checkpoint is a run, an iteration, a file, the files of model-parallel ranks, which are joined, or the pieces that
DeepSpeed's ZeRO writes. Adapters are included.
"""

from collections.abc import Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path

from torch import Tensor

from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, open_weights
from cogvideox_sat.conversion.zero_checkpoints import read_zero, zero_folder
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, OTHER_PARTS, checkpoint_shares, is_diffusers_file
from cogvideox_sat.weights.rank_shares import Cut, check_alike, cuts_by_name, plain
from sgm.errors import UserError

WRAPPERS = (NETWORK_PREFIX, "diffusion_model.")  # prefixes in whole engines, and in the module that DeepSpeed gets


def open_checkpoint(path: Path) -> tuple[Path, StoredWeights]:
    """Return the file or folder of the weights, and the network's weights by its own names.

    Raises:
        UserError: the checkpoint does not exist or cannot be read.
    """
    pieces = zero_folder(path)
    if pieces is not None:
        location, weights = pieces, read_zero(pieces)
    else:
        files = checkpoint_shares(path)
        location = files[0]
        if is_diffusers_file(location):
            raise UserError(f"{path} already has the form of diffusers; name a checkpoint of this project")
        weights = joined([open_weights(file) for file in files], str(location.parent))
    for wrapper in WRAPPERS:
        if any(name.startswith(wrapper) for name in weights):
            weights = weights.select(name for name in weights if not name.startswith(OTHER_PARTS))
            weights = weights.renamed(methodcaller("removeprefix", wrapper))
    return location, weights


def joined(shares: Sequence[StoredWeights], what: str) -> StoredWeights:
    """Return the weights that model-parallel ranks share; each is joined when it is read.

    Args:
        what: the weights, for errors.

    Raises:
        UserError: the shares do not hold the same tensors.
    """
    if len(shares) == 1:
        return shares[0]
    check_alike([share.entries for share in shares], what)
    entries, cuts = dict(shares[0].entries), cuts_by_name(shares[0])
    for name, first in shares[0].entries.items():
        if (cut := cuts.get(plain(name))) is not None:
            shape = cut.whole_shape(first.shape, len(shares))
            read = partial(_read_joined, cut, [share.entries[name] for share in shares])
            entries[name] = Stored(shape, first.dtype, read)
    return StoredWeights(entries)


def _read_joined(cut: Cut, shares: Sequence[Stored]) -> Tensor:
    return cut.join([share.read() for share in shares])

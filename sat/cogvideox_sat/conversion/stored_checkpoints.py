"""The network's tensors in any checkpoint of SwissArmyTransformer's form, adapters included, as they are stored.

That is a run, an iteration, a file, or the pieces that DeepSpeed's ZeRO leaves.
"""

from operator import methodcaller
from pathlib import Path

from cogvideox_sat.conversion.stored_weights import StoredWeights, open_weights
from cogvideox_sat.conversion.zero_checkpoints import read_zero, zero_folder
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, OTHER_PARTS, checkpoint_file, is_diffusers_file
from sgm.errors import UserError

WRAPPERS = (NETWORK_PREFIX, "diffusion_model.")  # of whole engines, and of what DeepSpeed is given here


def open_checkpoint(path: Path) -> tuple[Path, StoredWeights]:
    """The file of the weights, or the folder of ZeRO's pieces; and the network's weights by its own names.

    Raises:
        UserError: there is no such checkpoint, or it cannot be read.
    """
    pieces = zero_folder(path)
    if pieces is not None:
        location, weights = pieces, read_zero(pieces)
    else:
        location = checkpoint_file(path)
        if is_diffusers_file(location):
            raise UserError(f"{path} is in the form of diffusers already")
        weights = open_weights(location)
    for wrapper in WRAPPERS:
        if any(name.startswith(wrapper) for name in weights):
            weights = weights.select(name for name in weights if not name.startswith(OTHER_PARTS))
            weights = weights.renamed(methodcaller("removeprefix", wrapper))
    return location, weights

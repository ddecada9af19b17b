"""Read LoRA adapters of either kind: SwissArmyTransformer's or diffusers'.

The strength of an adapter, which adds alpha/rank · B·A, does not follow from its tensors. SwissArmyTransformer stores
alpha in the configuration, diffusers in the header of the file.
"""

from pathlib import Path

from cogvideox_sat.conversion.diffusers_lora_files import LORA_FILES, read_diffusers_adapter
from cogvideox_sat.conversion.lora_matrices import Adapter
from cogvideox_sat.conversion.sat_lora_files import read_sat_adapter
from cogvideox_sat.weights.checkpoint_files import is_adapter
from sgm.weights import read_state_dict


def read_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """Return the adapter at `path`; see `read_sat_adapter` and `read_diffusers_adapter`.

    Raises:
        UserError: the path holds no adapter, or its matrices do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        is_diffusers = any((path / name).is_file() for name in LORA_FILES)
    else:
        is_diffusers = path.suffix == ".safetensors" and not any(map(is_adapter, read_state_dict(path)))
    return read_diffusers_adapter(path, alpha) if is_diffusers else read_sat_adapter(path, alpha)

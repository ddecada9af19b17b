"""Load a T5 encoder and its tokenizer; the weights are mapped from their file.

Processes of a machine that map the same file share its memory. Weights are copied, one at a time, only if they go to
another device or dtype.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgm.errors import UserError, shown
from sgm.weights import INDEX_SUFFIX, assign_weights, module_weights, read_state_dict

MOST_LAYERS = 1000  # building takes time for each layer, even on the meta device
CONFIG_FILE = "config.json"
# Patterns of file names in a folder, in the order of preference.
WEIGHT_FILES = ("model.safetensors", f"model{INDEX_SUFFIX}", "*.safetensors", "*.bin")
T5_V1_1_XXL = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    "feed_forward_proj": "gated-gelu",
}
# Layers that stay in float32 when the others are float16, in which their outputs would overflow.
FLOAT32_LAYERS = ".wo."


class LoadedT5(NamedTuple):
    """A T5 encoder, its tokenizer, and the dtypes to compute in, for each layer's parameters."""

    tokenizer: Any
    model: Any
    block_dtypes: list[list[torch.dtype]]


def load_t5(
    model_dir: str,
    cache_dir: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    blocks_as_stored: bool = False,
) -> LoadedT5:
    """Load the parts of a `FrozenT5Embedder`, which describes the arguments.

    Raises:
        UserError: the folder or one of its files is missing or cannot be read.
    """
    folder = Path(model_dir)
    if cache_dir is None:
        check_folder(folder)
        check_layers(folder / CONFIG_FILE)
    # Imported here, since the import takes seconds.
    from transformers import T5EncoderModel, T5Tokenizer, __version__

    try:
        if cache_dir is not None:
            dtype_argument = "torch_dtype" if __version__.startswith("4.") else "dtype"
            source = {"cache_dir": cache_dir, dtype_argument: dtype or "auto"}
            model = T5EncoderModel.from_pretrained(model_dir, **source).to(device)
            return LoadedT5(T5Tokenizer.from_pretrained(model_dir, cache_dir=cache_dir), model, block_dtypes(model))
        tokenizer = T5Tokenizer.from_pretrained(model_dir, local_files_only=True)
        weights = stored_weights(folder)
        model = empty_t5(folder, getattr(torch, dtype) if isinstance(dtype, str) else dtype, weights)
        dtypes = block_dtypes(model)
        if blocks_as_stored:
            keep_stored_dtypes(model, weights)
        # Weights of a complete T5 include a decoder.
        missing, _ = assign_weights(
            model, weights, what=model_dir, allow_missing=True, allow_unexpected=True, device=device
        )
    except Exception as error:  # the loaders raise errors of many libraries
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model_dir: cannot load the T5 encoder from '{model_dir}': {type(error).__name__}: {reason}"
        ) from error
    if missing:
        raise UserError(f"model_dir: the T5 weights in '{model_dir}' are incomplete; '{min(missing)}' does not exist")
    return LoadedT5(tokenizer, model.eval(), dtypes)


def empty_t5(folder: Path, dtype: torch.dtype | None, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the T5 encoder that a folder's `config.json` describes, on the meta device.

    If the file does not exist, the encoder is that of the released models.

    Args:
        dtype: of the weights; None: the dtype in the file, else that of the `weights`.

    Raises:
        UserError: the file does not describe a T5 encoder.
    """
    from transformers import T5Config, T5EncoderModel

    try:
        exists = (folder / CONFIG_FILE).is_file()
        config = T5Config.from_pretrained(folder, local_files_only=True) if exists else T5Config(**T5_V1_1_XXL)
        dtype = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if dtype is None:
            dtype = next(tensor.dtype for tensor in (weights or {}).values() if tensor.is_floating_point())
        with torch.device("meta"):
            encoder = T5EncoderModel(config)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder / CONFIG_FILE} does not describe a T5 encoder: {reason}") from error
    for name, module in encoder.named_modules():
        keeps = dtype == torch.float16 and FLOAT32_LAYERS in f".{name}."
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32 if keeps else dtype)
    return encoder


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a folder, mapped from their files where the format allows that.

    Raises:
        UserError: a file cannot be read.
    """
    files: list[Path] = next(found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern))))
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= module_weights(read_state_dict(file), what=str(file))
    return weights


def block_dtypes(model: Any) -> list[list[torch.dtype]]:
    """Return the dtype of each parameter of each of an encoder's layers."""
    return [[parameter.dtype for parameter in block.parameters()] for block in model.encoder.block]


def keep_stored_dtypes(model: Any, weights: dict[str, Tensor]) -> None:
    """Give an encoder's layers on the meta device the dtypes of the stored `weights`."""
    for name, parameter in model.encoder.block.named_parameters(prefix="encoder.block"):
        if name in weights:
            parameter.data = parameter.data.to(weights[name].dtype)


def check_layers(path: Path) -> None:
    """Check that an encoder has at most `MOST_LAYERS` layers, so that it can be built.

    Other errors in the file are left to the loader.

    Raises:
        UserError: the encoder has more layers.
    """
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["num_layers"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if isinstance(layers, int | float) and layers > MOST_LAYERS:
        raise UserError(f"{path}: num_layers: got {shown(layers)}; an encoder has up to {MOST_LAYERS}")


def check_folder(folder: Path) -> None:
    """Check that a folder has the files of a T5 encoder.

    Raises:
        UserError: the folder or a file does not exist.
    """
    content = "config.json, the weights (*.safetensors or *.bin) and spiece.model (or tokenizer.json)"
    if not folder.is_dir():
        raise UserError(f"model_dir: '{folder}' is not a folder; give one with {content} of a T5 encoder")
    for patterns in ([CONFIG_FILE], ["*.safetensors", "*.bin"], ["spiece.model", "tokenizer.json"]):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise UserError(f"model_dir: '{folder}' has no {' or '.join(patterns)}; it should have {content}")

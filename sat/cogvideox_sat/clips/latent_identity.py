"""Describe the parts of a model that cached latents and text embeddings depend on.

Nothing here imports PyTorch.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError


def describe_model(model_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return sizes and a hash of the weights of the VAE and the text encoder, for JSON.

    Weights that are not on this machine have the hash None; training from a cache does not need them.

    Raises:
        UserError: a cache cannot replace the conditioner.
    """
    first_stage = model_config["first_stage_config"]["params"]
    encoder = first_stage["encoder_config"]["params"]
    text = text_embedder(model_config["conditioner_config"])["params"]
    modules = model_config["network_config"]["params"]["modules"]
    vae_file = first_stage.get("ckpt_path")
    return {
        "VAE": {
            **{name: encoder.get(name) for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")},
            "weights": weights_stamp([Path(vae_file)]) if vae_file else None,
        },
        "text encoder": {
            "tokens": text.get("max_length", 77),
            "features": modules["patch_embed_config"]["params"].get("text_hidden_size"),
            "weights": weights_stamp(_t5_files(text.get("model_dir"))),
        },
    }


def _t5_files(model_dir: str | None) -> list[Path]:
    if not model_dir:
        return []
    folder = Path(model_dir)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [*weights, *folder.glob("spiece.model")]


def weights_stamp(files: Sequence[Path]) -> str | None:
    """Return a hash of the sizes of files and of their first and last MiB.

    The result is None if there are no files or one is missing. Names do not count, so that files may be moved. The end
    of a file of `torch.save` holds the CRCs of all its tensors.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if not files or not all(path.is_file() for path in files):
        return None
    for path in files:
        try:
            size, end = path.stat().st_size, 2**20
            digest.update(str(size).encode())
            with path.open("rb") as file:
                digest.update(file.read(end))
                file.seek(max(size - end, 0))
                digest.update(file.read(end))
        except OSError as error:
            raise UserError(f"cannot read {path}: {refusal(error)}") from error
    return digest.hexdigest()


def text_embedder(conditioner_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text encoder's entry among the embedders of a conditioner.

    Raises:
        UserError: it is not the only embedder, or replaces dropped captions by a text.
    """
    embedders = conditioner_config["params"]["emb_models"]
    if len(embedders) != 1 or not embedders[0]["target"].endswith("FrozenT5Embedder"):
        targets = ", ".join(embedder["target"] for embedder in embedders)
        raise UserError(
            f"model.conditioner_config: it has {targets}, but a cache holds the embeddings of one FrozenT5Embedder"
        )
    if embedders[0].get("legacy_ucg_value") is not None:
        raise UserError(
            "model.conditioner_config: a cache replaces dropped captions by zeros; leave out legacy_ucg_value"
        )
    return embedders[0]


def conditioner_for_cache(conditioner_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a conditioner that takes cached embeddings, `txt_embedding`.

    Embeddings are dropped at the rate of `conditioner_config`.

    Raises:
        UserError: as `text_embedder`.
    """
    entry = copy.deepcopy(dict(text_embedder(conditioner_config)))
    entry.pop("params", None)
    entry.pop("input_keys", None)
    entry |= {"target": "sgm.modules.encoders.modules.PrecomputedEmbedder", "input_key": "txt_embedding"}
    return {**conditioner_config, "params": {**conditioner_config["params"], "emb_models": [entry]}}

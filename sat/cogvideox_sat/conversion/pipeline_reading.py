"""Read a pipeline folder of diffusers as weights of this project, under our names."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvideox_sat.conversion.assembled_weights import assembled
from cogvideox_sat.conversion.diffusers_configs import AUTOENCODER, NORM_GROUPS, TRANSFORMER, transformer_config
from cogvideox_sat.conversion.diffusers_folders import is_pipeline, read_extra_tables, read_json, read_part
from cogvideox_sat.conversion.model_sizes import ModelSizes, computed_tables, released_config, sizes_of_config
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights
from cogvideox_sat.conversion.text_encoder_files import check_text_encoder, text_files
from cogvideox_sat.conversion.weight_family import (
    AutoencoderFamily,
    NetworkFamily,
    check_shapes,
    detect_autoencoder,
    detect_network,
    table_shapes,
)
from cogvideox_sat.weights.diffusers_names import (
    TABLES,
    Pieces,
    assembled_shape,
    check_divisible,
    from_diffusers,
)
from sgm.diffusers_vae_names import from_diffusers as vae_from_diffusers
from sgm.errors import UserError, shown
from sgm.weights import PIPELINE_FILE

# Values that transformer/config.json must have, so that the tensors mean the same here as in diffusers.
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "patch_bias": True,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
}
# The same for vae/config.json.
VAE_FIXED = {"act_fn": "silu", "norm_eps": 1e-6, "norm_num_groups": NORM_GROUPS, "temporal_compression_ratio": 4}
WHOLE_SIZES = ("num_frames", "latent_height", "latent_width", "text_length")
LARGEST_SIZE = 2**20  # far above any model's; tables for larger sizes do not fit into memory
DIFFUSERS_TEXT_LENGTH = 226  # diffusers' default
# Values that the tensors determine too.
TOLD_TWICE = (
    "attention_head_dim",
    "in_channels",
    "num_attention_heads",
    "num_layers",
    "ofs_embed_dim",
    "out_channels",
    "patch_size",
    "patch_size_t",
    "text_embed_dim",
    "time_embed_dim",
    "use_learned_positional_embeddings",
)


@dataclass(frozen=True)
class Pipeline:
    """Content of a pipeline folder.

    Attributes:
        network, vae: all tensors, by our names.
        tables: tensors of the network that diffusers' files do not hold.
        network_pieces, vae_names: the tensors of diffusers that ours are made of.
        network_shapes, vae_shapes: the shapes of diffusers' tensors.
        text_files: files of the text encoder and of the tokenizer; None: the folder has none, or they are not wanted.
    """

    family: NetworkFamily
    sizes: ModelSizes
    autoencoder: AutoencoderFamily
    network: StoredWeights
    vae: StoredWeights
    tables: StoredWeights
    network_pieces: dict[str, Pieces]
    network_shapes: dict[str, tuple[int, ...]]
    vae_names: dict[str, str]
    vae_shapes: dict[str, tuple[int, ...]]
    text_files: tuple[list[Path], list[Path]] | None

    @property
    def precision(self) -> dict[str, bool]:
        """Return `fp16` and `bf16` of a configuration that runs the network in its stored dtype."""
        dtype = next(iter(self.network.entries.values())).dtype
        return {"fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}


def read_pipeline(folder: Path, dtype: torch.dtype | None, with_text: bool) -> Pipeline:
    """Return the content of a pipeline folder.

    Args:
        dtype: of the tensors; None: as they are stored.
        with_text: find the files of the text encoder too.

    Raises:
        UserError: the folder is not a CogVideoX pipeline, or its files do not fit together.
    """
    if not is_pipeline(folder):
        raise UserError(
            f"{folder} is not a pipeline of diffusers, it has no {PIPELINE_FILE}; name the folder that holds it"
        )
    config, weights = read_part(folder / "transformer", TRANSFORMER)
    source = str(folder / "transformer")
    shapes = weights.shapes
    pieces = from_diffusers(shapes, source)
    check_divisible(pieces, shapes, source)
    ours = {name: assembled_shape(parts, shapes) for name, parts in pieces.items()}
    family = detect_network(ours, source, bool(config.get("use_rotary_positional_embeddings")))
    vae_configuration, vae_weights = read_part(folder / "vae", AUTOENCODER)
    check_fixed(vae_configuration, VAE_FIXED, str(folder / "vae"))
    sizes = read_sizes(folder, config, vae_configuration, family)
    check_config(config, family, sizes, source)
    expected = table_shapes(family, sizes.grid(family.patch), sizes.text_length)
    learnt = [name for name in ours if name in TABLES]
    check_shapes({name: ours[name] for name in learnt}, {name: expected[name] for name in learnt}, source, ())
    vae_names = vae_from_diffusers(vae_weights)
    vae = StoredWeights({name: vae_weights.entries[theirs] for name, theirs in vae_names.items()})
    autoencoder = detect_autoencoder(vae.shapes, str(folder / "vae"))
    if autoencoder.z_channels != family.out_channels:
        raise UserError(
            f"{folder}: the VAE's latents have {autoencoder.z_channels} channels, the network's {family.out_channels}; "
            "copy both from one pipeline"
        )

    weights = weights.cast(dtype)
    entries = assembled(pieces, weights).entries
    table_dtype = entries["mixins.patch_embed.proj.weight"].dtype
    tables = read_extra_tables(folder / "transformer").cast(dtype).entries
    for name, tensor in computed_tables(family, sizes, table_dtype).items():
        if name in tables and tables[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} is {list(tables[name].shape)} instead of {list(tensor.shape)}")
        tables.setdefault(name, Stored.of(tensor))
    files = None
    if with_text and (folder / "text_encoder").is_dir():
        files = text_files(folder)
        check_text_encoder(files[0], family.text_hidden_size)
    return Pipeline(
        family=family,
        sizes=sizes,
        autoencoder=autoencoder,
        network=StoredWeights({**entries, **tables}),
        vae=vae.cast(dtype),
        tables=StoredWeights(tables),
        network_pieces=pieces,
        network_shapes=shapes,
        vae_names=vae_names,
        vae_shapes=vae_weights.shapes,
        text_files=files,
    )


def read_sizes(
    folder: Path, config: Mapping[str, Any], vae: Mapping[str, Any], family: NetworkFamily
) -> ModelSizes:  # fmt: skip
    """Return the sizes in a pipeline's files; missing ones are those of the released model.

    Raises:
        UserError: a size is not a number in range.
    """
    released = released_config(family)
    released["model"]["network_config"]["params"] |= family.parameters()
    usual = sizes_of_config(released, family, "the released model")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    found: dict[str, Any] = {
        "num_frames": config.get("sample_frames"),
        "latent_height": config.get("sample_height"),
        "latent_width": config.get("sample_width"),
        "text_length": config.get("max_text_seq_length"),
        "interpolation": None if family.rotary else config.get("spatial_interpolation_scale"),
        "scale_factor": vae.get("scaling_factor"),
        "shift_scale": scheduler.get("snr_shift_scale"),
    }
    if family.is_15 and found["text_length"] == DIFFUSERS_TEXT_LENGTH:
        found["text_length"] = None  # nothing in diffusers' 1.5 models depends on it
    for name, value in found.items():
        if value is None:
            found[name] = getattr(usual, name)
        elif name in WHOLE_SIZES and (type(value) is not int or not 0 < value <= LARGEST_SIZE):
            raise UserError(f"{folder}: {name}: got {shown(value)}; expected a whole number up to {LARGEST_SIZE}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{folder}: {name}: got {shown(value)}; expected a positive number")
    return ModelSizes(**found)


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], source: str) -> None:
    """Check that a config.json has the values of `fixed`, or lacks them, else raise UserError."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise UserError(f"{source}/config.json: {name}: got {shown(config[name])}; models here have {value!r}")


def check_config(config: Mapping[str, Any], family: NetworkFamily, sizes: ModelSizes, source: str) -> None:
    """Check that config.json describes the tensors, and a network that is the same here.

    Raises:
        UserError: it describes another network.
    """
    check_fixed(config, FIXED, source)
    told = transformer_config(family, sizes)
    for name in TOLD_TWICE:
        if config.get(name) not in (None, told[name]):
            raise UserError(
                f"{source}/config.json: {name} is {shown(config[name])}, but the tensors are of {told[name]!r}; "
                "copy both from one pipeline"
            )

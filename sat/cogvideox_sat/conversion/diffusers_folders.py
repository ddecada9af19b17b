"""Read and write the folder of a CogVideoX pipeline, without using diffusers.

model_index.json                                  the classes of the parts
transformer/  config.json, diffusion_pytorch_model*.safetensors, ...safetensors.index.json if there are several
vae/          config.json, diffusion_pytorch_model.safetensors
scheduler/    scheduler_config.json
text_encoder/, tokenizer/                         T5, as transformers writes it
"""

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cogvideox_sat.conversion.model_sizes import ModelSizes
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, open_weights
from cogvideox_sat.conversion.weight_family import AutoencoderFamily, NetworkFamily
from cogvideox_sat.latent_geometry import TIME_FACTOR
from cogvideox_sat.weights.diffusers_names import EXTRA_TABLES
from sgm.errors import UserError
from sgm.plain_json import parse_json
from sgm.weights import DIFFUSERS_FILES, INDEX_SUFFIX, PIPELINE_FILE, read_weight_map, safetensors_in

_, WEIGHTS_NAME = DIFFUSERS_FILES
TEXT_WEIGHTS_NAME = "model.safetensors"  # transformers' name
DIFFUSERS_VERSION = "0.32.0"  # the first version that reads all five families
NORM_GROUPS = 32  # groups of the autoencoder's channels, which its tensors do not show
TRANSFORMER, AUTOENCODER = "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------


def transformer_config(family: NetworkFamily, sizes: ModelSizes) -> dict[str, Any]:
    """Return the config.json that builds the same network in diffusers.

    Raises:
        UserError: diffusers has no such network.
    """
    if family.ofs_embed_dim not in (None, family.time_embed_dim):
        raise UserError(
            f"ofs_embed_dim is {family.ofs_embed_dim} and time_embed_dim {family.time_embed_dim}; diffusers takes only "
            "models in which both are equal"
        )
    if family.patch[1] != family.patch[2]:
        raise UserError(f"diffusers takes only square patches, not {family.patch[1]}x{family.patch[2]}")
    return {
        "_class_name": TRANSFORMER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": family.head_dim,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": family.in_channels,
        "max_text_seq_length": sizes.text_length,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-05,
        "num_attention_heads": family.num_attention_heads,
        "num_layers": family.num_layers,
        "ofs_embed_dim": family.ofs_embed_dim,
        "out_channels": family.out_channels,
        "patch_bias": True,
        "patch_size": family.patch[1],
        "patch_size_t": family.patch[0] if family.is_15 else None,
        "sample_frames": sizes.num_frames,
        "sample_height": sizes.latent_height,
        "sample_width": sizes.latent_width,
        "spatial_interpolation_scale": 1.875 if family.rotary else sizes.interpolation,
        "temporal_compression_ratio": TIME_FACTOR,
        "temporal_interpolation_scale": 1.0,
        "text_embed_dim": family.text_hidden_size,
        "time_embed_dim": family.time_embed_dim,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": family.learnt_positions,
        "use_rotary_positional_embeddings": family.rotary,
    }


def vae_config(family: AutoencoderFamily, scale_factor: float, is_15: bool) -> dict[str, Any]:
    """Return the config.json that builds the same autoencoder in diffusers.

    Raises:
        UserError: diffusers has no such autoencoder.
    """
    if len(family.widths) != 4:
        raise UserError(f"the autoencoder has {len(family.widths)} levels; that of CogVideoX pipelines has 4")
    if odd := [width for width in family.widths if width % NORM_GROUPS]:
        raise UserError(f"the autoencoder has {odd[0]} channels, which do not divide into {NORM_GROUPS} for its norms")
    return {
        "_class_name": AUTOENCODER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": list(family.widths),
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "force_upcast": True,
        "in_channels": family.in_channels,
        # The released 1.5 pipelines scale the latent of a first frame in this way.
        "invert_scale_latents": is_15,
        "latent_channels": family.z_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": family.num_res_blocks,
        "norm_eps": 1e-06,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": family.in_channels,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": scale_factor,
        "shift_factor": None,
        "temporal_compression_ratio": TIME_FACTOR,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def scheduler_config(family: NetworkFamily, shift_scale: float) -> dict[str, Any]:
    """Return the configuration of the released pipeline's scheduler.

    The 2B pipeline samples with DDIM, the others with DPM-Solver++.
    """
    return {
        "_class_name": "CogVideoXDPMScheduler" if family.rotary else "CogVideoXDDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "snr_shift_scale": shift_scale,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    }


def pipeline_index(family: NetworkFamily, with_text: bool) -> dict[str, Any]:
    """Return the content of model_index.json.

    Without T5, its parts must be given to `from_pretrained`.
    """
    absent = [None, None]
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if family.image_to_video else "CogVideoXPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_config(family, 1.0)["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"] if with_text else absent,
        "tokenizer": ["transformers", "T5Tokenizer"] if with_text else absent,
        "transformer": ["diffusers", TRANSFORMER],
        "vae": ["diffusers", AUTOENCODER],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write content as JSON, into a folder that is made if it does not exist."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def write_part(
    folder: Path, config: Mapping[str, Any], weights: StoredWeights, shard_bytes: int, file_name: str = WEIGHTS_NAME
) -> None:
    """Write config.json and the tensors of a part, and check them by reading them back.

    The tensors are in several files if they have more than `shard_bytes`.

    Args:
        file_name: the name of the tensors' file if there is only one: diffusers' name, or transformers'.

    Raises:
        UserError: the tensors do not read back as they were written.
    """
    write_json(folder / "config.json", config)
    shards = split(weights, shard_bytes)
    names = [file_name]
    if len(shards) > 1:
        stem, suffix = file_name.split(".", 1)
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map}
        write_json(folder / f"{stem}{INDEX_SUFFIX}", index)
    with tqdm(total=2 * len(weights), desc=folder.name, unit="tensor", leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard, bar.update)
        check_equal(open_weights(safetensors_in(folder)), weights, folder, bar.update)


def split(weights: StoredWeights, shard_bytes: int) -> list[StoredWeights]:
    """Return the tensors in order, in groups of at most `shard_bytes` or of one larger tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, like in weights.like.items():
        if groups[-1] and size + like.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += like.nbytes
    return [weights.select(group) for group in groups]


def write_safetensors(path: Path, weights: StoredWeights, done: Callable[[], Any] = lambda: None) -> None:
    """Write the file that safetensors' `save_file` writes, one tensor in memory at a time.

    The file consists of the length of a JSON header, the header with dtypes, shapes and positions, and the bytes of the
    tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, like in weights.like.items():
        header[name] = {
            "dtype": DTYPES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [offset, offset + like.nbytes],
        }
        offset += like.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that mapped tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights:
            file.write(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
            done()


def check_equal(
    written: StoredWeights, meant: StoredWeights, where: Path, done: Callable[[], Any] = lambda: None
) -> None:
    """Check that written tensors equal, bit by bit, the tensors that were meant to be written.

    Raises:
        UserError: they differ.
    """
    if written.shapes != meant.shapes:
        raise UserError(f"{where} does not read back as it was written, it holds other tensors; check the disk")
    for name in meant:
        ours, theirs = written[name], meant[name]
        if ours.dtype != theirs.dtype or not torch.equal(
            *(t.contiguous().view(-1).view(torch.uint8) for t in (ours, theirs))
        ):
            raise UserError(f"{where} does not read back as it was written, {name} differs; check the disk")
        done()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file does not exist, or does not hold a JSON object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def read_part(folder: Path, class_name: str) -> tuple[dict[str, Any], StoredWeights]:
    """Return config.json and the tensors of a part of a pipeline.

    Raises:
        UserError: they cannot be read, or the part has another class.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != class_name:
        raise UserError(f"{folder}: got a {config.get('_class_name')}; expected a {class_name}")
    return config, open_weights(safetensors_in(folder))


def read_extra_tables(folder: Path) -> StoredWeights:
    """Return the tensors in `EXTRA_TABLES` beside diffusers' files, by our names."""
    path = folder / EXTRA_TABLES
    return open_weights(path) if path.is_file() else StoredWeights({})


# ---------------------------------------------------------------------------------------------------------------------
# T5
# ---------------------------------------------------------------------------------------------------------------------

_ENCODER_FILE = re.compile(r"(generation_)?config\.json|(model|pytorch_model)[\w-]*\.(safetensors|bin)(\.index\.json)?")
_TOKENIZER_FILE = re.compile(r"spiece\.model|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json")


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a T5 encoder and of its tokenizer below `folder`.

    They are in the folder itself, or in `text_encoder` and `tokenizer`, or in one of these ways in the only snapshot of
    a cache of the hub.

    Raises:
        UserError: files are missing, or the cache holds several models.
    """
    snapshots = [path for path in folder.glob("models--*/snapshots/*") if path.is_dir()]
    if len(snapshots) > 1:
        raise UserError(f"{folder} holds {len(snapshots)} models of the hub; name the folder of T5, snapshots/...")
    folder = snapshots[0] if snapshots else folder
    encoder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    encoder_files = _matching(encoder, _ENCODER_FILE)
    if any(file.suffix == ".safetensors" for file in encoder_files):
        encoder_files = [file for file in encoder_files if ".bin" not in file.name]
    tokenizer_files = _matching(tokenizer, _TOKENIZER_FILE)
    names = {file.name for file in encoder_files}
    if "config.json" not in names or not any(file.suffix in (".safetensors", ".bin") for file in encoder_files):
        raise UserError(f"{encoder}: no T5 encoder; expected config.json and model*.safetensors")
    if not any(file.name in ("spiece.model", "tokenizer.json") for file in tokenizer_files):
        raise UserError(f"{tokenizer}: no tokenizer; expected spiece.model or tokenizer.json")
    for index in (file for file in encoder_files if file.name.endswith((INDEX_SUFFIX, ".bin.index.json"))):
        read_weight_map(index)  # checks that the files in the index exist
    return encoder_files, tokenizer_files


def check_text_encoder(encoder_files: Sequence[Path], hidden_size: int) -> None:
    """Check that the encoder is a T5 of the width `hidden_size`, else raise UserError."""
    config = read_json(next(file for file in encoder_files if file.name == "config.json"))
    if config.get("model_type") != "t5" or config.get("d_model") != hidden_size:
        raise UserError(
            f"the text encoder is a {config.get('model_type')} of width {config.get('d_model')}; the network takes a "
            f"t5 of width {hidden_size}"
        )


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and pattern.fullmatch(file.name))


def write_text_encoder(files: Sequence[Path], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the text encoder in `files`, see `text_files`, into a folder, in `dtype`."""
    entries: dict[str, Stored] = {}
    for file in files:
        if file.suffix in (".safetensors", ".bin"):
            entries |= open_weights(file).entries
    config = read_json(next(file for file in files if file.name == "config.json"))
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_part(folder, config, StoredWeights(entries).cast(dtype), shard_bytes, TEXT_WEIGHTS_NAME)
    copy_files([file for file in files if file.name == "generation_config.json"], folder)


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder, piece by piece, and check their sizes."""
    folder.mkdir(exist_ok=True)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=folder.name, unit="B", unit_scale=True, leave=False) as bar:
        for file in files:
            with file.open("rb") as source, (folder / file.name).open("wb") as sink:
                while block := source.read(2**24):
                    bar.update(sink.write(block))
    for file in files:
        target = folder / file.name
        if target.stat().st_size != file.stat().st_size:
            raise UserError(f"{file} changed while it was copied; copy it again")


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is a pipeline of diffusers."""
    return (folder / PIPELINE_FILE).is_file()

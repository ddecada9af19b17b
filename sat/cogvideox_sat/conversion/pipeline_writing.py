"""Write a pipeline folder of diffusers from weights of this project, and verify it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogvideox_sat.conversion.diffusers_configs import pipeline_index, scheduler_config
from cogvideox_sat.conversion.diffusers_folders import write_json, write_part
from cogvideox_sat.conversion.model_sizes import ModelSizes, computed_tables
from cogvideox_sat.conversion.safetensors_writing import check_equal, stream_safetensors
from cogvideox_sat.conversion.stored_weights import StoredWeights, open_weights
from cogvideox_sat.conversion.text_encoder_files import copy_files, write_text_encoder
from cogvideox_sat.conversion.weight_family import NetworkFamily
from cogvideox_sat.files.atomic import new_folder
from cogvideox_sat.weights.diffusers_names import EXTRA_TABLES, UNUSED_TABLE
from sgm.weights import PIPELINE_FILE


@dataclass
class PipelineContent:
    """Content of a pipeline folder: the network, the VAE or both.

    Attributes:
        family, sizes: of the network; None without it.
        parts: `transformer` and `vae`, each with its config.json and its tensors under diffusers' names.
        tables: tensors of the network that diffusers' format does not store.
        text_files: files of the text encoder and of the tokenizer; None: without them.
        text_dtype: the dtype to convert the text encoder to; None: its files are copied.
    """

    family: NetworkFamily | None = None
    sizes: ModelSizes | None = None
    parts: dict[str, tuple[Mapping[str, Any], StoredWeights]] = field(default_factory=dict)
    tables: StoredWeights | None = None
    text_files: tuple[list[Path], list[Path]] | None = None
    text_dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Return the approximate size of the folder in bytes."""
        tensors = sum(weights.nbytes for _, weights in self.parts.values())
        texts = sum(file.stat().st_size for group in self.text_files or () for file in group)
        return tensors + texts + (self.tables.nbytes if self.tables else 0)


def write_pipeline(content: PipelineContent, output: Path, shard_bytes: int) -> None:
    """Write the folder, and read the tensors back.

    `scheduler/` and model_index.json are written if both parts are there.

    Args:
        output: the folder, which does not exist yet.
        shard_bytes: largest size of a file of tensors.

    Raises:
        UserError: the folder cannot be written, or does not read back as it was written.
    """
    with new_folder(output, content.nbytes) as folder:
        for name, (config, weights) in content.parts.items():
            write_part(folder / name, config, weights, shard_bytes)
        if content.tables:
            tables = folder / "transformer" / EXTRA_TABLES
            stream_safetensors(tables, content.tables)
            check_equal(open_weights(tables), content.tables, folder)
        if content.text_files:
            encoder, tokenizer = content.text_files
            if content.text_dtype is None:
                copy_files(encoder, folder / "text_encoder")
            else:
                write_text_encoder(encoder, folder / "text_encoder", content.text_dtype, shard_bytes)
            copy_files(tokenizer, folder / "tokenizer")
        if content.family and content.sizes and len(content.parts) == 2:
            scheduler = scheduler_config(content.family, content.sizes.shift_scale)
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            write_json(folder / PIPELINE_FILE, pipeline_index(content.family, content.text_files is not None))


def unreproducible(tables: StoredWeights, family: NetworkFamily, sizes: ModelSizes) -> StoredWeights:
    """Return the tables that diffusers' format lacks and that cannot be computed identically."""
    if not tables:
        return tables
    rows = tables.shapes[UNUSED_TABLE][0] if UNUSED_TABLE in tables else 0
    dtype = next(iter(tables.entries.values())).dtype
    computed = computed_tables(family, sizes, dtype, rows)
    return tables.select(
        name for name in tables if name in computed and not torch.equal(computed[name], tables[name])
    )  # fmt: skip

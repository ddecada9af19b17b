"""Convert a CogVideoX pipeline of diffusers to checkpoints, with a configuration for them.

  python tools/convert_weight_hf2sat.py --hf_path THUDM/CogVideoX-2b --output_path checkpoints/cogvideox_2b
  bash inference.sh --base checkpoints/cogvideox_2b/model.yaml checkpoints/cogvideox_2b/inference.yaml

`--hf_path` is a folder, or the name of a repository on the Hugging Face hub, which is first downloaded to the hub's
cache. The output is
    transformer/latest, transformer/1/mp_rank_00_model_states.pt    the network
    vae/3d-vae.pt                                                   the VAE
    t5-v1_1-xxl/                                                    text encoder and tokenizer, copied
    model.yaml, inference.yaml                                      configurations with paths to these files

Sampling does not need a conversion: `load` and the VAE's `ckpt_path` in a configuration also accept the folder of a
pipeline. Exit codes: 0 the folder is written, 2 the input has an error, and nothing is written.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox_sat.commands.hub_inputs import local_folder
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.commands.tool_parser import ToolParser, check_output_folder, run_tool
from sgm.errors import UserError

if TYPE_CHECKING:
    from cogvideox_sat.conversion.pipeline_reading import Pipeline

logger = logging.getLogger(__name__)

T5_FOLDER = "t5-v1_1-xxl"
OWN_NAMES = ("model.yaml",)
# Patterns of the files to download; the text encoder has half of their bytes.
WITHOUT_T5 = (
    "model_index.json",
    "scheduler/*.json",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
)
WITH_T5 = (*WITHOUT_T5, "text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(convert, arguments, logger.name)


def build_parser() -> ToolParser:
    """Return the parser of the command line."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--hf_path", required=True, metavar="PATH", help="a pipeline: a folder, or a repository on the hub")
    add("--output_path", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add("--revision", help="revision of the repository (default: its main branch)")
    add("--cache_dir", type=Path, metavar="FOLDER", help="folder for downloads (default: the hub's cache)")
    add("--text_encoder", action=argparse.BooleanOptionalAction, default=True, help="copy T5 and its tokenizer")
    add("--fp16", action="store_true", help="write float16 (default: the stored dtype)")
    add("--bf16", action="store_true", help="write bfloat16")
    parser.add_writing_arguments()
    return parser


def convert(arguments: Sequence[str] | None) -> None:
    """Convert a pipeline as the arguments say.

    Raises:
        UserError: arguments contradict each other, the pipeline cannot be read, or the output cannot be written.
    """
    options = build_parser().parse_args(arguments)
    if options.fp16 and options.bf16:
        raise UserError("--fp16 and --bf16 are both given; choose one")
    output = options.output_path
    check_output_folder(output, options, OWN_NAMES, [Path(options.hf_path)])  # before anything is downloaded
    patterns = WITH_T5 if options.text_encoder else WITHOUT_T5
    folder = local_folder(options.hf_path, patterns, "--hf_path", options.revision, options.cache_dir)
    check_output_folder(output, options, OWN_NAMES, [folder])
    tell_places()

    import torch

    from cogvideox_sat.conversion.model_sizes import title
    from cogvideox_sat.conversion.pipeline_reading import read_pipeline

    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None
    pipeline = read_pipeline(folder, dtype, options.text_encoder)
    logger.info("%s is %s", options.hf_path, title(pipeline.family))
    if options.text_encoder and pipeline.text_files is None:
        logger.info("%s has no text encoder; the configuration names that of the released model", folder)
    if options.dry_run:
        show(pipeline)
    else:
        write(pipeline, output)
        logger.info("wrote %s", output)
        command = as_started("python sat/sample_video.py", runnable=True)
        logger.info("sample with: %s --base %s %s", command, output / "model.yaml", output / "inference.yaml")


def show(pipeline: "Pipeline") -> None:
    """Log how each tensor of the checkpoints is made."""
    from cogvideox_sat.conversion.assembled_weights import log_pieces
    from cogvideox_sat.weights.diffusers_names import Piece

    log_pieces(pipeline.network_pieces, pipeline.network_shapes)
    log_pieces({ours: (Piece(theirs),) for ours, theirs in pipeline.vae_names.items()}, pipeline.vae_shapes)
    for name, tensor in pipeline.tables.like.items():
        logger.info("%s %s <- computed, or stored beside diffusers' files", name, list(tensor.shape))


def write(pipeline: "Pipeline", output: Path) -> None:
    """Write the checkpoints and configurations, and verify them.

    Raises:
        UserError: they cannot be written, or do not read back as they were written.
    """
    from tqdm import tqdm

    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.conversion.checkpoint_folders import FILE, ITERATION, write_tensors
    from cogvideox_sat.conversion.config_writing import inference_config, model_config, write_yaml
    from cogvideox_sat.conversion.model_sizes import sizes_of_config
    from cogvideox_sat.conversion.safetensors_writing import check_equal
    from cogvideox_sat.conversion.stored_weights import open_weights
    from cogvideox_sat.conversion.text_encoder_files import copy_files
    from cogvideox_sat.files.atomic import new_folder
    from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX

    family, files = pipeline.family, pipeline.text_files
    final = output.resolve()
    config = model_config(
        family,
        pipeline.sizes,
        pipeline.autoencoder,
        load=final / "transformer",
        vae=final / "vae" / "3d-vae.pt",
        text_encoder=final / T5_FOLDER if files else None,
        **pipeline.precision,
    )
    needed = pipeline.network.nbytes + pipeline.vae.nbytes
    needed += sum(file.stat().st_size for group in files or () for file in group)
    with new_folder(output, needed) as part:
        (part / "transformer" / ITERATION).mkdir(parents=True)
        network_file, vae_file = part / "transformer" / ITERATION / FILE, part / "vae" / "3d-vae.pt"
        vae_file.parent.mkdir()
        write_tensors(network_file, pipeline.network.like, pipeline.network.__getitem__)
        write_tensors(vae_file, pipeline.vae.like, pipeline.vae.__getitem__, key="state_dict", prefix="")
        written = open_weights(network_file).renamed(lambda name: name.removeprefix(NETWORK_PREFIX))
        total = len(pipeline.network) + len(pipeline.vae)
        with tqdm(total=total, desc="reading back", unit="tensor", leave=False) as bar:
            check_equal(written, pipeline.network, network_file, bar.update)
            check_equal(open_weights(vae_file), pipeline.vae, vae_file, bar.update)
        (part / "transformer" / "latest").write_text(ITERATION)
        if files:
            copy_files([*files[0], *files[1]], part / T5_FOLDER)
        write_yaml(part / "model.yaml", config, family, "goes before inference.yaml, or sft.yaml")
        write_yaml(part / "inference.yaml", inference_config(family), family, "goes after model.yaml")
        described = sizes_of_config(load_configs([part / "model.yaml", part / "inference.yaml"]), family, "model.yaml")
        if described != pipeline.sizes:
            raise UserError(f"model.yaml would describe {described}, but the model has {pipeline.sizes}")

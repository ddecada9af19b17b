"""Convert a LoRA file of diffusers or peft to an adapter for `lora_load`.

  python tools/import_hf_lora.py --lora_path pytorch_lora_weights.safetensors --output checkpoints/lora
  bash inference.sh --base configs/cogvideox_5b.yaml checkpoints/lora/lora.yaml configs/inference.yaml

The output folder holds the adapter and `lora.yaml`, which adds the adapter to the configuration of its model. The
strength alpha/rank stays that of the file: differences are multiplied into the matrices B. `--lora_path` is a file, a
folder, or the name of a repository on the hub. The adapter may adapt attn1.to_q, to_k, to_v and to_out of any layers.

Exit codes: 0 the folder is written, 2 the input has an error.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from cogvideox_sat.commands.hub_inputs import local_file
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, check_output_folder, positive, run_tool
from cogvideox_sat.conversion.lora_names import LORA_FILE

logger = logging.getLogger(__name__)

OWN_NAMES = ("latest",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(import_lora, arguments, logger.name)


def import_lora(arguments: Sequence[str] | None) -> None:
    """Convert an adapter as the arguments say."""
    parser = ToolParser(__doc__)
    parser.add_argument("--lora_path", required=True, metavar="PATH", help="file, folder, or repository on the hub")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the adapter's folder")
    parser.add_argument(
        "--lora_alpha",
        type=positive,
        default=1.0,
        help="lora_alpha for the configurations that will use it (default: 1)",
    )
    parser.add_argument(
        "--file_alpha",
        type=positive,
        help="alpha of the training (default: the value in the file, or the rank)",
    )
    parser.add_writing_arguments()
    options = parser.parse_args(arguments)
    check_output_folder(options.output, options, OWN_NAMES, [Path(options.lora_path)])  # before a download
    path = local_file(options.lora_path, LORA_FILE, "--lora_path")
    check_output_folder(options.output, options, OWN_NAMES, [path])
    tell_places()

    from cogvideox_sat.conversion.checkpoint_folders import write_checkpoint
    from cogvideox_sat.conversion.diffusers_lora_files import read_diffusers_adapter

    adapter = read_diffusers_adapter(path, options.file_alpha)
    adapter = adapter.with_alpha(options.lora_alpha)
    count = len(adapter.layers)
    logger.info("%s: %d layers, width %d, rank %d", adapter.source, count, adapter.width, adapter.rank)
    if options.dry_run:
        for key, tensor in adapter.matrices.items():
            shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            logger.info("%s -> %s %s", key.diffusers_name, key.sat_name, shape)
        return
    tensors = {key.sat_name: adapter.matrices[key] for key in sorted(adapter.matrices)}
    config = configuration(options.output, adapter.rank, options.lora_alpha, adapter.layers)
    write_checkpoint(options.output, tensors, tensors.__getitem__, {"lora.yaml": config})
    logger.info("wrote %s: add %s after the model's configuration", options.output, options.output / "lora.yaml")


def configuration(folder: Path, rank: int, alpha: float, layers: list[int]) -> str:
    """Return the configuration that adds the adapter in `folder`."""
    import yaml

    params = {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "layer_range": layers}
    lora_config = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
    content = {
        "args": {"lora_load": str(folder.resolve())},  # from any working directory
        "model": {"network_config": {"params": {"modules": {"lora_config": lora_config}}}},
    }
    comment = "# The adapter beside this file; give it after the model's own file, which is one without LoRA.\n"
    return comment + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)

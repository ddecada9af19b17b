"""Convert a LoRA adapter that was trained here to a file for diffusers.

  python tools/export_sat_lora_weight.py --sat_pt_path ckpts/RUN --lora_save_directory exported

In diffusers, `pipe.load_lora_weights("exported")` then applies the adapter at its trained strength: alpha and rank are
in the file's header, and no scale needs to be set. `--sat_pt_path` is a run, one of its iterations (`1000`, `1000-ema`)
or a file, with or without the base model's weights, for any CogVideoX model.

diffusers before 0.34, and programs that do not read the header, assume that alpha equals the rank; for these, give
`--fold_scale`.

Exit codes: 0 the file is written, 2 the input has an error.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, check_output, locate_inputs, positive, run_tool
from cogvideox_sat.conversion.lora_names import LORA_FILE
from sgm.errors import UserError

if TYPE_CHECKING:
    from cogvideox_sat.conversion.lora_matrices import Adapter

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(export, arguments, logger.name)


def export(arguments: Sequence[str] | None) -> None:
    """Convert an adapter as the arguments say.

    Raises:
        UserError: the checkpoint holds no adapter, or the output exists or cannot be written.
    """
    parser = ToolParser(__doc__)
    parser.add_argument("--sat_pt_path", type=Path, required=True, metavar="PATH", help="checkpoint with the adapter")
    parser.add_argument(
        "--lora_save_directory", type=Path, required=True, metavar="FOLDER", help=f"where to write {LORA_FILE}"
    )
    parser.add_argument(
        "--lora_alpha",
        type=positive,
        help="lora_alpha of the training configuration (default: the value in training_config.yaml of the run, or 1)",
    )
    parser.add_argument("--fold_scale", action="store_true", help="multiply B by alpha/rank and set alpha to the rank")
    parser.add_writing_arguments()
    options = parser.parse_args(arguments)
    target = options.lora_save_directory / LORA_FILE
    if options.lora_save_directory.exists() and not options.lora_save_directory.is_dir():
        raise UserError(f"--lora_save_directory: {options.lora_save_directory} is a file; name a folder")
    locate_inputs(options, "sat_pt_path")
    check_output(target, options)
    tell_places()

    from cogvideox_sat.conversion.sat_lora_files import read_sat_adapter

    adapter = read_sat_adapter(options.sat_pt_path, options.lora_alpha)
    alpha = float(f"{next(iter(adapter.scales.values())) * adapter.rank:.15g}")  # 1/49 * 49 is not 1
    if options.fold_scale:
        alpha = float(adapter.rank)
        adapter = adapter.with_alpha(alpha)
    count = len(adapter.layers)
    logger.info("%s: %d layers, width %d, rank %d, alpha %g", adapter.source, count, adapter.width, adapter.rank, alpha)
    if options.dry_run:
        for key, tensor in adapter.matrices.items():
            shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            logger.info("%s -> %s %s", key.sat_name, key.diffusers_name, shape)
        return
    write(target, adapter, alpha)
    logger.info("wrote %s: pipe.load_lora_weights('%s')", target, options.lora_save_directory)


def write(target: Path, adapter: "Adapter", alpha: float) -> None:
    """Write the file and check that reading it gives the same values.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm import tqdm

    from cogvideox_sat.conversion.diffusers_lora_files import METADATA_KEY
    from cogvideox_sat.conversion.lora_names import diffusers_module
    from cogvideox_sat.conversion.safetensors_writing import equal_bits
    from cogvideox_sat.files.atomic import new_file

    whole_alpha = int(alpha) if alpha.is_integer() else alpha
    modules = [diffusers_module(projection) for projection in sorted(adapter.scales)]
    config = {"r": adapter.rank, "lora_alpha": whole_alpha, "target_modules": modules}
    header = {
        "format": "pt",
        METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True),
    }
    tensors = {}
    for key, tensor in tqdm(adapter.matrices.items(), desc="reading", unit="tensor", leave=False):
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes  # of a larger tensor, which safetensors refuses
        tensors[key.diffusers_name] = tensor.clone() if is_part else tensor.contiguous()
    with new_file(target, sum(tensor.nbytes for tensor in tensors.values())) as part:
        mode = part.stat().st_mode  # safetensors would make the file private
        save_file(tensors, part, header)
        part.chmod(mode)
        with safe_open(part, "pt") as file:
            same = file.metadata() == header and set(file.keys()) == tensors.keys()
            bar = tqdm(tensors.items(), desc="reading back", unit="tensor", leave=False)
            if not same or not all(equal_bits(file.get_tensor(name), tensor) for name, tensor in bar):
                raise UserError(f"{target} does not read back as it was written; the file was removed")

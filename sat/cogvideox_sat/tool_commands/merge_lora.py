"""Merge LoRA adapters into their base model: one checkpoint without a lora_config.

  python tools/merge_lora.py --load checkpoints/cogvideox_5b/transformer --lora ckpts/RUN --output checkpoints/merged
  python tools/merge_lora.py --load BASE --lora ckpts/STYLE:0.8 exported:0.5 --output OUT

`--lora PATH:WEIGHT` adds an adapter at WEIGHT times its own strength. PATH is a run, one of its iterations (`1000`,
`1000-ema`), a file, or a LoRA file or folder of diffusers. `--load` is a full checkpoint; if it contains an adapter,
this adapter is merged, too. `--load` can also be a run whose `training_config.yaml` names its base model; then `--load
ckpts/RUN` alone is enough. Sums are computed in float32, and the result has the dtype of the base. Exit codes: 0 the
checkpoint is written, 2 the input has an error.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, check_output_folder, locate_inputs, positive, run_tool
from cogvideox_sat.configuration.adapter_lists import located_adapters
from sgm.errors import UserError

if TYPE_CHECKING:
    from cogvideox_sat.conversion.network_sources import NetworkSource

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(merge, arguments, logger.name)


def merge(arguments: Sequence[str] | None) -> None:
    """Merge adapters as the arguments say.

    Raises:
        UserError: an input cannot be read, adapters do not fit the model, or the output exists or cannot be written.
    """
    parser = ToolParser(__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="PATH", help="checkpoint of the base model")
    parser.add_argument(
        "--lora", nargs="+", action="extend", metavar="PATH[:WEIGHT]", help="adapters (default weight: 1)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the merged checkpoint")
    parser.add_argument(
        "--lora_alpha", type=positive, help="alpha of all adapters (default: the value recorded beside each, or 1)"
    )
    parser.add_writing_arguments()
    options = parser.parse_args(arguments)
    chosen = located_adapters(options.lora or [], "--lora")
    sources = [*locate_inputs(options, "load"), *(path for path, _ in chosen)]
    check_output_folder(options.output, options, ["latest"], sources)
    tell_places()

    from cogvideox_sat.conversion.checkpoint_folders import write_checkpoint
    from cogvideox_sat.conversion.lora_files import read_adapter
    from cogvideox_sat.conversion.network_sources import open_network

    further = [(read_adapter(path, options.lora_alpha), weight) for path, weight in chosen]
    source = open_network(options.load, lora_alpha=options.lora_alpha, further=further)
    if not source.adapters:
        raise UserError(f"--load: {options.load} holds no adapter; name at least one with --lora")
    if options.dry_run:
        show(source)
        return
    write_checkpoint(options.output, source.weights.like, source.weights.__getitem__)
    logger.info("wrote %s: load it with a configuration without LoRA", options.output)


def show(source: "NetworkSource") -> None:
    """Log each tensor, and whether it is merged."""
    from cogvideox_sat.conversion.lora_names import PROJECTIONS_OF, base_weight

    adapted = {
        base_weight(layer, module)
        for adapter, _ in source.adapters
        for layer in adapter.layers
        for module in PROJECTIONS_OF
    }
    for name, tensor in source.weights.like.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        logger.info("%s %s %s: %s", name, list(tensor.shape), dtype, "merged" if name in adapted else "unchanged")

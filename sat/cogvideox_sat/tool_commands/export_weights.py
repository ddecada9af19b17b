"""Write the weights of a network's or VAE's checkpoint as one safetensors file to share.

  python tools/export_weights.py --input ckpts/RUN/5000-ema --output model.safetensors --dtype float16
  python tools/export_weights.py --input ckpts/vae-RUN/3d-vae.pt --output vae.safetensors

`--input` is anything that `load:` or the `ckpt_path:` of a VAE accepts: a run, one of its iterations (`1000`,
`1000-ema`), or a file. The same settings accept the resulting safetensors file. It holds only weights. Exit codes: 0
the file is written, 2 the input has an error.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, check_output, check_safetensors_name, locate_inputs, run_tool
from sgm.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(export, arguments, logger.name)


def export(arguments: Sequence[str] | None) -> None:
    """Write the weights as the arguments say.

    Raises:
        UserError: the checkpoint cannot be read, or the output exists or cannot be written.
    """
    parser = ToolParser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="a checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to write (default: unchanged)")
    parser.add_writing_arguments()
    options = parser.parse_args(arguments)
    check_safetensors_name(options.output)
    check_output(options.output, options, locate_inputs(options, "input"))
    tell_places()

    import torch

    from cogvideox_sat.conversion.stored_weights import all_finite
    from cogvideox_sat.files.atomic import write_safetensors
    from cogvideox_sat.weights.checkpoint_files import checkpoint_shares, network_weights
    from cogvideox_sat.weights.rank_shares import cuts_by_name, recut

    files = checkpoint_shares(options.input)
    file = files[0] if len(files) == 1 else files[0].parent
    shares = [network_weights(each) for each in files]
    weights = shares[0] if len(shares) == 1 else recut(shares, cuts_by_name(shares[0]), 0, 1, str(file))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    cast = {
        name: tensor.to(dtype if tensor.is_floating_point() else None).contiguous() for name, tensor in weights.items()
    }
    if spoilt := [name for name, tensor in cast.items() if not all_finite(tensor)]:
        if all_finite(weights[spoilt[0]]):
            raise UserError(f"{file}: {spoilt[0]} is too large for {options.dtype}; choose another --dtype")
        raise UserError(f"{file}: {spoilt[0]} is not finite; name another checkpoint")
    size = sum(tensor.nbytes for tensor in cast.values())
    logger.info("%s: %d tensors, %.2f MB", file, len(cast), size / 1e6)
    if options.dry_run:
        return
    write_safetensors(options.output, cast)
    logger.info("wrote %s", options.output)

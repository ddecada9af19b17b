"""Writes the weights of a checkpoint, of the network or of a VAE, as one safetensors file to share.

`--help` tells how; `cogvideox_sat.tool_commands.export_weights` does it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.export_weights import export, main  # noqa: E402

__all__ = ["export", "main"]

if __name__ == "__main__":
    sys.exit(main())

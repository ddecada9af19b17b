"""Write the weights of a checkpoint, of the network or of a VAE, as one safetensors file.

`--help` describes the arguments; `cogvideox_sat.tool_commands.export_weights` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.export_weights import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

"""Encode a data set once by the VAE and the text encoder, for training without them.

`--help` describes the arguments; `cogvideox_sat.tool_commands.precompute_latents` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.precompute_latents import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

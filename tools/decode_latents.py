"""Decode latents into videos: those of sampling, and the samples/ of a training run.

`--help` describes the arguments; `cogvideox_sat.tool_commands.decode_latents` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.decode_latents import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

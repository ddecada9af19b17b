"""Convert a CogVideoX pipeline of diffusers to SwissArmyTransformer checkpoints.

`--help` describes the arguments; `cogvideox_sat.tool_commands.convert_weight_hf2sat` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.convert_weight_hf2sat import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

"""Convert a LoRA adapter of this project to a file for diffusers.

`--help` describes the arguments; `cogvideox_sat.tool_commands.export_sat_lora_weight` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.export_sat_lora_weight import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

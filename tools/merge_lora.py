"""Add LoRA adapters to the weights of their base model, for use without a lora_config.

`--help` describes the arguments; `cogvideox_sat.tool_commands.merge_lora` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.merge_lora import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

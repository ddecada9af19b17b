"""Convert a LoRA file of diffusers or peft to an adapter for `lora_load`.

`--help` describes the arguments; `cogvideox_sat.tool_commands.import_hf_lora` is the implementation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.import_hf_lora import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

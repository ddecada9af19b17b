"""Tells how much memory a run of a configuration will take. It needs neither the weights nor the data.

`--help` tells how; `cogvideox_sat.tool_commands.estimate_memory` does it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.tool_commands.estimate_memory import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

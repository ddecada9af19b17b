"""Locate the files that are part of the program: `configs/` and `assets/`.

Nothing here imports PyTorch.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_DATA = _PACKAGE / "shipped"  # made by setup.py; a checkout has these files at its root

INSTALLED = _DATA.is_dir()
# The root of the repository, or the data folder of an installed package.
ROOT = _DATA if INSTALLED else _PACKAGE.parents[1]
CONFIGS = ROOT / "configs"

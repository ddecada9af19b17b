"""Where the files are that come with the program: `configs/` and `assets/`. Nothing here imports PyTorch."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_DATA = _PACKAGE / "shipped"  # which setup.py makes; a checkout has its files at its root

INSTALLED = _DATA.is_dir()
# The root of the repository; of an installed package, the folder of its data.
ROOT = _DATA if INSTALLED else _PACKAGE.parents[1]
CONFIGS = ROOT / "configs"

"""Where the files are that come with the program: `configs/`, `assets/`, `tools/`. Nothing here imports PyTorch."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]

# The root of the repository; of an installed package, the folder of its data.
ROOT = _CHECKOUT if (_CHECKOUT / "sat" / _PACKAGE.name).is_dir() else _PACKAGE / "shipped"
CONFIGS = ROOT / "configs"

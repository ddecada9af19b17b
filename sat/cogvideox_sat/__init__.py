"""Training and sampling of the CogVideoX video models.

Use it as `import cogvideox_sat as cv`, then `cv.load("tiny")`. CONTRIBUTING.md has the map of the packages.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvideox_sat.python_api.call_progress import Update as Update
    from cogvideox_sat.python_api.converting import convert as convert
    from cogvideox_sat.python_api.loading import load as load
    from cogvideox_sat.python_api.pipeline import Pipeline as Pipeline
    from cogvideox_sat.python_api.results import Video as Video
    from cogvideox_sat.python_api.training import TrainingRun as TrainingRun
    from cogvideox_sat.python_api.training import train as train
    from cogvideox_sat.sampling.session import SamplingCancelled as SamplingCancelled
    from cogvideox_sat.version import __version__ as __version__
    from sgm.errors import UserError as UserError

_NAMES = {
    "__version__": "cogvideox_sat.version",
    "load": "cogvideox_sat.python_api.loading",
    "train": "cogvideox_sat.python_api.training",
    "convert": "cogvideox_sat.python_api.converting",
    "TrainingRun": "cogvideox_sat.python_api.training",
    "Pipeline": "cogvideox_sat.python_api.pipeline",
    "Update": "cogvideox_sat.python_api.call_progress",
    "Video": "cogvideox_sat.python_api.results",
    "SamplingCancelled": "cogvideox_sat.sampling.session",
    "UserError": "sgm.errors",
}


def __getattr__(name: str) -> Any:
    """Return one of the names above; its module is imported at the first access."""
    if name in _NAMES:
        import importlib

        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return all names, including those whose modules are not imported yet."""
    return sorted({*globals(), *_NAMES})

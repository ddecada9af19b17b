"""The version of this project, which pyproject.toml reads."""

__version__ = "0.1.0"

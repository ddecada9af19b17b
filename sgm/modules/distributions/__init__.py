"""The original's import paths of distributions."""

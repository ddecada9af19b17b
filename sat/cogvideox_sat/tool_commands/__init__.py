"""The conversion tools: `tools/NAME.py`, and `cogvideox convert NAME` where the package is installed."""

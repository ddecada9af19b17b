"""The tools that convert weights and latents.

They are started as `tools/NAME.py`, or as `cogvideox convert NAME` if the package is installed.
"""

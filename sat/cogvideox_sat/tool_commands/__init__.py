"""The tools that convert weights and latents: `tools/NAME.py`, and `cogvideox convert NAME` where it is installed."""

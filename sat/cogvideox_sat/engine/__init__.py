"""The pieces that `diffusion_video.SATVideoDiffusionEngine` is made of."""

"""The mathematics of diffusion: schedules, denoisers, guidance, samplers and losses."""

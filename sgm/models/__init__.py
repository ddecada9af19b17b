"""Models that bind networks, losses and checkpoints together."""

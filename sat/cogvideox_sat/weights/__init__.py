"""Load checkpoints into the network."""

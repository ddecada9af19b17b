"""Loading checkpoints into the network."""

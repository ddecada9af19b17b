"""How much memory parts of a run take, without their weights."""

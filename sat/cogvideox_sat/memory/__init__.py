"""Compute the memory of parts of a run without loading weights."""

"""Passes over large tensors, each of which reads and writes them once."""

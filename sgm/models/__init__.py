"""Whole models: autoencoders."""

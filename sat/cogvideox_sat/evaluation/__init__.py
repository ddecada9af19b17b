"""Measures for videos and for VAEs."""

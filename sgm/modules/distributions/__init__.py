"""Paths under which other code imports distributions."""

"""Paths under which configurations in the wild name parts of the losses."""

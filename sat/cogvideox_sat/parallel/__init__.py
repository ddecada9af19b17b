"""The processes of a run, and the device of each."""

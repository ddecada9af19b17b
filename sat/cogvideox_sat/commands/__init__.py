"""Prepare commands: flags, launchers, paths of inputs, exit codes."""

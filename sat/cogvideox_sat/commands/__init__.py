"""What commands share before they do their work: flags, launchers, paths of inputs, exit codes."""

"""Read, merge and check YAML files and arguments."""

"""YAML files and arguments: read, merged, checked."""

"""Training and sampling of the CogVideoX video models. CONTRIBUTING.md has the map of the packages."""

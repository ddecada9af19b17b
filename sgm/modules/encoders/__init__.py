"""Conditioning: from the entries of a batch (text, vectors) to the network's inputs."""

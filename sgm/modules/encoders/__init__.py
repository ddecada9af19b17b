"""Conditioning: from what a batch says (text, vectors) to what the network takes."""

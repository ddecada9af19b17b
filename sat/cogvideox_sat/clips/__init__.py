"""Training data: which clips there are, and their pixels or latents."""

"""Find the clips of training data, and read their pixels or latents."""

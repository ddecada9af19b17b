"""Parts that autoencoders share, in two and in three dimensions."""

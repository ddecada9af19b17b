"""Parts that the trainers of the network and of the VAE share."""

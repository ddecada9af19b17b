"""Parts that autoencoders share, in two and in three dimensions.

losses                 the loss of autoencoders, its adversary, and LPIPS; discriminators has the networks
regularizers           from an encoder's output to latents: Gaussian, or codes of a codebook
distributions          the Gaussian of a variational autoencoder
temporal_ae            a 2D decoder extended in time
clip, waiting, tiling  video by pieces: in time, between layers, and in space
"""

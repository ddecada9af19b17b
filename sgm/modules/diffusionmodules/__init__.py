"""The mathematics of diffusion: schedules, denoisers, guidance, samplers and losses.

discretizer                            noise schedules, in sampling and in training
denoiser, denoiser_scaling             from the network's output to the estimate of the clean sample
wrappers                               from conditioning by kind to the network's arguments
guiders, thresholding                  guidance; guidance_parallel has its halves on two processes
sampling                               the loops of all samplers; sampling_utils has their formulas
sampler                                what is around a loop; also sampling_start and sampling_bar
base_sampler                           for samplers of users with their own loop, as in the original
loss, denoiser_weighting               training losses
sigma_sampling, key_frames             what training draws: noise levels, and frames that condition a network
model, building_blocks, util           2D networks of image autoencoders, their layers, and small functions
"""

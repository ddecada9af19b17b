"""Sizes of clips, latents and patches are consistent, as in the released models."""

from cogvideox_sat.latent_geometry import Bucket, patch_sizes, video_tokens


def test_a_patch_size_without_time_is_that_of_1_0():
    assert patch_sizes(2) == (1, 2, 2)
    assert patch_sizes([2, 2, 2]) == (2, 2, 2)


def test_tokens_of_the_released_clips():
    assert video_tokens(Bucket(49, 480, 720), (1, 2, 2)) == 17550  # 17776 with the 226 of the text
    assert video_tokens(Bucket(81, 768, 1360), (2, 2, 2)) == 44880
    assert video_tokens(Bucket(1, 480, 720), (1, 2, 2)) == 1350


def test_a_bucket_says_what_it_is():
    assert str(Bucket(49, 480, 720)) == "49 frames of 480x720"

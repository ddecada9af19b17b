"""Sizes of clips in latents and tokens."""

import pytest

from cogvideox_sat.latent_geometry import Bucket, patch_sizes, video_tokens


@pytest.mark.parametrize(("given", "sizes"), [(2, (1, 2, 2)), ([2, 2, 2], (2, 2, 2)), ((1, 4, 2), (1, 4, 2))])
def test_patches(given, sizes):
    assert patch_sizes(given) == sizes


@pytest.mark.parametrize(
    ("clip", "patch", "tokens"),
    [
        ((49, 480, 720), 2, 13 * 30 * 45),  # CogVideoX 1.0
        ((81, 768, 1360), (2, 2, 2), 11 * 48 * 85),  # 1.5: 21 latent frames and one repeated
        ((1, 64, 64), 1, 64),  # an image, a token for each latent
    ],
)
def test_tokens_of_a_clip(clip, patch, tokens):
    assert video_tokens(Bucket(*clip), patch_sizes(patch)) == tokens


def test_a_bucket_says_its_shape():
    assert str(Bucket(9, 64, 96)) == "9 frames of 64x96"

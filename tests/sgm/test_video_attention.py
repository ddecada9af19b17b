"""Video transformers and the temporal decoder equal diffusers and extend the 2D ones."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_image_vae import diffusers_weights
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.modules.attention import SpatialTransformer
from sgm.modules.autoencoding.temporal_ae import AE3DConv, VideoDecoder
from sgm.modules.diffusionmodules.model import Decoder, Encoder
from sgm.modules.video_attention import AlphaBlender, SpatialVideoTransformer, VideoTransformerBlock
from sgm.util import instantiate_from_config
from support import assert_close

MODES = ["all", "conv-only", "attn-only"]
TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "resolution": 8, "attn_resolutions": [4]}


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def renamed(weights: dict[str, Tensor], patterns: list[tuple[str, str]]) -> dict[str, Tensor]:
    out = {}
    for name, value in weights.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def latents(clips: int, frames: int) -> Tensor:
    return seeded_input("latent", (clips * frames, 4, 4, 4))


# ---------------------------------------------------------------- blending


def test_blending():
    spatial, temporal = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    for share in (0.0, 0.25, 1.0):
        expected = share * spatial + (1 - share) * temporal
        assert_close(AlphaBlender(share, "fixed")(spatial, temporal), expected, 1e-6)
    assert not list(AlphaBlender(0.5, "fixed").parameters())
    share = torch.tensor(0.3).sigmoid()
    learned = AlphaBlender(0.3, "learned")
    assert_close(learned(spatial, temporal), share * spatial + (1 - share) * temporal, 1e-6)
    learned(spatial, temporal).square().sum().backward()
    assert learned.mix_factor.grad.abs() > 0


def test_images_among_the_frames_take_nothing_from_the_others():
    spatial, temporal = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    blender = AlphaBlender(0.3)
    image_only = torch.tensor([[1, 1, 1], [0, 1, 0]])
    out = blender(spatial, temporal, image_only)
    images = image_only.flatten().bool()
    assert torch.equal(out[images], spatial[images])
    assert torch.equal(out[~images], blender(spatial, temporal)[~images])


# ---------------------------------------------------------------- transformers


def video_transformer(**params) -> SpatialVideoTransformer:
    """Return a transformer of 32 channels, with random weights for zero projections too."""
    params = {"depth": 2, "ff_in": True, "merge_strategy": "learned", **params}
    return seed_module_(SpatialVideoTransformer(32, 2, 16, **params), skip=["mix_factor"])


def test_video_transformer_agrees_with_diffusers():
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    ours = video_transformer(
        context_dim=10, use_linear=True, use_spatial_context=True, merge_strategy="learned_with_images"
    ).double()
    renames = [
        (r"time_stack", "temporal_transformer_blocks"),
        (r"time_pos_embed\.0", "time_pos_embed.linear_1"),
        (r"time_pos_embed\.2", "time_pos_embed.linear_2"),
    ]
    other = TransformerSpatioTemporalModel(2, 16, 32, num_layers=2, cross_attention_dim=10).double().eval()
    other.load_state_dict(renamed(ours.state_dict(), renames))
    x, context = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(6, 32, 2, 3), (6, 4, 10)])
    image_only = torch.tensor([[0, 0, 0], [1, 0, 1]])
    expected = other(x, context, image_only_indicator=image_only).sample
    actual = ours(x, context, timesteps=3, image_only_indicator=image_only)
    assert_close(actual, expected, 1e-6)
    cotangent = torch.randn_like(expected)
    for one, two in zip(*(torch.autograd.grad(y, [x, context], cotangent) for y in (actual, expected)), strict=True):
        assert_close(one, two, 1e-6)


def test_without_a_temporal_share_it_is_the_spatial_transformer():
    video = video_transformer(merge_strategy="fixed", merge_factor=1.0)
    image = SpatialTransformer(32, 2, 16, depth=2)
    image.load_state_dict({name: value for name, value in video.state_dict().items() if "time" not in name})
    x = torch.randn(6, 32, 2, 3)
    assert_close(video(x, timesteps=3), image(x), 1e-6)


def influence(function, x: Tensor) -> Tensor:
    """Return (n, n) bool: the entries of the output that each entry of the input changes."""
    base = function(x)
    rows = []
    for index in range(len(x)):
        changed = x.clone()
        changed[index] += torch.randn_like(x[index])
        rows.append((function(changed) - base).flatten(1).abs().amax(1) > 0)
    return torch.stack(rows)


CLIPS_OF_THREE = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()


@torch.no_grad()
def test_frames_of_a_clip_influence_each_other_and_clips_do_not():
    transformer, block = video_transformer(), seed_module_(VideoTransformerBlock(32, 2, 16, ff_in=True))
    assert torch.equal(influence(lambda x: transformer(x, timesteps=3), torch.randn(6, 32, 2, 3)), CLIPS_OF_THREE)
    assert torch.equal(influence(lambda x: block(x, timesteps=3), torch.randn(6, 5, 32)), CLIPS_OF_THREE)


@torch.no_grad()
def test_a_block_over_time_keeps_places_apart():
    block = seed_module_(VideoTransformerBlock(32, 2, 16, ff_in=True))
    by_place = influence(lambda x: block(x.transpose(0, 1), timesteps=3).transpose(0, 1), torch.randn(5, 6, 32))
    assert torch.equal(by_place, torch.eye(5).bool())


def test_what_the_temporal_block_attends_to_and_where_the_length_of_a_clip_comes_from():
    x, context = torch.randn(6, 5, 32), torch.randn(10, 4, 7)
    block = seed_module_(VideoTransformerBlock(32, 2, 16, context_dim=7, timesteps=3))
    assert torch.equal(block(x, context), block(x, context, 3))  # given to the constructor, or to the call
    assert not torch.equal(block(x, context), block(x, 2 * context))
    with pytest.raises(UserError, match="timesteps: the number of frames of a clip: missing"):
        VideoTransformerBlock(32, 2, 16)(x)

    alone = seed_module_(VideoTransformerBlock(32, 2, 16, switch_temporal_ca_to_sa=True))
    assert torch.equal(alone(x, context, 3), alone(x, None, 3))
    without = VideoTransformerBlock(32, 2, 16, context_dim=7, disable_temporal_crossattention=True)
    expected = {name: value for name, value in block.state_dict().items() if not re.match(r"attn2|norm2", name)}
    without.load_state_dict(expected)
    with torch.no_grad():  # as if the second attention added nothing
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()
    assert torch.equal(without(x, context, 3), block(x, context, 3))


def test_a_video_transformer_takes_contexts_in_a_list():
    transformer = video_transformer(context_dim=[10], use_spatial_context=True, timesteps=3)
    x, context = torch.randn(6, 32, 2, 3), torch.randn(6, 4, 10)
    assert torch.equal(transformer(x, [context]), transformer(x, context, None, 3))
    for wrong in ({"time_depth": 2}, {"context_dim": [10, 8], "use_spatial_context": True}):
        with pytest.raises(UserError, match=r"^(time_depth|context_dim): "):
            video_transformer(**wrong)


def test_time_context_of_its_own_and_order_of_frames():
    transformer = video_transformer(time_context_dim=7)
    x, time_context = torch.randn(6, 32, 2, 3), torch.randn(2, 4, 7)
    out = transformer(x, time_context=time_context, timesteps=3)
    other = transformer(x, time_context=torch.cat([time_context[:1], torch.randn(1, 4, 7)]), timesteps=3)
    assert torch.equal(out[:3], other[:3]) and not torch.equal(out[3:], other[3:])
    turned = transformer(x.flip(0), time_context=time_context.flip(0), timesteps=3).flip(0)
    assert (turned - out).abs().max() > 1e-3  # frames know their places


def test_checkpointing_changes_nothing():
    x, context = torch.randn(6, 32, 2, 3, requires_grad=True), torch.randn(6, 4, 10)
    params = {"context_dim": 10, "use_spatial_context": True}
    plain, lean = video_transformer(**params), video_transformer(**params, checkpoint=True)
    gradients = [
        torch.autograd.grad(m(x, context, timesteps=3).square().sum(), [x, *m.parameters()]) for m in (plain, lean)
    ]
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


# ---------------------------------------------------------------- the temporal decoder


def test_decoder_agrees_with_diffusers():
    from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder

    params = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "z_channels": 4, "resolution": 16}
    ours = seed_module_(VideoDecoder(**params, video_kernel_size=[3, 1, 1]))
    renames = [
        (r"time_stack\.in_layers\.0", "temporal_res_block.norm1"),
        (r"time_stack\.in_layers\.2", "temporal_res_block.conv1"),
        (r"time_stack\.out_layers\.0", "temporal_res_block.norm2"),
        (r"time_stack\.out_layers\.3", "temporal_res_block.conv2"),
        (r"mix_factor", "time_mixer.mix_factor"),
        (r"((?:block_\d|block\.\d)\.)(norm|conv|nin)", r"\1spatial_res_block.\2"),
        (r"conv_out\.time_mix_conv", "time_conv_out"),
    ]
    weights = diffusers_weights(renamed(ours.state_dict(), renames), levels=3)
    other = TemporalDecoder(4, 3, block_out_channels=(32, 64, 64), layers_per_block=2).eval()
    other.load_state_dict(weights)
    z = latents(2, 3)
    expected = other(z, image_only_indicator=torch.zeros(2, 3), num_frames=3)
    assert_close(ours(z, timesteps=3), expected, 1e-5)


def extended(decoder: Decoder, **params) -> VideoDecoder:
    """Return a temporal decoder with the weights of a 2D one."""
    video = VideoDecoder(**TINY, **params)
    missing, unexpected = video.load_state_dict(decoder.state_dict(), strict=False)
    assert not unexpected and all("time" in name or "mix_factor" in name for name in missing)
    return video


@pytest.mark.parametrize("time_mode", MODES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_2d_decoder_that_is_extended_starts_as_it_was(time_mode, gradients):
    decoder, z = seed_module_(Decoder(**TINY)), latents(2, 3)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(extended(decoder, time_mode=time_mode)(z, timesteps=3), decoder(z))


@pytest.mark.parametrize("time_mode", MODES)
def test_without_a_temporal_share_it_is_the_2d_decoder(time_mode):
    """Whatever the temporal weights are; but for the last convolution, which is not blended."""
    decoder, z = seed_module_(Decoder(**TINY)), latents(2, 3)
    video = extended(decoder, time_mode=time_mode, alpha=0.0, merge_strategy="fixed")
    for name, parameter in video.named_parameters():
        if "time" in name and "time_mix_conv" not in name:
            nn.init.normal_(parameter, std=0.1)
    assert torch.equal(video(z, timesteps=3), decoder(z))
    video = extended(decoder, time_mode=time_mode, alpha=1.0, merge_strategy="fixed")
    seed_module_(video, skip=["mix_factor"])
    assert (video(z, timesteps=3) - decoder(z)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("time_mode", MODES)
def test_decoded_frames_of_a_clip_influence_each_other_and_clips_do_not(time_mode):
    video = seed_module_(VideoDecoder(**TINY, time_mode=time_mode))
    assert torch.equal(influence(lambda z: video(z, timesteps=3), latents(2, 3)), CLIPS_OF_THREE)
    assert torch.equal(influence(lambda z: video(z, timesteps=1), latents(2, 3)), torch.eye(6).bool())


@pytest.mark.parametrize("time_mode", MODES)
@pytest.mark.parametrize("merge_strategy", ["fixed", "learned"])
def test_every_parameter_gets_a_gradient(time_mode, merge_strategy):
    alpha = 0.5 if merge_strategy == "fixed" else 0.0
    video = seed_module_(
        VideoDecoder(**TINY, time_mode=time_mode, merge_strategy=merge_strategy, alpha=alpha), skip=["mix_factor"]
    )
    out = video(latents(2, 3), timesteps=3)
    (out * seeded_input("cotangent", out.shape)).sum().backward()
    for name, parameter in video.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_last_layer():
    video, attention_only = VideoDecoder(**TINY), VideoDecoder(**TINY, time_mode="attn-only")
    assert isinstance(video.conv_out, AE3DConv)
    assert video.get_last_layer() is video.conv_out.time_mix_conv.weight
    assert video.get_last_layer(skip_time_mix=True) is video.conv_out.weight
    assert attention_only.get_last_layer() is attention_only.conv_out.weight


@pytest.mark.parametrize("time_mode", MODES)
def test_autocast_to_bfloat16(time_mode):
    video = seed_module_(VideoDecoder(**TINY, time_mode=time_mode))
    z = latents(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = video(z, timesteps=3)
        out.float().square().mean().backward()
    assert_close(out.float(), video(z, timesteps=3), 0.05)


def moving_squares(clips: int, frames: int, size: int = 8) -> Tensor:
    """Return (clips * frames, 1, size, size) in [-1, 1]: a bright square moving one pixel."""
    video = torch.full((clips, frames, 1, size, size), -1.0)
    for clip in video:
        position, step = torch.randint(size, (2,)), torch.randint(-1, 2, (2,))
        for number, frame in enumerate(clip):
            frame[:, :3, :3] = 1.0
            frame.copy_(frame.roll(tuple((position + number * step).tolist()), (1, 2)))
    return video.flatten(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("time_mode", ["conv-only", "attn-only"])
def test_trains_on_moving_squares_and_uses_the_other_frames(time_mode):
    """Every other frame is hidden from the encoder, and the loss is taken there."""
    params = {**TINY, "ch_mult": (1,), "num_res_blocks": 0, "in_channels": 1, "out_ch": 1}
    encoder, decoder = Encoder(**params, double_z=False), VideoDecoder(**params, time_mode=time_mode)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    losses = []
    for _ in range(60):
        squares = moving_squares(4, 4)
        shown = squares * torch.tensor([1.0, 0.0]).repeat(8)[:, None, None, None]
        loss = F.mse_loss(decoder(encoder(shown), timesteps=4)[1::2], squares[1::2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = sum(losses[-10:]) / 10
    assert last < 0.5 * losses[0]
    covered = 9 / 64  # of the image, by the square
    assert last < 0.8 * 4 * covered * (1 - covered)  # the variance: the best that one frame by itself allows


# ---------------------------------------------------------------- errors


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match="a batch of 5 frames does not hold whole clips of 3"):
        VideoDecoder(**TINY)(torch.zeros(5, 4, 4, 4), timesteps=3)
    with pytest.raises(UserError, match="a batch of 5 frames does not hold whole clips of 2"):
        video_transformer()(torch.zeros(5, 32, 2, 2), timesteps=2)
    with pytest.raises(UserError, match="the temporal blocks need a context"):
        video_transformer(context_dim=10, use_spatial_context=True)(torch.zeros(2, 32, 2, 2), timesteps=2)
    for params, message in (
        ({"time_mode": "never"}, "time_mode: 'never' is unknown; use one of all, conv-only, attn-only"),
        ({"merge_strategy": "sum"}, "merge_strategy: 'sum' is unknown; use one of fixed, learned"),
        ({"merge_strategy": "learned_with_images"}, "a decoder gets no image_only_indicator"),
        ({"merge_strategy": "fixed", "alpha": 2}, "a fixed share: got 2; it must be between 0 and 1"),
        ({"video_kernel_size": [3, 3]}, r"video_kernel_size: expected an odd number or three of them, got \[3, 3\]"),
        ({"video_kernel_size": 2}, "video_kernel_size: expected .* got 2"),
        ({"time_mode": "all", "attn_type": "linear"}, "attn_type: 'linear' cannot be extended in time"),
        ({"chanels": 3}, r"params\.chanels: unknown; did you mean z_channels"),
    ):
        with pytest.raises(UserError, match=message):
            instantiate_from_config(
                {"target": "sgm.modules.autoencoding.temporal_ae.VideoDecoder", "params": {**TINY, **params}}
            )

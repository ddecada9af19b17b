"""Coders by pieces of a clip give the results of the whole, in less memory."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.models.video_coder import decoding_schedule
from sgm.models.video_coder_memory import peak_bytes
from sgm.modules.autoencoding.clip import Chunk
from sgm.modules.autoencoding.waiting import WaitingRoom
from sgm.util import instantiate_from_config
from support import Reference, assert_close
from vae_modules import piecewise
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

GIB = 2**30
WEIGHTS = 2 * 215_583_907  # bytes, in half precision

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**sizes: int) -> VideoAutoencoderInferenceWrapper:
    config = Reference("vae/vae_small").case["first_stage_config"]
    for part in ("encoder_config", "decoder_config"):
        config["params"][part]["params"] |= sizes
    return instantiate_from_config(config).eval()


@pytest.fixture
def vae():
    return seed_module_(build(ch=8, norm_groups=4))


def clip(frames: int, dtype: torch.dtype) -> torch.Tensor:
    return seeded_input("video", (2, 3, frames, 16, 24)).clamp(-1, 1).to(dtype)


def latent(frames: int, dtype: torch.dtype) -> torch.Tensor:
    return seeded_input("latent", (2, 16, frames, 2, 3)).to(dtype)


def decode(vae, z):
    return torch.cat(list(vae.decode_chunks(z)), dim=2)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.slow
def test_pieces_are_the_whole(vae, dtype, tolerance):
    """Any number of frames works, with or without a lone first frame, in uneven pieces."""
    vae.to(dtype)
    for frames, at_once in ((1, 4), (9, 4), (17, 8), (17, 12), (5, 8)):
        x = clip(frames, dtype)
        whole = vae.encode(x, unregularized=True)[0]
        vae.use_frames_at_once(at_once)
        assert_close(vae.encode(x, unregularized=True)[0], whole, tolerance)
        assert torch.equal(x, clip(frames, dtype))
        vae.use_frames_at_once(None)
    for frames, at_once in ((1, 4), (4, 4), (5, 4), (5, 8)):
        z = latent(frames, dtype)
        whole, at_once_too = decode(vae, z), vae.decode_at_once(z)
        vae.use_frames_at_once(at_once)
        assert_close(decode(vae, z), whole, tolerance)
        assert_close(vae.decode_at_once(z), at_once_too, tolerance)
        vae.use_frames_at_once(None)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "calls"), [(1, [1]), (2, [2]), (5, [5]), (6, [4, 2]), (7, [5, 2])])
def test_several_chunks_at_once(vae, monkeypatch, frames, calls):
    """Each chunk is still normalized by itself, and the consumer gets the same chunks."""
    z = latent(frames, torch.float64)
    vae.double()
    one_by_one, seen = list(vae.decode_chunks(z)), []
    decoder = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda z, chunk: seen.append(z.shape[2]) or decoder(z, chunk))
    vae.use_frames_at_once(16)
    for together, alone in zip(vae.decode_chunks(z), one_by_one, strict=True):
        assert_close(together, alone, 1e-10)
    assert seen == calls
    seen.clear()
    with torch.enable_grad():
        assert len(list(vae.decode_chunks(z.requires_grad_()))) == len(seen) == len(decoding_schedule(frames))


@torch.no_grad()
def test_several_chunks_of_few_channels_and_with_dropout():
    """A first convolution of few channels takes no parts; dropout takes the plain path."""
    with torch.device("meta"):
        small = build(ch=8, norm_groups=4, z_channels=4).to(torch.bfloat16)
        dropping = build(ch=8, norm_groups=4, dropout=0.1).train()
    for each, channels in ((small, 4), (dropping, 16)):
        each.use_frames_at_once(16)
        z = torch.empty(1, channels, 5, 2, 3, device="meta", dtype=next(each.parameters()).dtype)
        assert [chunk.shape[2] for chunk in each.decode_chunks(z)] == [9, 8]


def test_only_the_last_piece_leaves_something_for_the_next_chunk():
    chunk = Chunk(lead=True, last=False, keep=torch.zeros_like)
    pieces = piecewise.cut(latent(5, torch.float32), [1, 2, 2], chunk, None, WaitingRoom())
    assert [each.lead for each in pieces.chunks] == [True, False, False]
    assert [each.keep for each in pieces.chunks] == [torch.clone, torch.clone, torch.zeros_like]
    assert all(each.tails is chunk.tails and not each.last for each in pieces.chunks)
    assert [piece.take().shape[2] for piece in pieces.waiting] == [1, 2, 2]


@torch.no_grad()
def test_pieces_in_tiles(vae):
    x = seeded_input("video", (1, 3, 9, 32, 48)).clamp(-1, 1)
    vae.use_tiles(32)
    whole = vae.encode(x, unregularized=True)[0]
    vae.use_frames_at_once(4)
    assert_close(vae.encode(x, unregularized=True)[0], whole, 1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_nothing_is_computed_twice(vae):
    vae.to(torch.float64)  # one convolution a layer, whatever the number of frames
    counts = {}
    for at_once in (None, 4):
        vae.use_frames_at_once(at_once)
        with FlopCounterMode(display=False) as flops:
            vae.encode(clip(17, torch.float64), unregularized=True)
            decode(vae, latent(5, torch.float64))
        counts[at_once] = flops.get_total_flops()
    assert counts[4] <= 1.02 * counts[None]


def test_gradients_take_the_whole_clip(vae):
    vae.use_frames_at_once(4)
    x = clip(9, torch.float32).requires_grad_()
    vae.encode(x, unregularized=True)[0].sum().backward()
    assert x.grad.abs().sum() > 0


@torch.no_grad()
def test_memory_that_does_not_do_is_made_to(vae, monkeypatch, caplog):
    """The whole fails within a clip, eight frames too; four frames work, with a line."""
    z, x = latent(5, torch.float32), clip(9, torch.float32)
    expected, moments = decode(vae, z), vae.encode(x, unregularized=True)[0]

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pieces = vae.decoder.in_pieces
    monkeypatch.setattr(vae.decoder.up[0].block[0], "run", full)
    monkeypatch.setattr(
        vae.decoder, "in_pieces", lambda x, c, steps, room: (pieces if steps < 2 else full)(x, c, steps, room)
    )
    vae.use_frames_at_once(16)
    with caplog.at_level(logging.WARNING):
        assert_close(decode(vae, z), expected, 1e-5)
    assert "too small for 16 frames at once" in caplog.text
    assert "with 8 at a time" in caplog.text and "with 4 at a time" in caplog.text
    assert_close(vae.encode(x, unregularized=True)[0], moments, 1e-5)
    monkeypatch.setattr(vae.decoder, "in_pieces", full)
    with pytest.raises(torch.OutOfMemoryError):
        decode(vae, z)


def test_unfit_numbers_and_coders_are_refused(vae):
    for frames in (0, 6, -4):
        with pytest.raises(UserError, match=f"vae_frames_at_once: {frames} is not a positive multiple of 4"):
            vae.use_frames_at_once(frames)
    vae.encoder = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity runs on whole clips only; leave it out"):
        vae.use_frames_at_once(4)


@pytest.mark.slow
def test_released_size_in_little_memory():
    """49 frames of 480x720 in bfloat16, by four: encoding in 8 GiB, decoding in 6.

    Levels of one block take as much as those of three.
    """
    with torch.device("meta"):
        vae = build(ch=128, num_res_blocks=1).to(torch.bfloat16)
    assert peak_bytes(vae, "encode", 49, 480, 720, frames_at_once=4) + WEIGHTS < 3 * GIB
    assert peak_bytes(vae, "decode", 49, 480, 720, frames_at_once=4) + WEIGHTS < 4 * GIB
    chunk, pair, clip = (peak_bytes(vae, "decode", 49, 480, 720, frames_at_once=each) for each in (None, 16, 48))
    assert 1.5 * chunk < pair < 0.6 * clip
    assert vae.frames_at_once is None

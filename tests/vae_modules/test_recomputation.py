"""Recomputing activations changes memory, and neither the results nor the gradients."""

from typing import Any

import pytest
import torch

from distributed import run_distributed
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm.context_parallel import get_context_parallel_group
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import Reference, assert_close
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper
from vae_modules.recomputation import check_levels

ALL_LEVELS = [0, 1, 2, 3]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(cp_size: int = 1, **coder: Any) -> VideoAutoencoderInferenceWrapper:
    """Return the small autoencoder; `coder` goes to the encoder and the decoder."""
    config = Reference("vae/vae_small").case["first_stage_config"]
    params = {**config["params"], "cp_size": cp_size}
    for part in ("encoder_config", "decoder_config"):
        params[part] = {**params[part], "params": {**params[part]["params"], **coder}}
    return seed_module_(instantiate_from_config({**config, "params": params}))


def video(frames: int) -> torch.Tensor:
    return seeded_input("video", (1, 3, frames, 16, 16)).clamp(-1, 1)


def loss_and_gradients(vae: VideoAutoencoderInferenceWrapper, frames: int, chunks: bool = False) -> dict:
    """Return loss and gradients of a reconstruction's squared error, summed over ranks."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    z = vae.encode(video(frames))
    y = torch.cat(list(vae.decode_chunks(z)), dim=2) if chunks else vae.decode_at_once(z)
    loss = (y - video(frames)).square().mean()
    loss.backward()
    group = get_context_parallel_group()
    for parameter in vae.parameters():
        if group is not None:
            torch.distributed.all_reduce(parameter.grad, group=group)
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in vae.named_parameters()}


def on_two_ranks(cases: list[tuple[int, dict]]) -> list[dict]:
    return [loss_and_gradients(build(2, **options), frames) for frames, options in cases]


def kept_bytes(vae: VideoAutoencoderInferenceWrapper, frames: int) -> int:
    """Return the bytes of activations that a forward pass's graph keeps."""
    kept = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in vae.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = vae.decode_at_once(vae.encode(video(frames)))
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("levels", others_long([1, 3], [0], ALL_LEVELS))
def test_gradients_are_the_same(levels):
    expected = loss_and_gradients(build(), 9)
    actual = loss_and_gradients(build(checkpoint_levels=levels), 9)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_chunks_keep_their_tails():
    """Tails for the next chunk are neither lost nor changed by recomputing."""
    expected = loss_and_gradients(build(), 17, chunks=True)
    actual = loss_and_gradients(build(checkpoint_levels=ALL_LEVELS), 17, chunks=True)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_dropout_drops_the_same():
    expected = loss_and_gradients(build(dropout=0.3), 5)
    actual = loss_and_gradients(build(dropout=0.3, checkpoint_levels=ALL_LEVELS), 5)
    assert not torch.equal(expected["loss"], loss_and_gradients(build(), 5)["loss"])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_graph_can_be_used_twice():
    """An adaptive loss weight uses the graph before the backward pass."""
    vae = build(checkpoint_levels=ALL_LEVELS)
    y = vae.decode_at_once(vae.encode(video(5), unregularized=True)[0][:, :16])
    for _ in range(2):
        gradients = torch.autograd.grad(y.square().mean(), list(vae.decoder.parameters()), retain_graph=True)
    plain = build()
    y = plain.decode_at_once(plain.encode(video(5), unregularized=True)[0][:, :16])
    expected = torch.autograd.grad(y.square().mean(), list(plain.decoder.parameters()))
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.slow
def test_frozen_encoder_and_inference():
    """No gradient is wanted from some, or from anything."""
    expected, vae = build(), build(checkpoint_levels=ALL_LEVELS)
    with torch.no_grad():
        z = vae.encode(video(5), unregularized=True)[0][:, :16]
        assert torch.equal(vae.decode_at_once(z), expected.decode_at_once(z))
    for each in (vae, expected):
        each.decode_at_once(z).square().mean().backward()
    for (name, parameter), other in zip(vae.decoder.named_parameters(), expected.decoder.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.long
def test_ranks_recompute_as_they_computed():
    """Each rank recomputes alone, with own or common statistics, also without frames."""
    cases = [(9, {"gather_norm": True}), (5, {"gather_norm": False}), (1, {"gather_norm": True})]
    recomputed = [(frames, {**options, "checkpoint_levels": ALL_LEVELS}) for frames, options in cases]
    whole_clip = loss_and_gradients(build(), 9)
    for results in run_distributed(on_two_ranks, 2, cases + recomputed):
        plain, actual = results[: len(cases)], results[len(cases) :]
        for case, expected, other in zip(cases, plain, actual, strict=True):
            assert all(torch.equal(other[name], expected[name]) for name in expected), case
        for name, value in whole_clip.items():  # to which nine frames with gathered statistics must come
            # A bias right before a norm of one channel a group has no effect: its gradient is rounding.
            assert (actual[0][name] - value).norm() <= 1e-4 * value.norm() + 1e-5, name


@pytest.mark.slow
def test_memory_falls_with_every_level():
    kept = [kept_bytes(build(checkpoint_levels=levels), 9) for levels in ([], [0], [0, 1], ALL_LEVELS)]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.75 * kept[0] and kept[-1] < 0.6 * kept[0]


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ([4], r"checkpoint_levels: .* 0 to 3"),
        ([-1], r"checkpoint_levels: .* 0 to 3"),
        (["0"], r"checkpoint_levels\[0\]: got '0'; expected a whole number"),
        ([True], r"checkpoint_levels\[0\]: got True; expected a whole number"),
    ],
)
def test_levels_that_do_not_exist_are_refused(levels, says):
    with pytest.raises(UserError, match=says):
        build(checkpoint_levels=levels)


@pytest.mark.slow
def test_results_close_to_reference_when_recomputed():
    reference = Reference("vae/vae_small")
    vae = build(checkpoint_levels=ALL_LEVELS)
    x = seeded_input("vae_small.video9", (1, 3, 9, *reference.case["video_hw"]), reference.case["seed"])
    seed_module_(vae, reference.case["seed"])
    assert_close(vae.encode(x.clamp(-1, 1), unregularized=True)[0], reference["moments.9"], 1e-5)


def test_levels_are_a_set():
    assert check_levels([3, 0, 3], count=4) == {0, 3}
    with pytest.raises(UserError, match="checkpoint_levels: 4 is not a level of ch_mult; use 0 to 3"):
        check_levels([0, 4], count=4)

"""A clip on several processes is encoded, decoded and differentiated as on one."""

import pytest
import torch
import torch.distributed as dist

from distributed import run_distributed
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm.context_parallel import (
    get_context_parallel_group,
    get_context_parallel_rank,
    get_context_parallel_world_size,
    initialize_context_parallel,
    pass_on,
    split_evenly,
)
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import Reference, assert_close


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Limit the threads, as in the other processes, when one process computes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def build_vae(cp_size: int) -> torch.nn.Module:
    config = Reference("vae/vae_small").case["first_stage_config"]
    return seed_module_(instantiate_from_config({**config, "params": {**config["params"], "cp_size": cp_size}}))


def video(frames: int) -> torch.Tensor:
    return seeded_input("video", (1, 3, frames, 16, 16)).clamp(-1, 1)


def latent(frames: int) -> torch.Tensor:
    return seeded_input("latent", (1, 16, frames, 2, 2))


def encode_and_decode(cp_size: int, encoded: list[int], decoded: list[int], streamed: list[int]) -> dict:
    """Return the autoencoder's results for whole clips; every rank gets and returns all."""
    torch.set_num_threads(1)
    vae = build_vae(cp_size)
    results = {}
    with torch.no_grad():
        for frames in encoded:
            results["moments", frames] = vae.encode(video(frames), unregularized=True)[0]
            torch.manual_seed(5 + get_context_parallel_rank())
            results["sample", frames] = vae.encode(video(frames))
        for frames in decoded:
            first = vae.decode(latent(frames))
            results["chunk", frames] = first
            results["next chunk", frames] = vae.decode(latent(2), clear_fake_cp_cache=True)
        for at_once in (None, 4):  # the latter by pieces of one latent frame
            vae.use_frames_at_once(at_once)
            for frames in streamed:
                results["stream", frames, at_once] = torch.cat(list(vae.decode_chunks(latent(frames))), dim=2)
        for frames in encoded:
            results["moments by pieces", frames] = vae.encode(video(frames), unregularized=True)[0]
        for frames in decoded:
            results["chunk by pieces", frames] = vae.decode(latent(frames))
            results["next chunk by pieces", frames] = vae.decode(latent(2), clear_fake_cp_cache=True)
    return results


def gradients(cp_size: int, frames: int) -> dict:
    """Return the gradients of (moments * cotangent).sum() + (decoded * cotangent).sum().

    They are those of parameters and inputs.

    The ranks take and give their own frames; parameters' gradients are summed over the ranks.
    """
    torch.set_num_threads(1)
    vae = build_vae(cp_size)
    x, z = video(frames).requires_grad_(), latent(3).requires_grad_()
    rank, size = get_context_parallel_rank(), get_context_parallel_world_size()
    group = get_context_parallel_group()

    moments = vae.encode(x, unregularized=True, output_cp=True)[0]
    decoded = vae.decode(z, clear_fake_cp_cache=True, output_cp=True)
    loss = 0
    for y in (moments, decoded):
        counts = split_evenly(3, size)
        if y is decoded:
            counts = [4 * count - 3 * (index == 0) for index, count in enumerate(counts)]
        cotangent = seeded_input("cotangent", (*y.shape[:2], sum(counts), *y.shape[3:])).split(counts, 2)[rank]
        loss = loss + (y * cotangent).sum()
    loss.backward()
    for parameter in vae.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if group is not None:
            torch.distributed.all_reduce(parameter.grad, group=group)
    return {"x": x.grad, "z": z.grad} | {name: parameter.grad for name, parameter in vae.named_parameters()}


def shares_in_and_out(cp_size: int) -> torch.Tensor:
    """Encode and decode with every rank holding its own frames all the way."""
    torch.set_num_threads(1)
    vae = build_vae(cp_size)
    rank = get_context_parallel_rank()
    own = video(17).split([9, 8] if cp_size == 2 else [17], 2)[rank]
    with torch.no_grad():
        moments = vae.encode(own, unregularized=True, input_cp=True, output_cp=True)[0]
        return vae.decode(moments[:, :16], clear_fake_cp_cache=True, input_cp=True)


def misuse() -> list[str]:
    messages = []
    for size in (3, 0):
        try:
            initialize_context_parallel(size)
        except UserError as error:
            messages.append(str(error))
    initialize_context_parallel(2)
    initialize_context_parallel(2)
    try:
        initialize_context_parallel(1)
    except UserError as error:
        messages.append(str(error))
    return messages


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "encoded", "decoded", "streamed"),
    others_long((3, [9], [2, 3], [7]), (2, [1, 9, 17], [1, 2, 3, 5], [3, 5, 8]), (4, [17], [3], [5])),
)
def test_results_equal_one_process(ranks, encoded, decoded, streamed):
    """Also where ranks get unequal numbers of frames, or none."""
    expected = encode_and_decode(1, encoded, decoded, streamed)
    for result in run_distributed(encode_and_decode, ranks, ranks, encoded, decoded, streamed):
        assert result.keys() == expected.keys()
        for (what, *numbers), value in result.items():
            assert_close(value, expected[what.removesuffix(" by pieces"), numbers[0], *numbers[1:] and [None]], 1e-5)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", others_long(2, 4))
def test_gradients_equal_one_process(ranks):
    expected = gradients(1, 9)
    for result in run_distributed(gradients, ranks, ranks, 9):
        for name, gradient in expected.items():
            # A bias right before a norm of one channel a group has no effect: its gradient is rounding.
            assert (result[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-3, name


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_may_keep_their_own_frames():
    expected = shares_in_and_out(1)
    for result in run_distributed(shares_in_and_out, 2, 2):
        assert_close(result, expected, 1e-5)


@pytest.mark.distributed
@pytest.mark.slow
def test_misuse_is_refused():
    for messages in run_distributed(misuse, 2):
        assert len(messages) == 3 and all("context parallelism" in message for message in messages)
    with pytest.raises(UserError, match="over 2 processes"):
        initialize_context_parallel(2)  # no torch.distributed here


@pytest.mark.distributed
@pytest.mark.slow
def test_failures_reach_the_test():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*UserError: cannot encode 4 frames"):
        run_distributed(gradients, 2, 1, 4)


def test_frames_go_both_ways_in_one_exchange_and_stay_on_their_device(monkeypatch):
    """In both passes; so NCCL cannot wait in a circle, and nothing goes by way of the CPU."""
    exchanges = []
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "P2POp", lambda op, x, group, group_peer: (op, group_peer, x.device.type, x.shape[1]))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: exchanges.append(operations) or [])
    x = torch.zeros(1, 4, 5, 2, 2, device="meta", requires_grad=True)
    token, before = pass_on(x[:, :, -2:], x, 2, None)
    assert token.shape[2] == 0 and before.shape[2] == 2 and before.device.type == "meta"
    torch.cat([token, before, x], dim=2).sum().backward()
    assert exchanges == [
        [(dist.isend, 2, "meta", 2), (dist.irecv, 0, "meta", 2)],
        [(dist.isend, 0, "meta", 2), (dist.irecv, 2, "meta", 2)],
    ]


def test_even_split():
    assert split_evenly(5, 2) == [3, 2]
    assert split_evenly(2, 3) == [1, 1, 0]

"""Several processes train an autoencoder like one: on shared clips, or one clip each."""

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder_training import fit, video_config
from distributed import run_distributed
from seeded import seed_module_, seeded_input
from sgm.context_parallel import destroy_context_parallel, initialize_context_parallel, split_evenly, sum_over_ranks
from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencodingEngine
from sgm.models.autoencoding_engine import AUTOENCODER, DISCRIMINATOR, Reconstruction
from sgm.modules.autoencoding.clip import Chunk
from sgm.util import instantiate_from_config
from support import assert_close

RANKS = 2
SPLITS = [
    dict(zip(("input_cp", "latent_cp", "output_cp"), each, strict=True))
    for each in itertools.product((False, True), repeat=3)
]
NONE, ALL = SPLITS[0], SPLITS[-1]

CASES = [  # frames, gather_norm, splits, whose turn it is
    *((9, True, splits, AUTOENCODER) for splits in SPLITS),
    *((9, False, splits, AUTOENCODER) for splits in (NONE, ALL)),
    *((17, gather_norm, ALL, AUTOENCODER) for gather_norm in (True, False)),
    *((1, False, splits, AUTOENCODER) for splits in (NONE, ALL)),
    *((9, gather_norm, ALL, DISCRIMINATOR) for gather_norm in (True, False)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def on_ranks():
    """Return the results of `work_of_a_rank`, all at once, since processes start slowly."""
    return run_distributed(work_of_a_rank, RANKS)


def work_of_a_rank() -> dict[str, Any]:
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}  # as torchrun does
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "TORCHELASTIC_RUN_ID": "test"}
    results = {"a clip each": train_on_clips(rank), "misuse": misuse()}
    initialize_context_parallel(RANKS)
    results["gradients"] = [gradients_of_shares(rank, *case) for case in CASES]
    results["training"] = train_on_shares(rank)
    engine = build(True, context_parallel_size=RANKS, **ALL)
    results["videos"], results["validation"] = engine.log_videos(batch(9, rank)), engine.validate(batch(9, rank))
    destroy_context_parallel()
    return results


# ---------------------------------------------------------------- loss and gradients


def build(gather_norm: bool, **params: Any) -> VideoAutoencodingEngine:
    config = video_config(gather_norm, **params)
    loss = config["params"]["loss_config"]
    settings = {**loss["params"], "regularization_weights": {"kl_loss": 1e-2}}  # so that it matters
    config["params"]["loss_config"] = {**loss, "params": settings}
    return seed_module_(instantiate_from_config(config))


def batch(frames: int, rank: int | None = None, clips: int = 1) -> dict[str, Any]:
    """Return clips of 8x8, or with a `rank` that rank's frames."""
    video = seeded_input(f"video{frames}", (clips, frames, 3, 8, 8)).clamp(-1, 1)
    if rank is not None:
        video = video.split([first_share(frames), frames - first_share(frames)], dim=1)[rank]
    return {"mp4": video, "seed": list(range(frames, frames + clips))}


def first_share(frames: int) -> int:
    """Return rank 0's share of 4k+1 frames, the larger half of k+1 latent frames."""
    return 4 * ((frames // 4 + 2) // 2) - 3


def gradients_of_shares(
    rank: int, frames: int, gather_norm: bool, splits: dict[str, bool], turn: int
) -> dict[str, Tensor]:
    engine = build(gather_norm, context_parallel_size=RANKS, **splits)
    return loss_and_gradients(engine, batch(frames, rank if splits["input_cp"] else None), turn)


def loss_and_gradients(engine: VideoAutoencodingEngine, batch: dict[str, Any], turn: int) -> dict[str, Tensor]:
    """Return the loss, its log and all gradients.

    Gradients of encoder and decoder are summed over the ranks.
    """
    loss, log = engine.compute_loss(batch, turn)
    loss.backward()
    results = {"loss": loss.detach(), **log}
    for name, parameter in engine.named_parameters():
        if parameter.grad is not None:
            partial = engine.group is not None and name.startswith(("encoder.", "decoder."))
            results[name] = sum_over_ranks(parameter.grad, engine.group) if partial else parameter.grad
    return results


class InChunks(VideoAutoencodingEngine):
    """On one process, what ranks do whose norms take the statistics of their own frames."""

    def reconstruct(self, x: Tensor) -> Reconstruction:
        first = first_share(x.shape[2])
        moments = self._in_chunks(self.encoder, x.split([first, x.shape[2] - first], dim=2))
        latent, report = self.regularization(moments)
        first = (first + 3) // 4
        outputs = self._in_chunks(self.decoder, latent.split([first, latent.shape[2] - first], dim=2))
        return Reconstruction(x, outputs, report)

    @staticmethod
    def _in_chunks(coder: torch.nn.Module, pieces: tuple[Tensor, ...]) -> Tensor:
        tails = {}
        chunks = [Chunk(lead=True, tails=tails, last=False), Chunk(lead=False, tails=tails)]
        return torch.cat([coder(piece, chunk) for piece, chunk in zip(pieces, chunks, strict=True)], dim=2)


def gradients_of_one_process(frames: int, gather_norm: bool, turn: int) -> dict[str, Tensor]:
    engine = build(gather_norm)
    if not gather_norm and frames > 1:
        engine.__class__ = InChunks
    return loss_and_gradients(engine, batch(frames), turn)


@pytest.mark.distributed
@pytest.mark.slow
def test_loss_and_gradients_equal_one_process(on_ranks):
    """They are equal for images, 9 and 17 frames, all norms, and all ways to split."""
    expected = {}
    for index, (frames, gather_norm, _, turn) in enumerate(CASES):
        if (frames, gather_norm, turn) not in expected:
            expected[frames, gather_norm, turn] = gradients_of_one_process(frames, gather_norm, turn)
        reference = expected[frames, gather_norm, turn]
        learning = {name for name in reference if name.startswith(("encoder.", "decoder.", "loss.discriminator."))}
        assert len(learning) > (5 if turn else 50)
        largest = max(reference[name].norm() for name in learning)
        for rank in range(RANKS):
            result = on_ranks[rank]["gradients"][index]
            assert result.keys() == reference.keys()
            for name, value in reference.items():
                # A bias right before a norm of one channel a group has no effect: its gradient is rounding.
                assert (result[name] - value).norm() <= 3e-5 * value.norm() + 1e-6 * largest, (CASES[index], name)


@pytest.mark.distributed
def test_validation_and_videos_to_look_at_are_of_whole_clips(on_ranks):
    engine = build(True)
    expected = {"videos": engine.log_videos(batch(9)), "validation": engine.validate(batch(9))}
    for results in on_ranks:
        for kind, values in expected.items():
            assert results[kind].keys() == values.keys()
            for name, value in values.items():
                assert_close(results[kind][name], value, 1e-5)


# ---------------------------------------------------------------- whole steps


def sgd(lr: float) -> dict[str, Any]:
    """Return SGD, which, unlike Adam, does not turn rounding errors into steps."""
    return {"optimizer_config": {"target": "torch.optim.SGD", "params": {"lr": lr}}}


SETTINGS = {"disc_start_iter": 2, "accumulate_grad_batches": 2, "ema_decay": 0.9}


def train_on_shares(rank: int | None) -> dict[str, Tensor]:
    """Return the weights after steps on images and clips, with each rank's frames."""
    splits, options = NONE, {}
    if rank is not None:
        splits, options = ALL, {"strategy": "ddp_find_unused_parameters_true", "devices": RANKS}
    params = {"context_parallel_size": 1 if rank is None else RANKS, "gradient_clip_val": 5.0}
    engine = build(True, **SETTINGS, **sgd(1e-2), **params, **splits)
    batches = [batch(frames, rank, clips=2) for frames in (5, 9, 1, 5, 9, 9, 5, 1)]
    fit(engine, batches, steps=4, **options)
    return {name: value.clone() for name, value in engine.state_dict().items()}


def train_on_clips(rank: int | None) -> dict[str, Tensor]:
    """Return the weights after steps in which each rank has one of two clips."""
    engine = build(True, **SETTINGS, **sgd(3e-6), context_parallel_size=1)
    engine.loss.disc_weight = 0  # its adaptive weight would be that of the rank's own clip
    batches, options = [batch(frames, clips=2) for frames in (5, 9, 1, 5, 9, 9, 5, 1)], {}
    if rank is not None:
        seed_module_(engine, rank)  # the start of the first process is that of all
        options = {"strategy": "ddp_find_unused_parameters_true", "devices": RANKS}
        batches = [{key: value[rank : rank + 1] for key, value in each.items()} for each in batches]
    fit(engine, batches, steps=4, **options)
    return {name: value.clone() for name, value in engine.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "train"), [("training", train_on_shares), ("a clip each", train_on_clips)])
def test_training_steps_equal_one_process(on_ranks, name, train):
    """Four steps of two batches change weights and averages alike, by Lightning and DDP."""
    expected, start = train(None), build(True, ema_decay=0.9).state_dict()
    for part in ("encoder.", "decoder.", "loss.discriminator.", "loss.logvar", "model_ema."):

        def change(weights: dict[str, Tensor], part: str = part) -> Tensor:
            return torch.cat([(weights[key] - start[key]).flatten() for key in start if key.startswith(part)])

        assert change(expected).norm() > 0
        for results in on_ranks:
            assert_close(change(results[name]), change(expected), 1e-3)
            for key, value in expected.items():
                assert_close(results[name][key], value, 1e-5)


# ---------------------------------------------------------------- misuse


def misuse() -> list[str]:
    """Return the errors of impossible settings."""
    messages = []
    try:
        fit(build(True, **sgd(1e-6)), [batch(5)], steps=1, strategy="ddp", devices=RANKS)
    except UserError as error:
        messages.append(str(error))
    try:
        build(True, context_parallel_size=3)
    except UserError as error:
        messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_misuse_is_refused_in_one_line(on_ranks):
    for results in on_ranks:
        strategy, world = results["misuse"]
        assert "ddp_find_unused_parameters_true" in strategy
        assert "context parallelism over 3 processes: the number of processes must be a multiple of 3, got 2" in world


def test_a_clip_too_short_for_its_ranks_is_refused(monkeypatch):
    engine = build(True)
    monkeypatch.setattr(engine, "_shares", lambda frames, _: split_evenly(frames, 3))  # as if there were three
    with pytest.raises(UserError, match="context_parallel_size: 3 processes cannot share a clip of 2 latent frames"):
        engine.compute_loss(batch(5), AUTOENCODER)

"""Test that the order of batches does not depend on processes or interruptions."""

import itertools
import json
import logging
from collections import Counter

import pytest

from cogvideox_sat.clips.batch_order import BatchOrder, Locality, SampleKey
from cogvideox_sat.latent_geometry import Bucket
from sgm.errors import UserError
from sgm.seeds import sample_seed

A, B, C = Bucket(9, 64, 96), Bucket(17, 64, 96), Bucket(9, 96, 64)
MIXED = [A, B, B, A, A, C, B, A, C, A, B, A, A]  # 7 of A, 4 of B, 2 of C


def take(order: BatchOrder, count: int) -> list[list[SampleKey]]:
    return list(itertools.islice(order, count))


def indices(batches: list[list[SampleKey]]) -> list[list[int]]:
    return [[key.index for key in batch] for batch in batches]


def epoch_of(order: BatchOrder) -> list[list[SampleKey]]:
    return take(order, order.epoch_size // order.group_size)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(world):
    together = take(BatchOrder(MIXED, world, 0, 1, seed=7), 20)
    ranks = [take(BatchOrder(MIXED, 1, rank, world, seed=7), 20) for rank in range(world)]
    assert [[key for share in step for key in share] for step in zip(*ranks, strict=True)] == together


def test_every_sample_comes_once_an_epoch_and_in_another_order_each_epoch():
    order = BatchOrder(MIXED, 1, 0, 1, seed=0)
    assert order.epoch_size == len(MIXED)
    keys = [key for batch in take(order, 3 * len(MIXED)) for key in batch]
    epochs = [keys[i : i + len(MIXED)] for i in range(0, len(keys), len(MIXED))]
    assert [sorted(key.index for key in epoch) for epoch in epochs] == [list(range(len(MIXED)))] * 3
    assert len({tuple(key.index for key in epoch) for epoch in epochs}) == 3
    assert [{key.epoch for key in epoch} for epoch in epochs] == [{0}, {1}, {2}]


def test_the_seed_of_a_sample_follows_from_run_epoch_and_index():
    for key in itertools.chain(*take(BatchOrder(MIXED, 2, 0, 1, seed=5), 10)):
        assert key.seed == sample_seed(5, key.epoch, key.index)


def test_batches_never_mix_shapes_and_what_fills_no_group_is_left_out():
    order = BatchOrder(MIXED, 2, 0, 1, seed=3)
    left_out = set()
    for _ in range(20):
        batches = epoch_of(order)
        assert all(len({MIXED[key.index] for key in batch}) == 1 for batch in batches)
        seen = [key.index for batch in batches for key in batch]
        assert len(seen) == len(set(seen)) == order.epoch_size == 12
        left_out |= set(range(len(MIXED))) - set(seen)
        order = BatchOrder(MIXED, 2, 0, 1, seed=0, state=order.state(len(batches)))
    assert len(left_out) > 1  # not always the same one
    assert all(MIXED[index] == A for index in left_out)


def test_without_shuffle_samples_come_in_their_own_order():
    assert indices(take(BatchOrder([A] * 4, 2, 0, 1, seed=0, shuffle=False), 3)) == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("locality", [None, Locality([0] * 5 + [1] * 8, window=3)])
def test_resuming_at_any_position_equals_the_uninterrupted_order(locality):
    def order(state=None):
        return BatchOrder(MIXED, 2, 0, 1, seed=1 if state is None else 99, state=state, locality=locality)

    expected = take(order(), 20)
    for consumed in range(15):
        state = json.loads(json.dumps(order().state(consumed)))
        assert take(order(state), 20 - consumed) == expected[consumed:]
        # A resumed run that is interrupted again counts from where it was resumed.
        again = order(state).state(3)
        assert again == order().state(consumed + 3)
        assert take(order(again), 17 - consumed) == expected[consumed + 3 :]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_with_other_sizes_the_unseen_samples_of_the_epoch_follow(size):
    buckets = [A] * 12 + [B] * 12
    first = BatchOrder(buckets, 2, 0, 2, seed=4)
    for consumed in range(1, 6):
        seen = {key.index for rank in range(2) for key in _seen_by(buckets, rank, consumed)}
        assert len(seen) == 4 * consumed
        second = BatchOrder(buckets, size, 0, 1, seed=4, state=first.state(consumed))
        unseen = set(range(24)) - seen
        counts = [sum(buckets[i] == bucket for i in unseen) for bucket in (A, B)]
        groups = sum(count // size for count in counts)
        follow = [key for batch in take(second, groups) for key in batch]
        assert {key.epoch for key in follow} == {0}
        follow = [key.index for key in follow]
        assert len(follow) == len(set(follow))
        assert set(follow) <= unseen
        assert len(unseen - set(follow)) == sum(count % size for count in counts)
        assert {key.epoch for key in take(second, groups + 1)[-1]} == {1}


def _seen_by(buckets: list[Bucket], rank: int, batches: int) -> list[SampleKey]:
    return [key for batch in take(BatchOrder(buckets, 2, rank, 2, seed=4), batches) for key in batch]


def test_sizes_may_change_twice_within_an_epoch():
    buckets = [A] * 24
    first = BatchOrder(buckets, 4, 0, 1, seed=0)
    second = BatchOrder(buckets, 3, 0, 1, seed=0, state=first.state(2))
    third = BatchOrder(buckets, 2, 0, 1, seed=0, state=second.state(2))
    parts = (take(first, 2), take(second, 2), take(third, 5))
    assert sorted(key.index for part in parts for batch in part for key in batch) == list(range(24))
    assert third.state(5) == {**third.state(5), "epoch": 1, "phases": []}


def test_all_ranks_give_the_same_state():
    states = [BatchOrder(MIXED, 1, rank, 2, seed=1).state(9) for rank in range(2)]
    assert states[0] == states[1]


def test_a_changed_dataset_starts_the_next_epoch_with_a_warning(caplog):
    state = BatchOrder(MIXED, 1, 0, 1, seed=1).state(3)
    with caplog.at_level(logging.WARNING):
        order = BatchOrder([*MIXED, A], 1, 0, 1, seed=1, state=state)
    assert "changed (14 clips, before 13)" in caplog.text
    assert sorted(key.index for batch in epoch_of(order) for key in batch) == list(range(14))
    assert next(iter(order))[0].epoch == 1


def test_shards_are_read_nearly_in_order():
    shards = [i // 100 for i in range(1000)]
    order = BatchOrder([A] * 1000, 1, 0, 1, seed=0, locality=Locality(shards, window=20))
    sequence = [batch[0].index for batch in epoch_of(order)]
    assert sorted(sequence) == list(range(1000))
    assert sequence != sorted(sequence)
    by_place = [shards[index] for index in sequence]
    assert by_place[::100] != sorted(by_place[::100])  # shards are shuffled
    shard_order = list(dict.fromkeys(by_place))
    unshuffled = [index for shard in shard_order for index in range(100 * shard, 100 * shard + 100)]
    moved = [abs(place - unshuffled.index(index)) for place, index in enumerate(sequence)]
    assert max(moved) <= 20
    assert max(moved) > 5


def test_small_buckets_are_named_and_a_dataset_smaller_than_a_batch_is_refused(caplog):
    with caplog.at_level(logging.WARNING):
        BatchOrder(MIXED, 1, 0, 3, seed=0)
    assert "2 of 9 frames of 96x64" in caplog.text
    assert "17 frames" not in caplog.text
    with pytest.raises(UserError, match=r"smaller than one batch: a batch takes 8 \(2 on each of 4 .* 7 of 9 frames"):
        BatchOrder(MIXED, 2, 0, 4, seed=0)
    with pytest.raises(UserError, match="there are none"):
        BatchOrder([], 1, 0, 1, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Samples that are drawn more or less often
# ---------------------------------------------------------------------------------------------------------------------

DRAWS = [2.4] * 5 + [0.125] * 8  # as many draws as MIXED has samples, thirteen: 12 and 1


def drawn(order: BatchOrder, epochs: int) -> list[list[SampleKey]]:
    """Return the batches of this many epochs."""
    return list(itertools.takewhile(lambda batch: batch[0].epoch < epochs, order))


def test_samples_are_drawn_at_their_rates():
    keys = [key for batch in drawn(BatchOrder([A] * 13, 1, 0, 1, seed=3, draws=DRAWS), 200) for key in batch]
    counts = Counter(key.index for key in keys)
    assert sum(counts[i] for i in range(5)) == pytest.approx(2400, abs=10)
    assert all(counts[i] == pytest.approx(480, abs=40) for i in range(5))
    assert sum(counts[i] for i in range(5, 13)) == pytest.approx(200, abs=10)
    assert all(0 < counts[i] < 60 for i in range(5, 13))
    first = [key.index for key in keys if key.epoch == 0]
    assert all(2 <= first.count(i) <= 3 for i in range(5))
    # A sample that is drawn again comes with another seed: another start, crop and noise.
    assert len({key.seed for key in keys}) == len(keys)


def test_drawing_every_sample_once_is_the_order_without_draws():
    plain, once = BatchOrder(MIXED, 1, 0, 1, seed=5), BatchOrder(MIXED, 1, 0, 1, seed=5, draws=[1.0] * len(MIXED))
    assert take(once, 40) == take(plain, 40)


def test_draws_are_the_same_for_any_number_of_processes():
    alone = take(BatchOrder([A] * 13, 2, 0, 1, seed=4, draws=DRAWS), 60)
    ranks = [take(BatchOrder([A] * 13, 1, rank, 2, seed=4, draws=DRAWS), 60) for rank in range(2)]
    assert alone == [one + other for one, other in zip(*ranks, strict=True)]


@pytest.mark.parametrize("consumed", [0, 1, 5, 6, 13, 40, 137])
def test_draws_go_on_where_they_were(consumed):
    kinds = MIXED[:13]
    whole = take(BatchOrder(kinds, 2, 0, 1, seed=2, draws=DRAWS), consumed + 30)
    state = json.loads(json.dumps(BatchOrder(kinds, 2, 0, 1, seed=2, draws=DRAWS).state(consumed)))
    order = BatchOrder(kinds, 2, 0, 1, seed=9, draws=DRAWS, state=state)
    assert take(order, 30) == whole[consumed:]
    assert take(BatchOrder(kinds, 2, 0, 1, seed=9, draws=DRAWS, state=order.state(7)), 20) == whole[consumed + 7 :][:20]


def test_draws_follow_shards(caplog):
    shards = [i // 100 for i in range(1000)]
    draws = [1.5] * 500 + [0.5] * 500
    order = BatchOrder([A] * 1000, 1, 0, 1, seed=0, locality=Locality(shards, window=20), draws=draws)
    by_place = [shards[batch[0].index] for batch in drawn(order, 1)]
    assert len(by_place) == 1000
    assert sum(one != other for one, other in itertools.pairwise(by_place)) < 250
    state = BatchOrder([A] * 13, 1, 0, 1, seed=1, draws=DRAWS).state(3)
    BatchOrder([A] * 13, 1, 0, 1, seed=1, draws=DRAWS[::-1], state=state)
    assert "the dataset or its buckets changed" in caplog.text


def test_a_rate_that_never_fills_a_batch_is_refused():
    with pytest.raises(UserError, match=r"a batch takes 2 .* there are 1 of 9 frames"):
        BatchOrder([A] * 4, 2, 0, 1, seed=0, draws=[0.25] * 4)

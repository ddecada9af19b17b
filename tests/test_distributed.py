"""Functions run in several processes, in marked tests."""

import os

import pytest

from distributed import run_distributed


def rank_and_word(word: str) -> tuple[str, int, str]:
    import torch.distributed as dist

    return os.environ["OMP_NUM_THREADS"], dist.get_rank(), word


def fail_on_the_second() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("the second does not want to")


@pytest.mark.distributed
@pytest.mark.slow
def test_results_come_in_the_order_of_ranks():
    assert run_distributed(rank_and_word, 2, "word") == [("1", 0, "word"), ("1", 1, "word")]
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*ValueError: the second does not want to"):
        run_distributed(fail_on_the_second, 2)


def test_a_test_that_does_not_say_so_starts_none():
    with pytest.raises(AssertionError, match=r"mark it with pytest\.mark\.distributed"):
        run_distributed(rank_and_word, 2, "word")

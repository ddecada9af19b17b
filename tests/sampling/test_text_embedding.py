"""Texts are embedded as the network learnt them."""

import pytest
import torch

from cogvideox_sat.sampling.text_embedding import embedded_texts
from sgm.errors import UserError


class Engine:
    """An engine whose conditioner returns the length of each text."""

    dtype = torch.float16

    def __init__(self, factor: float = 1.0):
        self.factor, self.drops = factor, []

    def conditioner(self, batch: dict, drop: bool) -> dict[str, torch.Tensor]:
        self.drops.append(drop)
        (text,) = batch["txt"]
        return {"crossattn": torch.full((1, 2, 3), len(text) * self.factor, requires_grad=True)}


def test_without_a_negative_prompt_there_are_zeros_as_for_dropped_captions():
    engine = Engine()
    cond, uncond = embedded_texts(engine, "boat", "")
    assert (cond[0, 0, 0], uncond.count_nonzero(), uncond.shape) == (4, 0, cond.shape)
    assert embedded_texts(engine, "boat", "no")[1][0, 0, 0] == 2
    assert engine.drops == [False] * 3


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="the text encoder's output is not finite: fp16 is too narrow"):
        embedded_texts(Engine(float("nan")), "boat", "")

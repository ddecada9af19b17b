"""Prompts are typed until an empty line; mistakes are asked again."""

from pathlib import Path

import pytest

from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.typed_prompts import typed_prompts


def answer_with(monkeypatch, *lines: str) -> None:
    """Let `input()` return the lines one by one, then report the end of the input."""
    remaining = iter(lines)

    def answer(_question: str) -> str:
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


@pytest.mark.parametrize("end", [["q", "c"], ["", "c"], ["  "], []])
def test_typing_ends_with_an_empty_line_q_or_the_end_of_input(monkeypatch, end):
    answer_with(monkeypatch, "a", "b", *end)
    assert list(typed_prompts()) == [PromptRequest(0, "a"), PromptRequest(1, "b")]


def test_typed_images_come_with_the_prompt_or_after_it_and_mistakes_are_asked_again(monkeypatch, tmp_path, caplog):
    (tmp_path / "cat.png").touch()
    monkeypatch.chdir(tmp_path)
    answer_with(monkeypatch, "a@@cat.png", "b", "dog.png", "b", "cat.png")
    requests = list(typed_prompts(image_to_video=True))
    assert requests == [PromptRequest(0, "a", image=Path("cat.png")), PromptRequest(1, "b", image=Path("cat.png"))]
    assert "image dog.png does not exist" in caplog.text

"""The tiny models' text encoder learns a caption's content, and is written completely."""

from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from cogvideox_sat.shapes.scenes import COLOURS, SHAPES, Item, Scene
from cogvideox_sat.shapes.tiny_text_encoder import train_vocabulary
from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.train_text_encoder import (
    NOTHING,
    QUESTIONS,
    answers_of,
    build_parser,
    captions,
    encode,
    exchange,
    main,
    make_heads,
    question_loss,
    with_whole_words,
)

SCENE = Scene((Item("large", "red", "circle", "moving left"),), "blue", "striped")


def test_answers_say_what_the_scene_shows():
    assert answers_of(SCENE) == {
        "first size": "large",
        "first colour": "red",
        "first shape": "circle",
        "first motion": "moving left",
        **{f"second {kind}": NOTHING for kind in ("size", "colour", "shape", "motion")},
        "background": "blue",
        "pattern": "striped",
    }


def test_every_question_has_an_answer_for_every_caption():
    for text, answers in captions(300, seed=0):
        assert answers.keys() == QUESTIONS.keys()
        assert all(answer in QUESTIONS[question] for question, answer in answers.items())
        assert answers["first colour"] in text
        assert answers["first shape"] in text
        assert answers["background"] in text


def test_some_captions_have_words_for_what_is_never_drawn():
    examples = captions(300, seed=0)
    unknown = [answers for _, answers in examples if answers["first shape"] not in SHAPES]
    assert 0.05 < len(unknown) / len(examples) < 0.3
    assert any(answers["first colour"] not in COLOURS for _, answers in examples)
    assert any(answers["first shape"] == "star" for answers in unknown)


@pytest.mark.parametrize(
    ("question", "word", "expected"),
    [
        ("first shape", "star", "a large red star moving left on a striped blue background"),
        ("first shape", "oval", "a large red oval moving left on a striped blue background"),
        ("first colour", "pink", "a large pink circle moving left on a striped blue background"),
        ("first colour", "blue", SCENE.caption),  # the background has it: a word would have two meanings
    ],
)
def test_exchanged_words(question, word, expected):
    text, answers = exchange(SCENE.caption, answers_of(SCENE), question, word)
    assert text == expected
    assert answers[question] == (word if word in text and word != "blue" else "red")


def test_articles_follow_the_word_after_them():
    answers = answers_of(Scene((Item("small", "red", "ring", "growing"),), "orange"))
    text, _ = exchange("an orange background with a small red ring growing", answers, "background", "blue")
    assert text == "a blue background with a small red ring growing"


@pytest.mark.slow
def test_it_learns_and_is_what_the_conditioner_loads(tmp_path):
    folder = tmp_path / "t5"
    assert main(["--output", str(folder), "--steps", "25", "--batch_size", "8", "--hidden_size", "32"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "spiece.model"]
    embedder = FrozenT5Embedder(str(folder), max_length=48)
    assert embedder(["a large red circle moving left on a blue background"]).shape == (1, 48, 32)
    # Twenty-five steps are few, but a new layer reads more from its states than from those of untrained weights.
    tokens, answers = encode(captions(64, 5), embedder.tokenizer, 48)
    losses = {}
    for kind in ("trained", "untrained"):
        if kind == "untrained":
            for parameter in embedder.transformer.parameters():
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        heads = make_heads(embedder.transformer)
        optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
        for _ in range(30):
            loss = question_loss(embedder.transformer, heads, tokens, answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["trained"] < losses["untrained"]


def test_words_of_captions_are_pieces():
    texts = [text for text, _ in captions(500, 0)]
    tokenizer = SentencePieceProcessor(model_proto=train_vocabulary(with_whole_words(texts)))
    words = {word.strip(",") for text in texts for word in text.split()} - {"medium-sized"}
    assert {word: pieces for word in words if len(pieces := tokenizer.encode(word, out_type=str)) > 1} == {}


def test_captions_are_not_cut():
    """The longest captions fit, in a vocabulary learnt from others."""
    vocabulary = train_vocabulary(with_whole_words([text for text, _ in captions(1500, 0)]))
    tokenizer = SentencePieceProcessor(model_proto=vocabulary)
    default = build_parser().parse_args([]).max_length
    assert max(len(tokenizer.encode(text)) for text, _ in captions(1000, 1)) < default


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hidden_size", "40"], "--hidden_size: got 40; it must be a multiple of 16"),
        (["--steps", "0"], "--steps: got 0; it must be at least 1"),
        (["--stepps", "1"], "--stepps"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, caplog, arguments, named):
    assert main(["--output", str(tmp_path / "t5"), *arguments]) == 2
    assert named in caplog.text
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path: Path, caplog):
    (tmp_path / "t5").mkdir()
    assert main(["--output", str(tmp_path / "t5")]) == 2
    assert "--overwrite" in caplog.text

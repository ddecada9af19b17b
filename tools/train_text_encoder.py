"""Train the text encoder of the tiny models: a T5 with its own vocabulary.

  python tools/train_text_encoder.py --output checkpoints/t5 --steps 1500

The encoder reads captions of moving shapes. From the state of every token, padding included, it learns to predict all
content of the caption: size, colour, shape and motion of the first and the second thing, colour and pattern of the
background. A network that attends to any token thus gets the whole caption. Captions are those of
`make_shapes_dataset.py`, without held-out combinations, and others with colours and shapes that are never drawn: like
T5, the encoder knows words of things that the video model has not seen. The output is the folder that
`FrozenT5Embedder` loads: `config.json`, `model.safetensors`, `spiece.model`. One core takes a few minutes. Exit codes:
0 done, 2 the arguments or files are wrong.
"""

import logging
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.tool_parser import ToolParser, check_output_folder, run_tool  # noqa: E402
from cogvideox_sat.files.atomic import new_folder  # noqa: E402
from cogvideox_sat.shapes.scenes import (  # noqa: E402
    COLOURS,
    CONCEPT_SHAPES,
    MOTIONS,
    PATTERNS,
    PLAIN,
    SHAPES,
    SIZES,
    Scene,
    phrase,
    random_scenes,
)
from cogvideox_sat.shapes.tiny_text_encoder import HEAD_DIM  # noqa: E402
from sgm.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("train_text_encoder")

# Words that no dataset shows; they replace others of their kind.
MORE_COLOURS = ("pink", "brown", "grey", "cyan", "golden")
MORE_SHAPES = ("heart", "hexagon", "diamond", "arrow", "crescent", "oval")
MORE_SHARE = 0.15  # share of captions, for each kind, with such a word
NOTHING = "nothing"  # the answer for the second thing of a caption with one thing

OF_A_THING = {
    "size": (NOTHING, *SIZES),
    "colour": (NOTHING, *COLOURS, *MORE_COLOURS),
    "shape": (NOTHING, *SHAPES, *CONCEPT_SHAPES, *MORE_SHAPES),
    "motion": (NOTHING, *MOTIONS),
}
QUESTIONS = {
    **{f"{order} {kind}": answers for order in ("first", "second") for kind, answers in OF_A_THING.items()},
    "background": tuple(COLOURS),
    "pattern": (PLAIN, *PATTERNS),
}
LEARNING_RATE = 0.02
VOCABULARY_CAPTIONS = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(train_text_encoder, arguments, "train_text_encoder")


def build_parser() -> ToolParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("checkpoints/t5"), help="folder (default: checkpoints/t5)")
    add("--hidden_size", type=int, default=128, help="width of the states, a multiple of 16 (default: 128)")
    add("--max_length", type=int, default=32, help="tokens of a caption, as in the model's configuration (default: 32)")
    add("--steps", type=int, default=1500, help="training steps (default: 1500)")
    add("--batch_size", type=int, default=32, help="captions per step (default: 32)")
    add("--seed", type=int, default=0, help="seed of the captions and the weights (default: 0)")
    add("--overwrite", action="store_true", help="replace what exists")
    parser.set_defaults(dry_run=False)
    return parser


def train_text_encoder(arguments: Sequence[str] | None) -> None:
    """Check the arguments, train, and write the encoder.

    Raises:
        UserError: the folder exists or cannot be written, or a number is out of range.
    """
    options = build_parser().parse_args(arguments)
    for name in ("hidden_size", "max_length", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: got {getattr(options, name)}; it must be at least 1")
    if options.hidden_size % HEAD_DIM:
        raise UserError(f"--hidden_size: got {options.hidden_size}; it must be a multiple of {HEAD_DIM}")
    check_output_folder(options.output, options, ["spiece.model"])
    with new_folder(options.output, needed=0) as new:
        train(new, options.hidden_size, options.max_length, options.steps, options.batch_size, options.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def captions(count: int, seed: int, split: str = "train") -> list[tuple[str, dict[str, str]]]:
    """Return captions, each with the answer to each of the QUESTIONS."""
    chance = random.Random(f"captions {seed}")
    result = []
    for scene in random_scenes(count, seed, split):
        text, answers = phrase(scene, chance), answers_of(scene)
        for kind, more in (("colour", MORE_COLOURS), ("shape", (*CONCEPT_SHAPES, *MORE_SHAPES))):
            if chance.random() < MORE_SHARE:
                text, answers = exchange(text, answers, f"first {kind}", chance.choice(more))
        result.append((text, answers))
    return result


def with_whole_words(texts: Sequence[str]) -> list[str]:
    """Return texts from which SentencePiece learns whole words as pieces.

    SentencePiece only makes pieces of what is part of several words, and a word followed by a comma or a full stop
    counts as another word.
    """
    words = sorted({word.strip(",.") for text in texts for word in text.split()})
    return [*texts, *(f"{word} {word}, {word}." for word in words)]


def answers_of(scene: Scene) -> dict[str, str]:
    answers = {"background": scene.background, "pattern": scene.pattern}
    for order, item in zip(("first", "second"), (*scene.items, None), strict=False):
        answers |= {f"{order} {kind}": getattr(item, kind, NOTHING) for kind in OF_A_THING}
    return answers


def exchange(text: str, answers: dict[str, str], question: str, word: str) -> tuple[str, dict[str, str]]:
    """Return a caption with another answer to one question, and the new answers.

    Colours of a scene differ, so that the word of an answer is unique.
    """
    others = [answer for name, answer in answers.items() if name != question]
    old = answers[question]
    if old in others or word in others:
        return text, answers
    words = [word if each == old else each for each in text.replace(",", " ,").split(" ")]
    words = [
        "an" if each in ("a", "an") and after[0] in "aeiou" else "a" if each == "an" else each
        for each, after in zip(words, [*words[1:], "."], strict=True)
    ]
    return " ".join(words).replace(" ,", ","), {**answers, question: word}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(folder: Path, hidden_size: int, max_length: int, steps: int, batch_size: int, seed: int) -> None:
    """Train the encoder and write it to an empty folder."""
    import torch
    from tqdm import tqdm
    from transformers import T5Tokenizer

    from cogvideox_sat.shapes.tiny_text_encoder import make_encoder, train_vocabulary, write_text_encoder
    from sgm.muon import Muon

    vocabulary = train_vocabulary(with_whole_words([text for text, _ in captions(VOCABULARY_CAPTIONS, seed)]))
    encoder = make_encoder(hidden_size, seed)
    write_text_encoder(folder, encoder, vocabulary)
    tokenizer = T5Tokenizer.from_pretrained(folder)
    heads = make_heads(encoder)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = Muon(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    examples = captions(max(steps * batch_size // 4, batch_size), seed + 1)
    tokens, answers = encode(examples, tokenizer, max_length)
    generator = torch.Generator().manual_seed(seed)
    encoder.train()
    bar = tqdm(range(steps), desc="text encoder", unit="step")
    for _ in bar:
        chosen = torch.randint(len(tokens), (batch_size,), generator=generator)
        loss = question_loss(encoder, heads, tokens[chosen], answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    encoder.eval()
    write_text_encoder(folder, encoder, vocabulary)
    held_out = encode(captions(500, seed + 2, split="held_out"), tokenizer, max_length)
    for question, share in accuracy(encoder, heads, *held_out).items():
        logger.info("%-18s %.2f %% of tokens of held-out captions tell it", question, 100 * share)


def make_heads(encoder: "nn.Module") -> "nn.ModuleList":
    """Return a linear layer for each layer of the encoder that predicts all answers."""
    from torch import nn

    answers = sum(map(len, QUESTIONS.values()))
    return nn.ModuleList(nn.Linear(encoder.config.d_model, answers) for _ in range(encoder.config.num_layers))


def encode(examples: Sequence[tuple[str, dict[str, str]]], tokenizer: object, max_length: int) -> tuple["Tensor", ...]:
    """Return token ids (captions, max_length) and the answers' indices (captions, questions)."""
    import torch

    texts = [text for text, _ in examples]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    numbers = [[choices.index(answers[name]) for name, choices in QUESTIONS.items()] for _, answers in examples]
    return tokens["input_ids"], torch.tensor(numbers)


def question_loss(encoder: "nn.Module", heads: "nn.ModuleList", tokens: "Tensor", answers: "Tensor") -> "Tensor":
    """Return the mean cross entropy of all answers, for all tokens and after every layer.

    Each layer has its own head. A layer that gathers the content of other tokens only learns once these tokens have it,
    for example the background's colour; the losses of the layers before teach that.
    """
    import torch.nn.functional as F

    states = encoder(input_ids=tokens, output_hidden_states=True).hidden_states[1:]
    losses = [
        F.cross_entropy(each.flatten(0, 1), answers[:, [number]].expand(tokens.shape).flatten())
        for head, state in zip(heads, states, strict=True)
        for number, each in enumerate(head(state).split(list(map(len, QUESTIONS.values())), dim=2))
    ]
    return sum(losses) / len(losses)


def accuracy(encoder: "nn.Module", heads: "nn.ModuleList", tokens: "Tensor", answers: "Tensor") -> dict[str, float]:
    """Return for each question the share of tokens whose state gives the right answer."""
    import torch

    with torch.no_grad():
        logits = heads[-1](encoder(input_ids=tokens).last_hidden_state).split(list(map(len, QUESTIONS.values())), dim=2)
    return {
        name: (each.argmax(2) == answers[:, [number]]).float().mean().item()
        for number, (name, each) in enumerate(zip(QUESTIONS, logits, strict=True))
    }


if __name__ == "__main__":
    sys.exit(main())

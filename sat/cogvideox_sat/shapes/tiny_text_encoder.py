"""A small T5 encoder, and a vocabulary that is learnt on the spot, for `FrozenT5Embedder`."""

import io
import random
import string
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import T5EncoderModel

VOCABULARY_SIZE = 384
EXTRA_IDS = 100  # sentinel tokens that T5's tokenizer adds after the vocabulary
HEAD_DIM = 16

_ADJECTIVES = """red orange yellow green blue purple pink brown black white grey golden silver bright dark pale
small big tiny huge tall short long thin round old young happy sad sleepy angry quiet loud slow fast gentle wild
brave clever curious wooden paper metal glass plastic stone broken shiny dusty wet dry warm cold frozen colorful
beautiful strange simple"""
_SUBJECTS = """dog cat panda horse bird eagle owl fish dolphin whale shark turtle rabbit fox wolf bear lion tiger
elephant monkey mouse butterfly bee spider dragon unicorn dinosaur robot astronaut child girl boy woman man
family fisherman farmer chef dancer musician painter teacher doctor soldier knight queen king wizard car train
bus bicycle truck boat ship plane rocket drone balloon kite ball circle square triangle cube star candle lamp
clock book guitar piano violin drum flower rose tree leaf mushroom apple cake pizza coffee teapot umbrella hat
mask statue snowman toy"""
_VERBS = """moves runs walks jumps dances flies floats swims climbs falls rises turns spins rolls slides glides
drifts drives rides sits stands sleeps eats drinks cooks reads writes paints sings plays laughs smiles cries
waves looks watches waits talks fights explores builds breaks opens melts burns glows shines explodes grows
shrinks blooms"""
_PLACES = """forest|beach|mountain|market|sea|river|field|kitchen|moon|lake|library|street|city|waterfall|clouds
desert|campfire|garden|park|bridge|castle|village|house|window|room|table|stage|school|station|airport|harbor
island|jungle|cave|volcano|glacier|snow|rain|storm|fog|sky|space|planet|ocean|reef|meadow|vineyard|temple|tower
museum|factory|workshop"""
_STYLES = """at sunset|at sunrise|at night|in the morning light|with vivid colors|in slow motion|close up
wide shot|the camera follows|the camera zooms in|in black and white|with deep shadows|highly detailed
cinematic lighting|as an animation|in the style of an oil painting|watercolor|photorealistic
the background is blurred|from left to right|seen from above|with a calm atmosphere|surrounded by people
reflections on the surface|golden hour|8 frames per second"""


def build_text_encoder(folder: Path, hidden_size: int, seed: int) -> None:
    """Write an encoder with random weights, and a general vocabulary, to `folder`.

    Args:
        hidden_size: width of the text states, a multiple of 16.
    """
    write_text_encoder(folder, make_encoder(hidden_size, seed), train_vocabulary(sentences(2000, seed)))


def write_text_encoder(folder: Path, encoder: "T5EncoderModel", vocabulary: bytes) -> None:
    """Write `config.json`, `model.safetensors` and `spiece.model`."""
    from transformers.utils import logging

    with warnings.catch_warnings():  # transformers warns if an environment variable asks for progress bars
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
    encoder.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # readable for others, like the other files
    (folder / "spiece.model").write_bytes(vocabulary)


def make_encoder(hidden_size: int, seed: int) -> "T5EncoderModel":
    """Return an encoder like T5 v1.1 with two layers.

    It has gated GELU and no weights shared with an output layer.
    """
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY_SIZE + EXTRA_IDS,
        d_model=hidden_size,
        d_kv=HEAD_DIM,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=hidden_size // HEAD_DIM,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(config)


def train_vocabulary(texts: Iterable[str]) -> bytes:
    """Return a SentencePiece unigram model of about 384 pieces with T5's ids.

    The ids are 0 padding, 1 end of text, 2 unknown. Every printable ASCII character is a piece, so that no English
    prompt has unknown tokens.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY_SIZE,
        hard_vocab_limit=False,  # the texts may not have as many pieces worth keeping
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def sentences(count: int, seed: int) -> Iterator[str]:
    """Yield descriptions of videos, the same ones for the same seed.

    For example, "A wooden robot dances on the moon, close up.".
    """
    words = [text.split() for text in (_ADJECTIVES, _SUBJECTS, _VERBS)]
    phrases = [text.replace("\n", "|").split("|") for text in (_PLACES, _STYLES)]
    choose = random.Random(seed).choice
    for _ in range(count):
        adjective, subject, verb, place, style = map(choose, (*words, *phrases))
        article = choose(("a", "the", "one", "another"))
        where = choose(("in", "on", "near", "over", "through", "across", "under", "behind"))
        sentence = f"{article} {adjective} {subject} {verb} {where} the {place}, {style}."
        yield choose((sentence, sentence.capitalize()))

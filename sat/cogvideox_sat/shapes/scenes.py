"""Scenes of moving shapes: their words, captions, parsing and split.

A scene has one or two coloured shapes, each with a size and a motion, over a plain or patterned background. A caption
can be phrased in several ways; `parse` understands all of them. The combination (colour, shape, motion, background) of
every shape decides whether a scene may be used for training, so that a model can be tested on combinations that it has
never seen.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sgm.errors import UserError

COLOURS = {  # red, green, blue in [0, 1]
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.7),
    "orange": (1.0, 0.55, 0.05),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES = {"small": 0.14, "medium": 0.20, "large": 0.27}  # radius relative to the shorter side
PATTERNS = ("striped", "checkered", "dotted")
PLAIN = "plain"
# Motion: phrases after a shape ("a circle ..."), first with a participle, then with a verb.
MOTIONS = {
    "moving left": (("moving left", "moving to the left"), ("moves left", "moves to the left", "is moving left")),
    "moving right": (("moving right", "moving to the right"), ("moves right", "moves to the right", "is moving right")),
    "moving up": (("moving up", "moving upwards"), ("moves up", "moves upwards", "is moving up")),
    "moving down": (("moving down", "moving downwards"), ("moves down", "moves downwards", "is moving down")),
    "growing": (("growing", "getting bigger"), ("grows", "gets bigger", "is growing")),
    "shrinking": (("shrinking", "getting smaller"), ("shrinks", "gets smaller", "is shrinking")),
    "moving in a circle": (
        ("moving in a circle", "going round in a circle"),
        ("moves in a circle", "goes round in a circle", "is moving in a circle"),
    ),
    "bouncing": (("bouncing", "bouncing up and down"), ("bounces", "bounces up and down", "is bouncing")),
    "standing still": (("standing still", "not moving"), ("stands still", "does not move", "is standing still")),
}
# Concepts are drawn only on request. Each one sets some fields of an item, with words that no other scene uses.
CONCEPTS = {
    "star": {"shape": "star", "colour": "purple"},
    "spiral": {"motion": "moving in a spiral"},
}
CONCEPT_SHAPES = ("star",)
CONCEPT_MOTIONS = {
    "moving in a spiral": (
        ("moving in a spiral", "going round in a spiral"),
        ("moves in a spiral", "goes round in a spiral", "is moving in a spiral"),
    ),
}
MOTION_WORDS = MOTIONS | CONCEPT_MOTIONS
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
PATTERN_WORDS = {PLAIN: ("", "plain"), **{pattern: (pattern,) for pattern in PATTERNS}}

# Layout: the part of the picture in which each shape stays (top, left, height, width).
LAYOUTS = {
    "alone": ((0.0, 0.0, 1.0, 1.0),),
    "left and right": ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 0.5)),
    "right and left": ((0.0, 0.5, 1.0, 0.5), (0.0, 0.0, 1.0, 0.5)),
    "above and below": ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)),
    "below and above": ((0.5, 0.0, 0.5, 1.0), (0.0, 0.0, 0.5, 1.0)),
}
PATTERNED_SHARE = 0.3
PAIR_SHARE = 0.2
HELD_OUT_PERCENT = 22
SPLITS = ("train", "held_out", "all")
BASE_PHRASING = 0.4  # share of captions in the first phrasing, with the first word for everything


@dataclass(frozen=True)
class Item:
    """One shape of a scene; two items are equal if a caption describes them in the same way.

    Args:
        phase: start of the shape along its path, in [0, 1).
        offset: position of the shape across its direction of motion, in [-1, 1].
    """

    size: str
    colour: str
    shape: str
    motion: str
    phase: float = field(default=0.5, compare=False)
    offset: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Scene:
    """The content of one clip.

    Args:
        items: one item, or two items of different colours, in the order of the caption.
        background: colour of the background, which no item has.
        pattern: "plain" or one of PATTERNS, in the background's colour and a shade of it.
        layout: one of LAYOUTS, with a place for each item.
    """

    items: tuple[Item, ...]
    background: str
    pattern: str = PLAIN
    layout: str = field(default="alone", compare=False)

    @property
    def caption(self) -> str:
        """Return the caption in the first phrasing.

        For example, "a large red circle moving left on a striped blue background".
        """
        return phrase(self)

    @property
    def combinations(self) -> list[tuple[str, str, str, str]]:
        """Return (colour, shape, motion, background with pattern) of each item."""
        background = f"{self.pattern} {self.background}"
        return [(item.colour, item.shape, item.motion, background) for item in self.items]

    @property
    def split(self) -> str:
        """Return the split of all combinations, "train" or "held_out"; "mixed" if they differ."""
        splits = {split_of(combination) for combination in self.combinations}
        return splits.pop() if len(splits) == 1 else "mixed"


def split_of(combination: Sequence[str]) -> str:
    """Return the split of a combination, "train" or "held_out"; it never changes."""
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT else "train"


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------

# {p}: shapes with participles, {v}: shapes with verbs, {b}: the background. The first one is the base phrasing.
TEMPLATES = (
    "{p} on {b}",
    "{v} on {b}",
    "on {b}, {v}",
    "{v} in front of {b}",
    "{b} with {p}",
    "a video of {p} on {b}",
)
FILLERS = ("a", "an", "and", "on", "with", "in front of", "a video of")


def phrase(scene: Scene, chance: random.Random | None = None) -> str:
    """Return a caption: in the base phrasing, or with `chance` in a random phrasing."""
    if chance is None or chance.random() < BASE_PHRASING:
        template, pick = TEMPLATES[0], lambda words: words[0]
    else:
        template, pick = chance.choice(TEMPLATES), chance.choice
    said = {}
    for kind, form in (("p", 0), ("v", 1)):
        if f"{{{kind}}}" in template:
            said[kind] = " and ".join(
                f"{_with_article(pick(SIZE_WORDS[item.size]), item.colour, item.shape)} "
                f"{pick(MOTION_WORDS[item.motion][form])}"
                for item in scene.items
            )
    background = _with_article(pick(PATTERN_WORDS[scene.pattern]), scene.background, "background")
    return template.format(b=background, **said)


def _with_article(*words: str) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _phrases() -> dict[str, tuple[str, str]]:
    """Return all phrases of captions: phrase -> (kind, meaning)."""
    known = dict.fromkeys(FILLERS, ("filler", ""))
    known |= {colour: ("colour", colour) for colour in COLOURS}
    known |= {shape: ("shape", shape) for shape in (*SHAPES, *CONCEPT_SHAPES)}
    known |= {word: ("size", size) for size, words in SIZE_WORDS.items() for word in words}
    known |= {word: ("pattern", pattern) for pattern, words in PATTERN_WORDS.items() for word in words if word}
    known |= {said: ("motion", motion) for motion, forms in MOTION_WORDS.items() for form in forms for said in form}
    known["background"] = ("background", "")
    return known


_KNOWN = _phrases()
_PHRASE = re.compile("|".join(rf"{re.escape(said)}(?![\w-])" for said in sorted(_KNOWN, key=len, reverse=True)))


def parse(caption: str) -> Scene:
    """Return the scene that a caption describes, in any phrasing.

    Phases, offsets and the layout, which captions do not describe, have default values.

    Raises:
        UserError: the caption has an unknown word, or something is missing.
    """
    tokens = [token for token in _tokens(caption) if token[0] != "filler"]
    kinds = " ".join(kind for kind, _ in tokens) + " "
    item = "size colour shape motion "
    background = "(pattern )?colour background "
    if not re.fullmatch(f"({item}){{1,2}}{background}|{background}({item}){{1,2}}", kinds):
        raise UserError(
            f"not a caption of a scene: '{caption}'; an example: 'a large red circle moving left on a blue background'"
        )
    words = iter(tokens)
    items, ground = [], {}
    for kind, word in words:
        if kind == "size":
            items.append(Item(word, colour=next(words)[1], shape=next(words)[1], motion=next(words)[1]))
        elif kind != "background":
            ground[kind] = word
    layout = "alone" if len(items) == 1 else "left and right"
    return Scene(tuple(items), ground["colour"], ground.get("pattern", PLAIN), layout)


def _tokens(caption: str) -> Iterator[tuple[str, str]]:
    """Yield the phrases of a caption as (kind, meaning).

    Raises:
        UserError: a word is none of them.
    """
    text = caption.lower().replace(",", " ").rstrip(" .\n")
    position = 0
    while rest := text[position:].lstrip():
        position = len(text) - len(rest)
        match = _PHRASE.match(text, position)
        if match is None:
            raise UserError(
                f"the caption '{caption.strip()}' has a word that no scene's caption uses: '{rest.split()[0]}'; use "
                "the words of tools/make_shapes_dataset.py"
            )
        yield _KNOWN[match.group()]
        position = match.end()


# ---------------------------------------------------------------------------------------------------------------------
# Random scenes
# ---------------------------------------------------------------------------------------------------------------------


def random_scenes(
    count: int,
    seed: int,
    split: str = "train",
    concept: str | None = None,
    pairs: bool = True,
    *,
    sizes: Sequence[str] = tuple(SIZES),
    shapes: Sequence[str] = SHAPES,
    motions: Sequence[str] = tuple(MOTIONS),
) -> list[Scene]:
    """Return random scenes of a split, which differ as long as unused scenes are left.

    Args:
        count: number of scenes.
        concept: one of CONCEPTS, for scenes that show only this concept.
        pairs: whether some scenes may have two shapes; scenes of a concept never do.
        sizes, shapes, motions: words to choose from, unless the concept sets them. A word that is listed n times is
            chosen n times as often, as long as enough different scenes are left. Without "small" there are no pairs,
            because some motions of larger shapes have no room in half a picture.
    """
    chance = random.Random(seed)
    pairs = pairs and concept is None and "small" in sizes
    words = {"size": sizes, "shape": shapes, "motion": motions}
    seen: set[Scene] = set()
    scenes: list[Scene] = []
    while len(scenes) < count:
        patterned = chance.random() < PATTERNED_SHARE
        paired = pairs and chance.random() < PAIR_SHARE
        scene = _random_scene(chance, patterned, paired, split, concept, words)
        for _ in range(49):  # if all scenes of this kind are used, one is repeated elsewhere in the picture
            if scene not in seen:
                break
            scene = _random_scene(chance, patterned, paired, split, concept, words)
        seen.add(scene)
        scenes.append(scene)
    return scenes


def _random_scene(
    chance: random.Random,
    patterned: bool,
    paired: bool,
    split: str,
    concept: str | None,
    words: Mapping[str, Sequence[str]],
) -> Scene:
    """Return a random scene of a split; the order of the draws is part of every seed's result."""
    decided = CONCEPTS[concept] if concept else {}
    sizes = [size for size in words["size"] if size != "large"] if paired else words["size"]
    while True:
        pattern = chance.choice(PATTERNS) if patterned else PLAIN
        if "colour" in decided:
            colours = [decided["colour"], chance.choice([name for name in COLOURS if name != decided["colour"]])]
        else:
            colours = chance.sample(list(COLOURS), 3 if paired else 2)
        layout = chance.choice([name for name, places in LAYOUTS.items() if len(places) == 1 + paired])
        items = tuple(
            Item(
                chance.choice(sizes),
                colour,
                decided.get("shape") or chance.choice(words["shape"]),
                decided.get("motion") or chance.choice(words["motion"]),
                chance.random(),
                chance.uniform(-1, 1),
            )
            for colour in colours[:-1]
        )
        scene = Scene(items, colours[-1], pattern, layout)
        if all(_has_room(item, layout) for item in items) and split in (scene.split, "all"):
            return scene


def _has_room(item: Item, layout: str) -> bool:
    """Return whether the motion can be seen clearly in the layout.

    Across half a picture, only a small shape can move far enough.
    """
    if layout == "alone" or item.size == "small" or item.motion in ("growing", "shrinking", "standing still"):
        return True
    sideways = item.motion in ("moving left", "moving right")
    upright = item.motion in ("moving up", "moving down", "bouncing")
    return sideways if layout in ("above and below", "below and above") else upright

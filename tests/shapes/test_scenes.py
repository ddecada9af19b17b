"""Captions describe scenes and can be read back; training shows no held-out ones."""

import random
from collections import Counter

import pytest

from cogvideox_sat.shapes.scenes import (
    COLOURS,
    CONCEPTS,
    HELD_OUT_PERCENT,
    LAYOUTS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    parse,
    phrase,
    random_scenes,
    split_of,
)
from sgm.errors import UserError

SCENE = Scene((Item("large", "red", "circle", "moving left"),), "blue")
PAIR = Scene(
    (Item("small", "orange", "star", "moving in a circle"), Item("medium", "green", "square", "standing still")),
    "white",
    "striped",
    "left and right",
)


def test_captions_are_english():
    assert SCENE.caption == "a large red circle moving left on a blue background"
    assert PAIR.caption == (
        "a small orange star moving in a circle and a medium green square standing still on a striped white background"
    )
    on_orange = Scene((Item("small", "red", "ring", "growing"),), "orange")
    assert on_orange.caption.endswith(" on an orange background")


def test_every_caption_is_read_back():
    """Captions of both splits, of one and two shapes, and of concepts, in every phrase."""
    chance = random.Random(0)
    concepts = [scene for concept in CONCEPTS for scene in random_scenes(300, 1, "all", concept)]
    scenes = [*random_scenes(3000, 0, "all"), *concepts]
    captions = [phrase(scene, chance) for scene in scenes]
    for scene, caption in zip(scenes, captions, strict=True):
        assert parse(caption) == scene == parse(f" {caption.capitalize()}.\n")
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert words >= {"big", "little", "medium-sized", "plain", "video", "front", "upwards", "bounces", "grows"}
    assert words >= {"star", "spiral"}


def test_the_same_scene_is_told_in_several_ways():
    chance = random.Random(0)
    told = Counter(phrase(SCENE, chance) for _ in range(1000))
    assert len(told) > 50
    assert told[SCENE.caption] > 350


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a large crimson circle moving left on a blue background", "'crimson'"),
        ("a large red circle moving leftish on a blue background", "'moving'"),
        ("a large red circles moving left on a blue background", "'circles'"),
        ("a red circle moving left on a blue background", "not a caption"),
        ("a large red circle moving left", "not a caption"),
        ("", "not a caption"),
    ],
)
def test_what_no_scene_is_told_in_is_named(caption, named):
    with pytest.raises(UserError, match=named):
        parse(caption)


def test_a_fifth_of_all_combinations_is_held_out_whatever_the_word():
    held_out = [
        (colour, shape, motion, f"{pattern} {background}")
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for pattern in ("plain", *PATTERNS)
        for background in COLOURS
        if background != colour and split_of((colour, shape, motion, f"{pattern} {background}")) == "held_out"
    ]
    assert len(held_out) / (8 * 5 * 9 * 4 * 7) == pytest.approx(HELD_OUT_PERCENT / 100, abs=0.01)
    for place, words in ((0, COLOURS), (1, SHAPES), (2, MOTIONS)):
        counts = Counter(combination[place] for combination in held_out)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.7 * max(counts.values())
    assert split_of(("red", "circle", "moving left", "plain blue")) == "train"  # for ever: pinned values
    assert split_of(("red", "circle", "growing", "plain green")) == "held_out"


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_item_of_a_scene_is_in_the_scenes_split(split):
    for scene in [scene for concept in (None, *CONCEPTS) for scene in random_scenes(500, 0, split, concept)]:
        assert {split_of(combination) for combination in scene.combinations} == {split}


def test_scenes_are_drawn_by_lot_evenly_and_differ():
    scenes = random_scenes(2000, seed=3)
    assert len(set(scenes)) == 2000
    assert sum(scene.pattern != "plain" for scene in scenes) / 2000 == pytest.approx(0.3, abs=0.04)
    assert sum(len(scene.items) == 2 for scene in scenes) / 2000 == pytest.approx(0.2, abs=0.04)
    items = [scene.items[0] for scene in scenes if len(scene.items) == 1]
    for name, words in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
        counts = Counter(getattr(item, name) for item in items)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.7 * max(counts.values())
    assert all(len(scene.items) == len(LAYOUTS[scene.layout]) for scene in scenes)
    assert all(
        len({scene.background, *(item.colour for item in scene.items)}) == 1 + len(scene.items) for scene in scenes
    )
    assert scenes == random_scenes(2000, seed=3) != random_scenes(2000, seed=4)


def test_there_are_as_many_scenes_as_asked_for_even_if_they_repeat():
    """There are 3 x 9 x 7 plain and three times as many patterned stars."""
    assert len(random_scenes(1500, 0, "train", "star")) == 1500


def test_a_concept_is_drawn_only_when_asked_for():
    for item in [item for scene in random_scenes(500, 0) for item in scene.items]:
        assert item.shape in SHAPES
        assert item.motion in MOTIONS
    for concept, decided in CONCEPTS.items():
        scenes = random_scenes(200, 0, concept=concept)
        assert all(len(scene.items) == 1 for scene in scenes)
        for name, words in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
            shown = {getattr(scene.items[0], name) for scene in scenes}
            assert shown == ({decided[name]} if name in decided else set(words))


def test_no_pairs_where_none_are_wanted():
    assert all(len(scene.items) == 1 for scene in random_scenes(200, 0, pairs=False))


@pytest.mark.parametrize(
    ("kind", "one", "other", "pairs"),
    [
        ("shape", "ring", "cross", True),
        ("size", "small", "medium", False),  # in pairs, small ones are more often the ones that have room
        ("motion", "growing", "moving in a circle", False),
    ],
)
def test_words_come_as_often_as_they_are_named(kind, one, other, pairs):
    """As long as there are scenes of them that differ."""
    scenes = random_scenes(400, 0, pairs=pairs, **{f"{kind}s": [one, *[other] * 3]})
    counts = Counter(getattr(item, kind) for scene in scenes for item in scene.items)
    assert set(counts) == {one, other}
    assert counts[other] / counts[one] == pytest.approx(3, rel=0.2)


def test_a_concept_leaves_the_other_words_to_choose():
    spirals = random_scenes(50, 0, concept="spiral", shapes=["ring"], sizes=["large"], motions=["growing"])
    assert {(item.shape, item.size, item.motion) for scene in spirals for item in scene.items} == {
        ("ring", "large", "moving in a spiral")
    }


def test_pairs_need_small_shapes():
    """A medium one that moves in a circle has no room in half a picture."""
    scenes = random_scenes(50, 0, sizes=["medium"], motions=["moving in a circle"])
    assert all(len(scene.items) == 1 for scene in scenes)
    pairs = [scene for scene in random_scenes(200, 0, sizes=["small", "large"]) if len(scene.items) == 2]
    assert {item.size for scene in pairs for item in scene.items} == {"small"}

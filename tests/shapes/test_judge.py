"""The judge names the content of clips, also of degraded ones, and invents nothing."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.shapes.drawing import draw, draw_moments
from cogvideox_sat.shapes.judge import NONE, judge
from cogvideox_sat.shapes.scenes import (
    CONCEPT_MOTIONS,
    CONCEPT_SHAPES,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    random_scenes,
)
from videos import read_video

pytestmark = pytest.mark.usefixtures("one_thread")


def spoilt(clip: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a clip as a small model might draw it, blurred, with noise of 3 %.

    Each colour is off by up to a tenth.
    """
    chance = torch.Generator().manual_seed(seed)
    weights = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).square().mul(-0.5).exp()
    weights = weights / weights.sum()
    padded = F.pad(clip, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, 5)), weights.view(1, 1, 5, 1)).view_as(clip)
    off = (torch.rand(1, 3, 1, 1, generator=chance) * 2 - 1) * 0.2  # pixels reach from -1 to 1
    return (blurred + off + 0.06 * torch.randn(clip.shape, generator=chance)).clamp(-1, 1)


def wrong(scenes, change) -> list[tuple[str, Scene]]:
    """Return the captions of scenes that the judge describes differently, with its answer."""
    found = [(scene, judge(change(draw(scene, 9, 64, 64), number))) for number, scene in enumerate(scenes)]
    return [
        (scene.caption, seen)
        for scene, seen in found
        if set(seen.items) != set(scene.items) or (seen.background, seen.pattern) != (scene.background, scene.pattern)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda clip, _: clip, spoilt], ids=["drawn", "spoilt"])
def test_it_names_every_word(change):
    """Every second pair of a shape and a motion is tried, and every other word."""
    sizes, patterns = list(SIZES), ["plain", *PATTERNS]
    colours = [("red", "green"), ("orange", "yellow"), ("blue", "purple"), ("white", "black"), ("black", "blue")]
    scenes = []
    pairs = product((*SHAPES, *CONCEPT_SHAPES), (*MOTIONS, *CONCEPT_MOTIONS))
    for number, (shape, motion) in enumerate(pairs):
        colour, background = colours[number % 5]
        item = Item(sizes[number % 3], colour, shape, motion, phase=number % 7 / 7, offset=number % 11 / 5 - 1)
        scenes.append(Scene((item,), background, patterns[number // 3 % 4]))
    assert wrong(scenes[::2], change) == []


@pytest.mark.parametrize("motion", ["moving in a circle", "moving in a spiral"])
def test_a_spiral_is_no_circle_wherever_it_is(motion):
    for phase in torch.linspace(0, 1, 12).tolist():
        scene = Scene((Item("small", "red", "circle", motion, phase, offset=1 - 2 * phase),), "white")
        assert judge(spoilt(draw(scene, 9, 64, 64), 0)).items[0].motion == motion


@pytest.mark.parametrize("motion", ["bouncing", "moving in a circle", "standing still"])
@pytest.mark.parametrize("clips", [1, 3])
def test_a_motion_that_comes_round_may_begin_in_its_middle(motion, clips):
    scene = Scene((Item("small", "red", "square", motion, phase=0.3),), "white")
    moments = [(frame / 8 + 0.5) % 1 for frame in range(8 * clips + 1)]
    assert judge(spoilt(draw_moments(scene, moments, 64, 64), 0), clips).items[0].motion == motion


@pytest.mark.slow
def test_it_names_both_shapes():
    pairs = [scene for scene in random_scenes(60, 0, "held_out") if len(scene.items) == 2]
    assert wrong(pairs, lambda clip, _: clip) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (192, 256)])
def test_it_reads_videos_of_any_size_and_length(tmp_path, size):
    for number, scene in enumerate(random_scenes(4, 1, "held_out", pairs=False)):
        path = tmp_path / f"{number}.mp4"
        with VideoWriter(path, 8, *size) as video:
            video.write(draw(scene, 9 + 8 * (number % 2), *size))
        assert judge(read_video(path)[1]) == scene


def test_it_finds_nothing_in_what_shows_nothing():
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn(9, 3, 64, 64, generator=chance)
    blobs = F.interpolate(torch.randn(9, 3, 8, 8, generator=chance), size=(64, 64), mode="bicubic")
    for video in (noise, blobs, torch.zeros(9, 3, 64, 64)):
        assert judge(video) == Scene((), NONE, NONE)
    assert judge(torch.ones(9, 3, 64, 64)) == Scene((), "white")


def test_an_odd_outline_or_way_is_none():
    """A thin bar is not one of the shapes, and random jumps are not a motion."""
    chance, clip = torch.Generator().manual_seed(0), torch.ones(9, 3, 64, 64)
    for frame in clip:
        top, left = torch.randint(4, 36, (2,), generator=chance).tolist()
        frame[:, top : top + 24, left : left + 6] = -1
    assert judge(clip) == Scene((Item(NONE, "black", NONE, NONE),), "white")


def test_a_single_frame_has_no_motion():
    scene = Scene((Item("medium", "red", "cross", "moving up"),), "white")
    assert judge(draw(scene, 1, 64, 64)) == Scene((Item("medium", "red", "cross", NONE),), "white")

"""The pixels of a clip show what its scene says."""

import pytest
import torch

from cogvideox_sat.shapes.drawing import GROWTH, coverage, draw, draw_background, draw_moments
from cogvideox_sat.shapes.scenes import (
    COLOURS,
    CONCEPT_MOTIONS,
    CONCEPT_SHAPES,
    LAYOUTS,
    MOTIONS,
    PATTERNS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    random_scenes,
)

OUTLINES = (*SHAPES, *CONCEPT_SHAPES)


def scene(shape="circle", motion="standing still", size="large", phase=0.5, offset=0.0) -> Scene:
    return Scene((Item(size, "red", shape, motion, phase, offset),), "blue")


def mask(clip: torch.Tensor) -> torch.Tensor:
    """Return the mask of the red shape on the blue background."""
    return clip[:, 0] > clip[:, 2]


def centres(clip: torch.Tensor) -> torch.Tensor:
    """Return row and column of the red shape's middle: (frames, 2)."""
    return torch.stack([one.nonzero().float().mean(dim=0) for one in mask(clip)])


def test_values_and_shape():
    clip = draw(scene(), 3, 48, 64)
    assert clip.shape == (3, 3, 48, 64)
    assert clip.dtype == torch.float32
    assert -1 <= clip.min() < clip.max() <= 1
    assert torch.allclose((clip[0, :, 24, 32] + 1) / 2, torch.tensor(COLOURS["red"]))


@pytest.mark.parametrize(
    ("motion", "down", "right"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", -1, 0), ("moving down", 1, 0)],
)
@pytest.mark.parametrize("phase", [0.0, 0.99])
def test_shapes_go_where_their_captions_say(motion, down, right, phase):
    """All the time in one direction, and a quarter of the picture."""
    steps = centres(draw(scene(motion=motion, phase=phase), 9, 64, 64)).diff(dim=0)
    for along, sign in ((steps[:, 0], down), (steps[:, 1], right)):
        if sign:
            assert (along.sign() == sign).all()
        else:
            assert along.abs().max() < 0.1
    assert steps.abs().sum() > 16


def test_a_shape_that_stands_still_does():
    clip = draw(scene(), 9, 64, 64)
    assert torch.equal(clip, clip[:1].expand_as(clip))


def test_a_circle_is_gone_round_once():
    path = centres(draw(scene(motion="moving in a circle", offset=-1.0), 9, 64, 64))
    assert (path[0] - path[-1]).abs().max() < 0.5
    away = (path - path[:-1].mean(dim=0)).norm(dim=1)
    assert away.min() > 7
    assert away.max() - away.min() < 1


def test_a_spiral_goes_round_once_while_it_leaves_its_middle():
    path = centres(draw(scene(motion="moving in a spiral"), 9, 64, 64))
    away = (path - path[0]).norm(dim=1)
    assert away.diff().min() > 0.7
    assert away[-1] > 9
    down, right = (path - path[0])[1:].T
    turned = torch.atan2(down, right).diff().remainder(2 * torch.pi)
    assert ((turned - 2 * torch.pi / 8).abs() < 0.4).all()


@pytest.mark.parametrize("phase", [0.0, 0.99])
def test_bouncing_goes_down_faster_and_faster_and_comes_back_up(phase):
    rows, columns = centres(draw(scene(motion="bouncing", phase=phase), 9, 64, 64)).T
    assert rows.diff().sign().tolist() == [1, 1, 1, 1, -1, -1, -1, -1]
    assert (rows[:5].diff().diff() > 0).all()
    assert rows.max() - rows.min() > 16
    assert columns.max() - columns.min() < 0.1


@pytest.mark.parametrize("shape", OUTLINES)
@pytest.mark.parametrize("size", SIZES)
def test_growing_and_shrinking_change_the_area_steadily(shape, size):
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        moments = torch.linspace(0, 1, 9).tolist()
        area = coverage(Item(size, "red", shape, motion), LAYOUTS["alone"][0], moments, 64, 64).sum(dim=(1, 2))
        assert (area.diff() * sign > 0).all()
        ratio = max(area[0], area[-1]) / min(area[0], area[-1])
        assert ratio == pytest.approx((GROWTH[1] / GROWTH[0]) ** 2, rel=0.1)


@pytest.mark.parametrize(
    "motion", [motion for motion in (*MOTIONS, *CONCEPT_MOTIONS) if motion not in ("growing", "shrinking")]
)
@pytest.mark.parametrize("shape", OUTLINES)
def test_shapes_stay_in_the_picture_and_keep_their_size(shape, motion):
    for phase, offset in ((0.0, 1.0), (0.99, -1.0)):
        area = mask(draw(scene(shape, motion, phase=phase, offset=offset), 9, 64, 96)).sum(dim=(1, 2)).float()
        assert area.min() > 100
        assert area.max() / area.min() < 1.15
    areas = [mask(draw(scene(shape, size=size), 1, 64, 64)).sum() for size in SIZES]
    assert areas[0] < 0.6 * areas[1]
    assert areas[1] < 0.65 * areas[2]


def test_shapes_differ():
    masks = [mask(draw(scene(shape), 1, 64, 64)) for shape in OUTLINES]
    assert all((one ^ other).sum() > 50 for i, one in enumerate(masks) for other in masks[:i])


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64)])
def test_two_shapes_never_overlap(size):
    """In a hundred scenes no pixel belongs to both, and there is much of both in every frame."""
    moments = torch.linspace(0, 1, 9).tolist()
    for pair in [scene for scene in random_scenes(500, 0) if len(scene.items) == 2]:
        places = LAYOUTS[pair.layout]
        one, other = (coverage(item, place, moments, *size) for item, place in zip(pair.items, places, strict=True))
        assert torch.minimum(one, other).max() <= 0.5  # a pixel that both outlines cross, at most
        assert min(one.sum(dim=(1, 2)).min(), other.sum(dim=(1, 2)).min()) > 10


def test_patterns_have_two_colours_on_a_grid():
    for pattern in PATTERNS:
        picture = draw_background("green", pattern, 64, 64)
        for shift in (torch.roll(picture, 16, dims=1), torch.roll(picture, 16, dims=2)):
            assert torch.equal(picture, shift)
        assert not torch.equal(picture, torch.roll(picture, 8, dims=2))
        pure = torch.tensor(COLOURS["green"])[:, None, None]
        assert ((picture - pure).abs().amax(dim=0) < 1e-6).float().mean() >= 0.5
    assert draw_background("black", "striped", 64, 64).unique().tolist() == pytest.approx([0.0, 0.3])
    pictures = [draw_background("red", pattern, 64, 64) for pattern in ("plain", *PATTERNS)]
    assert all((one - other).abs().max() > 0.2 for i, one in enumerate(pictures) for other in pictures[:i])


def test_moments_are_frames_of_the_clip():
    one = random_scenes(1, 0)[0]
    assert torch.allclose(draw_moments(one, [0.0, 0.5, 1.0], 32, 32), draw(one, 5, 32, 32)[::2], atol=1e-6)

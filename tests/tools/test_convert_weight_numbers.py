"""A converted pipeline samples in diffusers like our engine from the checkpoint."""

import pytest

from long_cases import others_long
from pipelines import pipelines  # noqa: F401
from sampling_pairs import DDIM, DPM, model_config, our_latents, their_latents, their_latents_from_video
from support import assert_close

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
RUNS = {"2b": (DDIM, 50), "5b_i2v": (DDIM, 50), "1.5": (DDIM, 20), "5b": (DPM, 20), "1.5_i2v": (DPM, 20)}


@pytest.mark.parametrize(
    ("family", "run"),
    others_long(*reversed(RUNS.items())),
)
def test_a_full_run(tiny, pipelines, family, run):  # noqa: F811
    ours = our_latents(model_config(tiny.config(family)), run, tiny.folder / family)
    assert_close(ours, their_latents(pipelines / family, run), TOLERANCE)


@pytest.mark.parametrize(("family", "run"), others_long(("5b", (DPM, 5)), ("2b", (DDIM, 5))))
def test_sampling_from_a_clip_gives_the_same_latents(tiny, pipelines, family, run):  # noqa: F811
    ours = our_latents(model_config(tiny.config(family)), run, tiny.folder / family, strength=0.6)
    assert_close(ours, their_latents_from_video(pipelines / family, run, 0.6), 1e-3)

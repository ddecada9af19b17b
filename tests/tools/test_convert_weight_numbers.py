"""A converted pipeline samples the same latents in diffusers as our engine does from the checkpoint.

Both get the same prompt embeddings, initial noise, condition image and constant guidance, and take all of 20 or 50
steps in float32. Two things are made to match. Our discretization stretches the steps that are taken to zero signal at
the noisy end, diffusers the whole table of 1000: here both do the latter. And the latent of a 1.5 image-to-video
condition is divided by the VAE's factor in the released pipelines, but not where these models are sampled by
SwissArmyTransformer: here neither does so.

DDIM in diffusers is our VideoDDIMSampler. Its DPM scheduler is our VPSDEDPMPP2MSampler, which the released models are
sampled with, down to the order in which noise is drawn.
"""

from argparse import Namespace

import numpy as np
import pytest
import torch

from config_files import load_configs
from diffusion_video import SATVideoDiffusionEngine
from pipelines import pipelines  # noqa: F401
from seeded import seeded_input
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.guiders import VanillaCFG
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler, VPSDEDPMPP2MSampler
from support import assert_close

FRAMES, HEIGHT, WIDTH = 17, 128, 192  # the largest clip of the tiny models, the one whose positions need no resizing
TOLERANCE = 1e-3
SEED = 3


class WholeTable(ZeroSNRDDPMDiscretization):
    """Some steps of the table of all, stretched as a whole."""

    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        _, timesteps = super().table(n)
        levels, _ = super().table(self.num_timesteps)
        return levels[::-1][timesteps][::-1].copy(), timesteps


def our_latents(tiny, family: str, sampler_class: type, steps: int, image: torch.Tensor) -> torch.Tensor:
    config = load_configs([tiny.config(family)])["model"]
    args = Namespace(model_config=config, load=str(tiny.folder / family))
    engine = SATVideoDiffusionEngine(args, parts=("first_stage_model", "model"))
    schedule = config["sampler_config"]["params"]["discretization_config"]
    sampler = sampler_class(schedule, num_steps=steps)
    sampler.discretization = WholeTable(**schedule["params"])
    sampler.guider = VanillaCFG(6.0)
    engine.sampler = sampler
    frames = (FRAMES - 1) // 4 + (2 if engine.is_15 else 1)
    torch.manual_seed(SEED)
    condition = None
    if engine.noised_image_input:
        condition = engine.concat_condition(engine.encode_condition_image(image[:, :, None]), frames)
    cond, uncond = embeddings()
    shape = (frames, 16, HEIGHT // 8, WIDTH // 8)
    ofs = engine.default_ofs(1)
    return engine.sample({"crossattn": cond}, {"crossattn": uncond}, 1, shape, concat_images=condition, ofs=ofs)


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    return seeded_input("prompt", (1, 64, 64)), torch.zeros(1, 64, 64)


def their_latents(folder, family: str, scheduler: str, steps: int, image: torch.Tensor) -> torch.Tensor:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    inputs = {}
    if family.endswith("i2v"):
        assert type(pipe) is diffusers.CogVideoXImageToVideoPipeline
        inputs["image"] = (image + 1) / 2
        if family == "1.5_i2v":
            pipe.vae_scaling_factor_image = 1.0
    else:
        assert type(pipe) is diffusers.CogVideoXPipeline
    cond, uncond = embeddings()
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **inputs,
    ).frames


@pytest.mark.parametrize(("family", "steps"), [("2b", 50), ("5b_i2v", 50), ("1.5", 20)])
def test_a_full_run_with_ddim(tiny, pipelines, family, steps):  # noqa: F811
    image = seeded_input("image", (1, 3, HEIGHT, WIDTH)).clamp(-1, 1)
    theirs = their_latents(pipelines / family, family, "CogVideoXDDIMScheduler", steps, image)
    assert_close(our_latents(tiny, family, VideoDDIMSampler, steps, image), theirs, TOLERANCE)


@pytest.mark.parametrize("family", ["5b", "1.5_i2v"])
def test_a_full_run_with_the_sampler_of_the_released_models(tiny, pipelines, family):  # noqa: F811
    image = seeded_input("image", (1, 3, HEIGHT, WIDTH)).clamp(-1, 1)
    theirs = their_latents(pipelines / family, family, "CogVideoXDPMScheduler", 20, image)
    assert_close(our_latents(tiny, family, VPSDEDPMPP2MSampler, 20, image), theirs, TOLERANCE)

"""The same sampling run in our engine and in a pipeline of diffusers.

Both get the same prompt embeddings, initial noise, condition image and constant guidance, and run all steps in float32.
Two differences are removed. Our discretization stretches the chosen steps to zero signal at the noisy end, that of
diffusers stretches the whole table of 1000 steps: here both do the latter. The released pipelines divide the latent of
a 1.5 image-to-video condition by the VAE's factor, SwissArmyTransformer does not: here neither does.

DDIM in diffusers is our VideoDDIMSampler. Its DPM scheduler is our VPSDEDPMPP2MSampler, the released models' sampler,
including the order in which noise is drawn.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvideox_sat.configuration.files import load_configs
from diffusion_video import SATVideoDiffusionEngine
from seeded import seeded_input
from sgm.modules.diffusionmodules.discretizer import ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.guiders import VanillaCFG
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler, VPSDEDPMPP2MSampler
from sgm.modules.diffusionmodules.sampling_start import Start

FRAMES, HEIGHT, WIDTH = 17, 128, 192  # the largest clip of the tiny models, without resized positions
SEED = 3
DDIM, DPM = "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
SAMPLERS = {DDIM: VideoDDIMSampler, DPM: VPSDEDPMPP2MSampler}
Run = tuple[str, int]  # one of `SAMPLERS`, and the number of steps


class WholeTable(ZeroSNRDDPMDiscretization):
    """Some steps of a table that is stretched as a whole."""

    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        _, timesteps = super().table(n)
        levels, _ = super().table(self.num_timesteps)
        return levels[::-1][timesteps][::-1].copy(), timesteps


def our_latents(
    config: dict[str, Any], run: Run, load: Path, lora_load: Path | None = None, strength: float | None = None
) -> Tensor:
    """Return the latents (1, frames, 16, height, width) of our engine.

    Args:
        config: the section `model` of a configuration.
        strength: start from `video()`; None: from noise.
    """
    args = Namespace(model_config=config, load=str(load), lora_load=lora_load and str(lora_load))
    engine = SATVideoDiffusionEngine(args, parts=("first_stage_model", "model"))
    schedule = config["sampler_config"]["params"]["discretization_config"]
    scheduler, steps = run
    sampler = SAMPLERS[scheduler](schedule, num_steps=steps)
    sampler.discretization = WholeTable(**schedule["params"])
    sampler.guider = VanillaCFG(6.0)
    engine.sampler = sampler
    frames = (FRAMES - 1) // 4 + (2 if engine.is_15 else 1)
    torch.manual_seed(SEED)
    condition = None
    if engine.noised_image_input:
        condition = engine.concat_condition(engine.encode_condition_image(image()[:, :, None]), frames)
    cond, uncond = embeddings()
    shape = (frames, 16, HEIGHT // 8, WIDTH // 8)
    start = None
    if strength is not None:
        means = engine.encode_means(rearrange(video(), "1 t c h w -> 1 c t h w"))
        start = Start(rearrange(means, "1 c t h w -> 1 t c h w"), strength)
    ofs = engine.default_ofs(1)
    texts = {"crossattn": cond}, {"crossattn": uncond}
    return engine.sample(*texts, 1, shape, concat_images=condition, ofs=ofs, start=start)


def their_pipeline(kind: Any, folder: Path, run: Run) -> Any:
    """Return a pipeline of the class `kind` on the models in `folder`, with a run's scheduler."""
    import diffusers

    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, run[0]).from_config(pipe.scheduler.config)
    return pipe


def their_latents(folder: Path, run: Run, lora: Path | None = None) -> Tensor:
    """Return the latents of the pipeline in `folder`.

    Args:
        lora: the folder of a LoRA file, used at its default scale.
    """
    import diffusers

    pipe = their_pipeline(diffusers.DiffusionPipeline, folder, run)
    if lora:
        pipe.load_lora_weights(str(lora))
    inputs = {}
    if type(pipe) is diffusers.CogVideoXImageToVideoPipeline:
        inputs["image"] = (image() + 1) / 2
        if pipe.transformer.config.patch_size_t:
            pipe.vae_scaling_factor_image = 1.0
    else:
        assert type(pipe) is diffusers.CogVideoXPipeline
    cond, uncond = embeddings()
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        num_frames=FRAMES,
        num_inference_steps=run[1],
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **inputs,
    ).frames


def their_latents_from_video(folder: Path, run: Run, strength: float) -> Tensor:
    """Return the latents of the video-to-video pipeline on the models in `folder`.

    The pipeline starts from `video()`. The original would draw the clip's latents from their posteriors, and encode the
    clip in separate pieces; here it takes the means of the whole clip, as ours does.
    """
    import diffusers
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video as module

    pipe = their_pipeline(diffusers.CogVideoXVideoToVideoPipeline, folder, run)
    pipe.vae.num_sample_frames_batch_size = FRAMES
    draw, module.retrieve_latents = module.retrieve_latents, lambda output, *_: output.latent_dist.mode()
    try:
        cond, uncond = embeddings()
        return pipe(
            video=[*((video()[0] + 1) / 2)],
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=run[1],
            strength=strength,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).frames
    finally:
        module.retrieve_latents = draw


def video() -> Tensor:
    """Return a clip (1, frames, 3, height, width)."""
    return seeded_input("video", (1, FRAMES, 3, HEIGHT, WIDTH)).clamp(-1, 1)


def embeddings() -> tuple[Tensor, Tensor]:
    return seeded_input("prompt", (1, 64, 64)), torch.zeros(1, 64, 64)


def image() -> Tensor:
    return seeded_input("image", (1, 3, HEIGHT, WIDTH)).clamp(-1, 1)


def model_config(path: Path) -> dict[str, Any]:
    return load_configs([path])["model"]

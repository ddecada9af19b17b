"""Load the engine of a run: its model, its adapter, and the parts that its data needs."""

import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from cogvideox_sat.clips.latent_identity import conditioner_for_cache
from cogvideox_sat.configuration.model_section import has_adapter
from cogvideox_sat.configuration.recomputation import take_recomputation
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.engine_choice import build_engine
from cogvideox_sat.parallel.video_groups import VideoGroups
from diffusion_video import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)


def load_engine(
    args: TrainingArguments, device: torch.device, groups: VideoGroups, *, cached: bool, resume: Path | None
) -> SATVideoDiffusionEngine:
    """Return the engine of a run, with weights.

    Args:
        groups: the processes that share a clip.
        cached: the data is a cache of latents, for which the VAE is not built and no text is encoded.
        resume: folder of the checkpoint whose weights are taken; None: those of `args`.

    Raises:
        UserError: weights cannot be read, or do not fit the model.
    """
    engine = build_engine(engine_settings(args, cached, resume), (), device, groups)
    logger.info("attention: %s", engine.choose_attention(gradients=True))
    engine.build("conditioner")
    if not cached:
        engine.build("first_stage_model")
    engine.build("model")
    return engine


def engine_settings(args: TrainingArguments, cached: bool, resume: Path | None) -> EngineSettings:
    """Return the settings of a run's engine; see `load_engine`."""
    model = deepcopy(args.model_config)
    take_recomputation(model["network_config"]["params"]["transformer_args"], args)
    if cached:
        model["conditioner_config"] = conditioner_for_cache(model["conditioner_config"])
    settings = EngineSettings.from_args(
        args,
        model_config=model,
        new_adapter=True,
        force_inference=args.force_train,
        weights_in_shares=args.deepspeed_config["zero_optimization"]["stage"] == 3,
    )
    if resume is None:
        return settings
    # Trained weights are in the checkpoint, the others in the original files.
    return replace(settings, lora_load=resume) if has_adapter(model) else replace(settings, load=resume)

"""Check that a model can do what a run asks for, before PyTorch is imported."""

import os

from arguments import SamplingArguments
from cogvideox_sat.configuration.files import check_paths
from cogvideox_sat.configuration.model_limits import ModelLimits, check_offload, check_sharing
from cogvideox_sat.configuration.model_values import check_model_values, check_parameters
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs, changed_sampler, check_steps
from cogvideox_sat.configuration.video_layout import check_world, layout_of
from cogvideox_sat.sampling.prompt_refinement import Endpoint
from sgm.errors import UserError


def check_model_arguments(args: SamplingArguments) -> None:
    """Check the configuration of the model, and that the model fits the run's arguments.

    Raises:
        UserError: the configuration is invalid, the model cannot do what is asked, or a required file is missing.
    """
    check_model_values(args.model_config, args.sources)
    limits = ModelLimits.from_config(args.model_config)
    limits.check_mode(args.image2video, args.latent_channels)
    limits.check_clip(args.sampling_num_frames, *args.sampling_image_size)
    check_combinations(args)
    check_paths({"args": {"load": args.load, "lora_load": args.lora_load}, "model": args.model_config})
    check_parameters({"model": args.model_config}, args.sources)
    changed_sampler(args.model_config["sampler_config"], SamplerKnobs.of(args))
    name = "sampling_num_steps" if args.steps is None else "steps"
    check_steps(args.model_config["sampler_config"], args.sampling_num_steps, name)


def check_combinations(args: SamplingArguments) -> None:
    """Check that the arguments fit the model and the way the command was started.

    Raises:
        UserError: they do not.
    """
    check_sharing(args.model_config, args.model_parallel_size, args.lora_load)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as the launcher sets it
    check_world(layout_of(args), processes)
    first_stage = args.model_config["first_stage_config"].get("params")
    if not isinstance(first_stage, dict) or not (first_stage.get("ckpt_path") or args.force_inference):
        raise UserError("model.first_stage_config.params.ckpt_path: missing; name the weights of the VAE")
    check_offload(args.offload)
    if args.input_type == "cli" and processes > 1:
        raise UserError(
            "input_type: prompts are typed into one process; start it without torchrun, or give an input_file"
        )
    if args.refine_prompts:
        Endpoint.from_environment()  # raises at once, not after minutes of loading

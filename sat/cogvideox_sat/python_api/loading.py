"""`load`: a model, ready to be called. PyTorch is imported once the arguments are known to make sense."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import arguments_from_names
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.configuration.adapter_lists import adapter_texts, without_adapter
from cogvideox_sat.configuration.argument_lists import SamplingArguments
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.python_api.model_places import find_model
from cogvideox_sat.sampling.plan import check_model_arguments
from sgm.errors import UserError, shown

if TYPE_CHECKING:
    from cogvideox_sat.python_api.pipeline import Pipeline

DTYPES = {"fp16": "fp16", "float16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16"} | dict.fromkeys(
    ("fp32", "float32", "float"), ""
)
# Arguments of the command that say something about its files or its prompts, which a call has in its own way.
OF_THE_COMMAND = (
    *("input_type", "input_file", "output_dir", "only_save_latents", "overwrite", "skip_existing", "batch_size"),
    *("contact_sheet", "looping_previews", "refine_prompts", "image2video", "fp16", "bf16"),
)


def load(
    model: str | Path | Sequence[str | Path],
    *,
    device: Any = None,
    dtype: Any = None,
    offload: str | None = None,
    lora: Mapping[str | Path, float] | Sequence[str | Path] | str | Path | None = None,
    fit: str | None = None,
    set: Mapping[str, Any] | None = None,  # as the flag is called
    **arguments: Any,
) -> "Pipeline":
    """Return a model, ready to be called: `load("tiny")("a large red circle moving left").save("circle.mp4")`.

    Args:
        model: `tiny`, `tiny_i2v`, or the name of a released model such as `cogvideox_5b`; one or more configuration
            files; the folder of a training run, or of one of its checkpoints; the folder of a pipeline of diffusers.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        dtype: what to compute in: float16, bfloat16 or float32, as a name or of PyTorch; None: as the model's
            configuration says.
        offload: what leaves the device to make room, see docs/sampling.md, "Memory". None: nothing, so that all
            weights are read now, and none later.
        lora: adapters with their strengths, {path: 0.8, ...}, or a path or a list of paths, each with strength 1:
            checkpoints with adapters in them, or LoRA files or folders of diffusers. They stay unmerged:
            `pipe.set_lora` exchanges them.
        fit: memory of the device to stay within, such as "12GB", or "auto": picks `offload` and other arguments.
        set: keys of the configuration with their values, such as {"model.sampler_config.params.num_steps": 20}.
        arguments: others of the command `cogvideox sample`, such as `load`, `attention`, `vae_tile_size` or `seed`.

    Raises:
        UserError: the model, a file or the device does not exist; an argument does not exist or has a wrong value.
    """
    check_settings(set)
    place = find_model(model)
    try:
        for name in arguments:
            if name in OF_THE_COMMAND:
                raise UserError(f"{name}: it belongs to the command; a call has its prompts, images and files itself")
        values = {**place.values, **arguments, "offload": offload, "fit": fit, **precision_of(dtype)}
        if lora is not None or place.lora:
            values["lora"] = adapter_texts(place.lora if lora is None else lora)
        if device is not None:
            values["device"] = str(device)
        if offload is None and fit is None:
            values["offload"] = "none"
        args = arguments_from_names(place.base, values, set or {}, place.config)
        if lora is not None or place.lora:  # also where it is empty, to be set later
            args.model_config = dict(without_adapter(args.model_config))
        limits = ModelLimits.from_config(args.model_config)
        args.image2video = limits.image_to_video
        settle_clip(args, limits)
        with args.sources.naming():
            if not args.load and not args.force_inference:
                raise UserError("load is missing: name the checkpoint of the network")
            check_model_arguments(args)
            tell_places()
            return opened(args, place.kept)
    except BaseException:
        place.kept.close()
        raise


def check_settings(settings: Any) -> None:
    """Raises UserError unless `set` gives keys with their values, or nothing."""
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(f"set is {shown(settings)}; give keys with their values, such as {{'model.scale_factor': 0.7}}")


def settle_clip(args: SamplingArguments, limits: ModelLimits) -> None:
    """Let videos be as long and as large as the model takes where nothing says their size, and the usual one is none
    for the model."""
    if limits.takes(args.sampling_num_frames, *args.sampling_image_size):
        return
    if "sampling_num_frames" not in args.given and "frames" not in args.given:
        args.sampling_num_frames = limits.latent_frames(limits.lengths()[-1])
    if "sampling_image_size" not in args.given:
        args.sampling_image_size = [SPACE_FACTOR * side for side in limits.largest[1:]]


def opened(args: SamplingArguments, kept: Any) -> "Pipeline":
    """Return a model whose arguments are known to make sense, with its weights."""
    quiet_libraries()
    # Imports PyTorch: seconds, spent only once the request is known to make sense
    from cogvideox_sat.python_api.pipeline import Pipeline
    from cogvideox_sat.sampling.fitting import fitted
    from cogvideox_sat.sampling.requests import SessionSettings
    from cogvideox_sat.sampling.session import sessions_of_process
    from sgm.memory_errors import memory_guard

    sessions_of_process.enter(args.model_parallel_size)  # what `fit` asks needs the groups that the session will have
    try:
        with memory_guard("loading the model"):
            # As with prompts that are typed: the text encoder stays.
            args = replace(fitted(replace(args, input_type="cli"), None), input_type=args.input_type)
            pipe = Pipeline(args, SessionSettings.of_command(args), kept)
            try:
                pipe.load_weights()
            except BaseException:
                pipe.close()
                raise
        return pipe
    finally:
        sessions_of_process.leave()


def precision_of(dtype: Any) -> dict[str, bool]:
    """Return `fp16` and `bf16` for a dtype; nothing for None.

    Raises:
        UserError: there is no such dtype.
    """
    if dtype is None:
        return {}
    name = str(dtype).removeprefix("torch.").lower()
    if name not in DTYPES:
        raise UserError(f"dtype is {shown(dtype)}; it can be float16, bfloat16 or float32")
    return {flag: DTYPES[name] == flag for flag in ("fp16", "bf16")}

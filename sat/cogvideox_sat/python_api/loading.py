"""`load`: return a model that is ready to be called.

PyTorch is imported after the arguments are checked.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arguments import arguments_from_names
from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.configuration.adapter_lists import Adapters, adapter_texts
from cogvideox_sat.configuration.argument_lists import SamplingArguments
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.model_section import without_adapter
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.python_api.model_places import ModelName, find_model
from cogvideox_sat.sampling.model_arguments import check_model_arguments
from sgm.errors import UserError, shown

if TYPE_CHECKING:
    from cogvideox_sat.python_api.pipeline import Pipeline

DTYPES = {"fp16": "fp16", "float16": "fp16", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16"} | dict.fromkeys(
    ("fp32", "float32", "float"), ""
)
# Arguments for files and prompts of the command; calls have their own ones.
OF_THE_COMMAND = (
    *("input_type", "input_file", "output_dir", "only_save_latents", "overwrite", "skip_existing", "batch_size"),
    *("contact_sheet", "looping_previews", "refine_prompts", "image2video", "fp16", "bf16"),
)


def load(
    model: ModelName,
    *,
    device: Any = None,
    dtype: Any = None,
    offload: str | None = None,
    lora: Adapters | None = None,
    fit: str | None = None,
    set: Mapping[str, Any] | None = None,  # as the flag is called
    **arguments: Any,
) -> "Pipeline":
    """Return a model that is ready to be called.

    `load("tiny")("a large red circle moving left").save("circle.mp4")`

    Args:
        model: `tiny`, `tiny_i2v`, `tiny_continue`, or the name of a released model such as `cogvideox_5b`; one or more
            configuration files; the folder of a training run or of one of its checkpoints; or the folder of a pipeline
            of diffusers.
        device: cpu, cuda or cuda:N; None: a GPU if available.
        dtype: the dtype of the computation: float16, bfloat16 or float32, as a name or as PyTorch's dtype; None: as in
            the model's configuration.
        offload: what leaves the device to make room; see docs/sampling.md, "Memory". None: nothing; all weights are
            read now and stay on the device.
        lora: adapters with their strengths, {path: 0.8, ...}; or a path or a list of paths, each with strength 1. Each
            is a checkpoint with an adapter, or a LoRA file or folder of diffusers. Adapters are not merged;
            `pipe.set_lora` exchanges them.
        fit: limit for the memory of the device, such as "12GB", or "auto"; chooses `offload` and other arguments.
        set: keys of the configuration with their values, such as {"model.sampler_config.params.num_steps": 20}.
        arguments: other arguments of the command `cogvideox sample`, such as `load`, `attention`, `vae_tile_size` or
            `seed`.

    Raises:
        UserError: the model, a file or the device does not exist; an argument does not exist or has an invalid value.
    """
    args, kept = arguments_of_model(
        model, device=device, dtype=dtype, offload=offload, lora=lora, fit=fit, set=set, **arguments
    )
    try:
        with args.sources.naming():
            return opened(args, kept)
    except BaseException:
        kept.close()
        raise


def arguments_of_model(
    model: ModelName,
    *,
    device: Any = None,
    dtype: Any = None,
    offload: str | None = None,
    lora: Adapters | None = None,
    fit: str | None = None,
    set: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> tuple[SamplingArguments, ExitStack]:
    """Return the arguments of the command and the resources of a model that `load` opens.

    The resources stay open as long as the model is used.

    Args:
        model and others: as of `load`.

    Raises:
        UserError: as `load`, as far as it can be told without reading weights.
    """
    check_settings(set)
    place = find_model(model)
    try:
        for name in arguments:
            if name in OF_THE_COMMAND:
                raise UserError(
                    f"{name}: only the command takes this argument; give prompts, images and files to each call"
                )
        values = {**place.values, **arguments, "offload": offload, "fit": fit, **precision_of(dtype)}
        if lora is not None or place.lora:
            values["lora"] = adapter_texts(place.lora if lora is None else lora)
        if device is not None:
            values["device"] = str(device)
        if offload is None and fit is None:
            values["offload"] = "none"
        args = arguments_from_names(place.base, values, set or {}, place.config)
        if lora is not None or place.lora:  # also if it is empty, so that `set_lora` can be used later
            args.model_config = without_adapter(args.model_config)
        limits = ModelLimits.from_config(args.model_config)
        args.image2video = limits.image_to_video
        settle_clip(args, limits)
        with args.sources.naming():
            if not args.load and not args.force_inference:
                raise UserError("load: missing; name the checkpoint of the network")
            check_model_arguments(args)
            tell_places()
        return args, place.kept
    except BaseException:
        place.kept.close()
        raise


def check_settings(settings: Any) -> None:
    """Check that `set` maps keys to values, or is None, else raise UserError."""
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(
            f"set: got {shown(settings)}; give keys with their values, such as {{'model.scale_factor': 0.7}}"
        )


def settle_clip(args: SamplingArguments, limits: ModelLimits) -> None:
    """Use the largest length and size of the model if the default ones do not fit it.

    Values that the user gives are kept.
    """
    if limits.takes(args.sampling_num_frames, *args.sampling_image_size):
        return
    if "sampling_num_frames" not in args.given and "frames" not in args.given:
        args.sampling_num_frames = limits.latent_frames(limits.lengths()[-1])
    if "sampling_image_size" not in args.given:
        args.sampling_image_size = [SPACE_FACTOR * side for side in limits.largest[1:]]


def opened(args: SamplingArguments, kept: ExitStack) -> "Pipeline":
    """Return the loaded model for checked arguments.

    Args:
        kept: resources that the model closes at its end.

    Raises:
        UserError: `fit` allows too little memory, the device does not exist, or weights cannot be read or do not fit.
    """
    quiet_libraries()
    # These imports take seconds (PyTorch), so that they come after all checks.
    from cogvideox_sat.python_api.pipeline import Pipeline
    from cogvideox_sat.sampling.fitting import fitted
    from cogvideox_sat.sampling.open_sessions import sessions_of_process
    from cogvideox_sat.sampling.requests import SessionSettings
    from sgm.memory_errors import memory_guard

    sessions_of_process.enter(args.model_parallel_size)  # `fit` needs the process groups of the session
    try:
        with memory_guard("loading the model"):
            # As with typed prompts, the text encoder stays loaded.
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
    """Return `fp16` and `bf16` for a dtype; an empty dictionary for None.

    Raises:
        UserError: the dtype does not exist or is not supported.
    """
    if dtype is None:
        return {}
    name = str(dtype).removeprefix("torch.").lower()
    if name not in DTYPES:
        raise UserError(f"dtype: got {shown(dtype)}; it can be float16, bfloat16 or float32")
    return {flag: DTYPES[name] == flag for flag in ("fp16", "bf16")}

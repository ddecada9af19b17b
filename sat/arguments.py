"""The arguments of the sampling command: where they are read, and which values are valid.

`argument_lists` lists them. An argument is a field of `SamplingArguments`. It can be given on the command line (`--name
value`) or in the `args:` section of a configuration file; the command line overrides the file. This module imports no
PyTorch.
"""

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import located
from cogvideox_sat.configuration.adapter_lists import settle_adapters
from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_limits import check_common, check_exclusive, check_least
from cogvideox_sat.configuration.argument_lists import IGNORED_KEYS, SamplingArguments, TrainingArguments
from cogvideox_sat.configuration.argument_parser import parser_for
from cogvideox_sat.configuration.argument_reading import read_command_line, read_configuration, with_located_inputs
from cogvideox_sat.configuration.argument_values import check_section, given_values
from cogvideox_sat.configuration.files import ALTERNATIVES, MergedConfig, check_alternatives
from cogvideox_sat.configuration.frame_sizes import size_from_image
from cogvideox_sat.configuration.memory_sizes import parse_fit
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.model_section import unused_model_keys
from cogvideox_sat.configuration.request_fields import check_argument
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs
from cogvideox_sat.configuration.shared_arguments import PRECISIONS
from cogvideox_sat.configuration.video_records import VideoRecord, is_record, read_record
from sgm.errors import UserError

logger = logging.getLogger(__name__)

EXCLUSIVE = (PRECISIONS, ("overwrite", "skip_existing"))


def get_args(command_line: Sequence[str] | None = None, complete: bool = True) -> SamplingArguments:
    """Read the command line and the configuration files that it names.

    Args:
        complete: require everything that sampling needs: a checkpoint, and prompts.

    Raises:
        UserError: a file is missing or malformed, or an argument is unknown or has an invalid value.
        SystemExit: for `--help`.
    """
    given, config = read_command_line(
        SamplingArguments,
        build_parser(),
        command_line,
        used=("model",),
        exclusive=EXCLUSIVE,
        ignored=IGNORED_KEYS,
        otherwise=recorded_model,
    )
    return arguments_of(given, config, complete)


def arguments_from_names(
    base: Sequence[str | Path],
    values: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: MergedConfig | None = None,
) -> SamplingArguments:
    """Return the arguments that a program gives by name, as for a command line.

    Args:
        base: configuration files.
        values: arguments by name.
        settings: keys that override the configuration files; see `configuration.single_keys`.
        config: a configuration in place of files.

    Raises:
        UserError: see `get_args`.
    """
    given = given_values(SamplingArguments, values)
    named: dict[str, Any] = {**given, **({"base": list(base)} if base else {})}
    found = read_configuration(
        named, settings, SamplingArguments, used=("model",), exclusive=EXCLUSIVE, otherwise=lambda _: config
    )
    named.pop("base", None)
    return arguments_of(named, found, complete=False)


def arguments_of(given: Mapping[str, Any], config: MergedConfig, complete: bool = True) -> SamplingArguments:
    """Return the arguments of a merged configuration, overridden by those in `given`.

    Raises:
        UserError: see `get_args`.
    """
    with config.sources.naming(given):
        check_alternatives(given)
        section = check_section(
            SamplingArguments, config.get("args") or {}, foreign={*argument_fields(TrainingArguments), *IGNORED_KEYS}
        )
        for sentence in unused_model_keys(config.get("model") or {}):
            logger.warning(sentence)
        record = recorded_video({**section, **given})
        if record is not None:  # the record of the video overrides the files
            recorded = check_section(SamplingArguments, record.arguments())
            section = {name: value for name, value in section.items() if name not in record.arguments()}
            section = without_alternatives(section, recorded) | recorded
        section = without_alternatives(section, given)
        values = with_located_inputs({**section, **given})
        args = SamplingArguments(
            **values, model_config=config["model"], sources=config.sources, record=record, given=frozenset(values)
        )
        settle_size(args, given="sampling_image_size" in values)
        settle_knobs(args)
        settle_adapters(args)
        check_values(args, complete)
        return args


def without_alternatives(section: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the `args:` section without arguments that are given under another name."""
    others = {name: other for pair in ALTERNATIVES for name, other in (pair, pair[::-1])}
    return {name: value for name, value in section.items() if others.get(name) not in given}


def settle_knobs(args: SamplingArguments) -> None:
    """Set the arguments for which `frames` and `steps` are other names.

    Raises:
        UserError: the model cannot make a video of `frames` frames.
    """
    for name in ("frames", "steps"):
        check_argument(name, getattr(args, name))
    if args.frames is not None:
        args.sampling_num_frames = ModelLimits.from_config(args.model_config).latent_frames(args.frames)
    if args.steps is not None:
        args.sampling_num_steps = args.steps


def settle_size(args: SamplingArguments, given: bool) -> None:
    """Let each image determine the size of its video if no size is given.

    This is for models that take any shape: 1.5 image-to-video.
    """
    limits = ModelLimits.from_config(args.model_config)
    if not given and limits.image_to_video and limits.patch[0] > 1:
        args.size_from_image = True
        args.sampling_image_size = list(size_from_image((9, 16), limits))  # for an image that cannot be read


def recorded_video(values: Mapping[str, Any]) -> VideoRecord | None:
    """Return the record in `input_file`, or None if the file is not a record."""
    if values.get("input_type", "txt") != "txt" or not is_record(values.get("input_file")):
        return None
    return read_record(Path(located(values["input_file"], "input_file")))


def recorded_model(given: dict[str, Any]) -> MergedConfig | None:
    """Return the model's configuration from a record, for command lines that name no files."""
    record = recorded_video(given)
    return None if record is None else record.model()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return parser_for(
        SamplingArguments,
        "Sample videos from prompts.",
        "python sat/sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml --seed 42",
        IGNORED_KEYS,
    )


def check_values(args: SamplingArguments, complete: bool = True) -> None:
    """Check the values as far as possible without the model; see `get_args`."""
    check_common(args)
    check_exclusive(args, EXCLUSIVE)
    if len(args.sampling_image_size) != 2:
        raise UserError(f"sampling_image_size: got {args.sampling_image_size}; expected height and width")
    check_least(args, ("batch_size", "sampling_num_frames"))
    if args.guidance_batch not in (1, 2):
        raise UserError(f"guidance_batch: got {args.guidance_batch}; it can be 1 or 2")
    check_fit(args)
    for name in ("guidance_scale", "guidance_schedule"):
        check_argument(name, getattr(args, name))
    check_argument("guidance_interval", args.guidance_interval or None)
    for name in ("video", "strength", "extend"):
        check_argument(name, getattr(args, name))
    if args.strength is not None and args.video is None and args.input_type == "cli":
        raise UserError("strength: `video` is missing; give --video too, or leave out --strength")
    SamplerKnobs.of(args)  # raises for a sampler that does not exist
    if not complete:
        return
    if not args.load and not args.force_inference:
        raise UserError("load: missing; name the checkpoint of the network")
    if args.input_type == "txt" and not args.input_file:
        raise UserError("input_file: missing; give --input_file, or --input_type cli to type prompts")
    for name in ("contact_sheet", "looping_previews"):
        if getattr(args, name) and (args.only_save_latents or args.input_type == "cli"):
            raise UserError(
                f"{name}: it needs videos of a prompt file; leave it out with only_save_latents or typed prompts"
            )


def check_fit(args: SamplingArguments) -> None:
    """Check that `fit` is an amount of memory that can be enforced, else raise UserError."""
    if args.fit is None:
        return
    size = parse_fit(args.fit)
    if size is None and args.device == "cpu":
        raise UserError("fit: auto needs a GPU, but device is cpu; give an amount such as 12GB")
    if args.model_parallel_size > 1:
        raise UserError(
            f"fit: model_parallel_size is {args.model_parallel_size}, and the memory of a network that processes share "
            "is not estimated; leave one of them out"
        )

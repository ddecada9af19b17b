"""Estimate the memory of a run from its configuration, without weights or data.

Modules are built on PyTorch's meta device, where tensors have shapes but no content.
"""

import copy
from collections.abc import Sequence

from cogvideox_sat.configuration.recomputation import ATTENTION, AUTO, take_recomputation
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments, saves_all
from cogvideox_sat.latent_geometry import Bucket, video_tokens
from cogvideox_sat.memory.weightless import WeightlessEngine
from cogvideox_sat.training.memory_estimate import (
    Layout,
    checkpoint_copy_line,
    estimate_memory,
    memory_line,
    recomputation,
)
from cogvideox_sat.training.trainable_parameters import trainable_groups, trainable_line


def forecast(
    args: TrainingArguments, frames: int, sizes: Sequence[tuple[int, int]], processes: int, micro_batch: int
) -> list[str]:
    """Return the lines about a fine-tuning run: trained parameters, and memory.

    The memory is estimated for training on latents and on clips.

    Args:
        frames: number of frames of the longest clips.
        sizes: (height, width) of the clips in pixels; the size with the most tokens counts.
        processes: number of processes, each with its own network.
        micro_batch: clips per process at a time.

    Raises:
        UserError: nothing is to be trained, or a part of the model cannot be built.
    """
    model = copy.deepcopy(args.model_config)
    take_recomputation(model["network_config"]["params"]["transformer_args"], args)
    settings = EngineSettings.from_args(args, model_config=model)
    engine = WeightlessEngine(settings, parts=("model",), device=args.device or "cuda")
    engine.disable_untrainable_params()
    network = engine.network
    network.sequence_processes = args.sequence_parallel_size
    bucket = max((Bucket(frames, *size) for size in sizes), key=lambda each: video_tokens(each, network.patch))
    layout = Layout.from_config(args.deepspeed_config, engine.dtype, processes)
    mode, layers = network.transformer.checkpoint_activations, network.num_layers
    total = sum(parameter.numel() for parameter in network.parameters())
    lines = [trainable_line(trainable_groups(network.named_parameters()), total)]
    for what, parts in (("on latents", ()), ("on clips", ("first_stage_model", "conditioner"))):
        for part in parts:
            engine.build(part)
        for each in (False, ATTENTION, True) if mode == AUTO else (mode,):
            network.transformer.checkpoint_activations = each
            memory = estimate_memory(engine, layout, bucket, micro_batch)
            line = memory_line(memory, bucket, micro_batch, recomputation(network).in_words(layers))
            named = f"{what}, if checkpoint_activations: auto takes {str(each).lower()}" if mode == AUTO else what
            lines.append(f"{named}: {line}")
    if args.background_checkpoints:
        lines.append(checkpoint_copy_line(network, layout, saves_all(args)))
    if engine.unknown:
        lines.append(f"on clips: the text encoder comes on top; its size is not known: {engine.unknown}")
    return lines

"""Report what a run will train, and its memory, before the first step."""

from torch.utils.data import Dataset

from cogvideox_sat.configuration.deepspeed_runtime import batch_sizes
from cogvideox_sat.configuration.training_arguments import TrainingArguments, saves_all
from cogvideox_sat.latent_geometry import video_tokens
from cogvideox_sat.parallel.process_groups import parallel_groups
from cogvideox_sat.training.memory_estimate import (
    Layout,
    checkpoint_copy_line,
    estimate_memory,
    memory_line,
    recomputation,
)
from cogvideox_sat.training.recomputation_choice import decide
from cogvideox_sat.training.trainable_parameters import trainable_groups, trainable_line
from diffusion_video import SATVideoDiffusionEngine
from sgm.context_parallel import group_size


def report(engine: SATVideoDiffusionEngine, args: TrainingArguments, dataset: Dataset) -> list[str]:
    """Return the lines to log before the first step.

    If the recomputed layers are left to `auto`, they are decided here. Call this before `deepspeed.initialize`, which
    may remove weights.

    Args:
        engine: with the parts that training uses, frozen as for training.
        dataset: the training data; its largest clips determine the memory.

    Raises:
        UserError: nothing is to be trained.
    """
    groups = trainable_groups(engine.network.named_parameters())
    model_parallel, data_parallel = (group_size(group) for group in parallel_groups())
    layout = Layout.from_config(args.deepspeed_config, engine.dtype, data_parallel, model_parallel)
    micro_batch = batch_sizes(args.deepspeed_config, data_parallel // engine.network.sequence_processes).micro
    buckets = {dataset.bucket(index) for index in range(len(dataset))}
    largest = max(buckets, key=lambda bucket: video_tokens(bucket, engine.network.patch))
    decided = decide(engine, layout, largest, micro_batch)
    memory = estimate_memory(engine, layout, largest, micro_batch)
    return [
        trainable_line(groups, sum(p.numel() for p in engine.network.parameters()), model_parallel),
        memory_line(memory, largest, micro_batch, recomputation(engine.network).in_words(engine.network.num_layers)),
        *([decided] if decided else []),
        *([checkpoint_copy_line(engine.network, layout, saves_all(args))] if args.background_checkpoints else []),
    ]

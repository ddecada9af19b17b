"""Advise a user whose memory is full, by what was running and what is not in use yet.

Nothing here imports PyTorch.
"""

from collections.abc import Callable
from pathlib import Path

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments, VaeTrainingArguments
from cogvideox_sat.configuration.shared_arguments import CommonArguments

TILE = 256  # pixels
TILES = f"--vae_tile_size {TILE} (tiles: less memory, slightly different numbers)"
FEWEST = 4  # frames that the VAE can process at a time
FRAMES = f"--vae_frames_at_once {FEWEST} (each layer of the VAE on few frames at a time: less memory, the same numbers)"
ENCODING, DECODING, SAMPLING, TEXT = "encoding clips", "decoding", "sampling", "the text encoder"


def sampling_advice(args: SamplingArguments) -> Callable[[str], str]:
    """Return a function that gives advice for a sampling run, by what was running."""

    def advise(where: str) -> str:
        options = []
        if where in (DECODING, ENCODING, "encoding images"):
            options += vae_options(args)
        if args.offload == "none":
            options.append("--offload stage (one part of the model on the device at a time) or --offload sequential")
        elif args.offload == "stage":
            options.append("--offload sequential (layers wait in host memory)")
        if where == SAMPLING and args.guidance_batch > 1:
            options.append("--guidance_batch 1 (half the activations)")
        if not (args.fp16 or args.bf16):
            options.append("--bf16 (half the memory)")
        options.append("fewer frames (--sampling_num_frames) or a smaller --sampling_image_size")
        return one_of(options)

    return advise


def training_advice(args: TrainingArguments, cached: bool, checkpoint: Path | None) -> Callable[[str], str]:
    """Return a function that gives advice for a fine-tuning run, by what was running.

    Args:
        cached: the data already consists of latents.
        checkpoint: the last checkpoint of the run, which the advice names.
    """
    network = args.model_config["network_config"]["params"]
    recomputed = args.checkpoint_activations
    if recomputed is None:
        recomputed = (network.get("transformer_args") or {}).get("checkpoint_activations", False)
    zero = args.deepspeed_config.get("zero_optimization") or {}

    def advise(where: str) -> str:
        options = []
        if where == "evaluation":
            if (args.num_log_videos or args.valid_prompts) and not args.only_log_video_latents:
                less = "fewer valid_prompts" if args.valid_prompts else "--num_log_videos 0"
                options.append(f"--only_log_video_latents (tools/decode_latents.py decodes them) or {less}")
            if args.eval_batch_size > 1:
                options.append("--eval_batch_size 1")
        if not cached:
            options.append("encode the clips beforehand with tools/precompute_latents.py")
            if where in (ENCODING, DECODING, "training", "evaluation"):
                options += vae_options(args)
        if where != ENCODING:
            if recomputed is not True:
                options.append("--checkpoint_activations")
            if (zero.get("offload_optimizer") or {}).get("device", "none") == "none":
                options.append("offload the optimizer (deepspeed.zero_optimization.offload_optimizer.device: cpu)")
            if "lora_config" not in (network.get("modules") or {}):
                options.append("train an adapter (a configuration with lora)")
        if args.deepspeed_config.get("train_micro_batch_size_per_gpu", 1) != 1:
            options.append("train_micro_batch_size_per_gpu: 1")
        options.append("fewer frames or a smaller size (data.params.max_num_frames, video_size)")
        return one_of(options) + kept(checkpoint)

    return advise


def precompute_advice(args: TrainingArguments) -> Callable[[str], str]:
    """Return a function that gives advice for tools/precompute_latents.py."""

    def advise(where: str) -> str:
        options = [] if where.endswith(TEXT) else vae_options(args)
        if not (args.fp16 or args.bf16):
            options.append("--bf16 (half the memory)")
        if not where.endswith(TEXT):
            options.append("fewer frames or a smaller size (data.params.max_num_frames, video_size)")
        return one_of(options or ["a machine with more memory"]) + "; the shards that are complete are kept"

    return advise


def vae_training_advice(args: VaeTrainingArguments, checkpoint: Path | None) -> str:
    """Return the advice for a run that trains a VAE."""
    options = ["checkpoint_levels: [0, 1] in the coders' params (recompute activations)"]
    if args.batch_size > 1:
        options.append("--batch_size 1 with lightning.trainer.accumulate_grad_batches")
    options.append("fewer frames or a smaller size (data.params.max_num_frames, video_size)")
    return one_of(options) + kept(checkpoint)


def vae_options(args: CommonArguments) -> list[str]:
    """Return the options that reduce a VAE's memory and are not in use."""
    options = [FRAMES] if args.vae_frames_at_once != FEWEST else []
    return [*options, TILES] if args.vae_tile_size is None else options


def one_of(options: list[str]) -> str:
    """Return the options as one sentence: "try A" or "try one of: A, B"."""
    return as_started(f"try {options[0]}" if len(options) == 1 else "try one of: " + ", ".join(options))


def kept(checkpoint: Path | None) -> str:
    """Return the end of the advice, which says where the run can be resumed."""
    return "" if checkpoint is None else f"; the last checkpoint is kept; resume with --resume {checkpoint}"

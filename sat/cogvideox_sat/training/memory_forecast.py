"""How much memory a run of a configuration will take, told before there are weights or data.

Modules are built on PyTorch's meta device, where tensors have shapes and no content.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideox_sat.clips.latent_identity import conditioner_for_cache
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.latent_geometry import Bucket, video_tokens
from cogvideox_sat.training.encoding_memory import meta_encoder
from cogvideox_sat.training.memory_estimate import GIB, Layout, estimate_memory, memory_line, module_bytes
from cogvideox_sat.training.trainable_parameters import short_count, trainable_groups, trainable_line
from diffusion_video import PARTS, SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.models.video_coder import VideoCoder
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config

T5_CONFIG = "config.json"
# Layers of T5 that its loader leaves in float32 when the others are float16.
T5_FLOAT32_LAYER = ".wo."


class WeightlessEngine(SATVideoDiffusionEngine):
    """The engine with parts of the right shapes and dtypes that take no memory.

    Attributes:
        unknown: why the size of the text encoder is not known; None: it is, or there is no text encoder.
    """

    def _build_network(self, device: torch.device | str) -> nn.Module:
        network = instantiate_on_meta(self.config["network_config"]).to(self.dtype)
        return OpenAIWrapper(network, compile_model=False, dtype=self.dtype)

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        first_stage = meta_encoder(self.config["first_stage_config"], self.dtype)
        if self.settings.vae_tile_size is not None and isinstance(first_stage, VideoCoder):
            first_stage.use_tiles(self.settings.vae_tile_size)
        return first_stage.eval().requires_grad_(False)

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        conditioner = instantiate_from_config(conditioner_for_cache(self.config["conditioner_config"]))
        params = self.config["conditioner_config"]["params"]["emb_models"][0]["params"]
        folder = Path(params["model_dir"])
        self.unknown = None if (folder / T5_CONFIG).is_file() else f"{folder / T5_CONFIG} does not exist"
        if self.unknown is None:
            conditioner.text_encoder = weightless_t5(folder, self.dtype)
        return conditioner


def weightless_t5(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the T5 encoder that a folder's `config.json` describes, in the dtypes that its loader gives it.

    Raises:
        UserError: the file describes no such encoder.
    """
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            encoder = T5EncoderModel(T5Config.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # of transformers, about what the file says
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder / T5_CONFIG} does not describe a T5 encoder: {reason}") from error
    for name, module in encoder.named_modules():
        keeps = dtype == torch.float16 and T5_FLOAT32_LAYER in f".{name}."
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32 if keeps else dtype)
    return encoder.requires_grad_(False)


def forecast(
    args: TrainingArguments, frames: int, sizes: Sequence[tuple[int, int]], processes: int, micro_batch: int
) -> list[str]:
    """Return the lines about a fine-tuning run: what is trained, and the memory on latents and on clips.

    Args:
        frames: of the longest clips.
        sizes: (height, width) of the clips in pixels; that of the most tokens counts.
        processes: that the run has, each with a network of its own.
        micro_batch: clips of a process at a time.

    Raises:
        UserError: nothing is to be trained, or a part of the model cannot be built.
    """
    model = copy.deepcopy(args.model_config)
    if args.checkpoint_activations is not None:
        transformer = model["network_config"]["params"]["transformer_args"]
        transformer["checkpoint_activations"] = args.checkpoint_activations
    settings = EngineSettings.from_args(args, model_config=model)
    engine = WeightlessEngine(settings, parts=("model",), device=args.device or "cuda")
    engine.disable_untrainable_params()
    network = engine.network
    bucket = max((Bucket(frames, *size) for size in sizes), key=lambda each: video_tokens(each, network.patch))
    layout = Layout.from_config(args.deepspeed_config, engine.dtype, processes)
    recomputed = network.transformer.checkpoint_activations
    total = sum(parameter.numel() for parameter in network.parameters())
    lines = [trainable_line(trainable_groups(network.named_parameters()), total)]
    for what, parts in (("on latents", ()), ("on clips", ("first_stage_model", "conditioner"))):
        for part in parts:
            engine.build(part)
        memory = estimate_memory(engine, layout, bucket, micro_batch)
        lines.append(f"{what}: {memory_line(memory, bucket, micro_batch, recomputed)}")
    if engine.unknown:
        lines.append(f"on clips: the text encoder comes on top; its size is not known: {engine.unknown}")
    return lines


def sizes_of_parts(model_config: Mapping[str, Any], precision: Mapping[str, bool]) -> list[str]:
    """Return the lines about a sampling run: the weights of each part, and what is on the device at a time.

    Args:
        precision: `fp16` or `bf16`, as the arguments have them.

    Raises:
        UserError: a part of the model cannot be built.
    """
    engine = WeightlessEngine(EngineSettings.from_args(precision, model_config=model_config), parts=PARTS)
    named = {"network": engine.model, "VAE": engine.first_stage_model, "text encoder": engine.conditioner}
    if engine.unknown:
        del named["text encoder"]
    lines = []
    for name, part in named.items():
        count = short_count(sum(parameter.numel() for parameter in part.parameters()))
        lines.append(f"{name}: {in_words(module_bytes(part))} of weights ({count} parameters)")
    if engine.unknown:
        lines.append(f"text encoder: not counted, its size is not known: {engine.unknown}")
    sizes = [module_bytes(part) for part in named.values()]
    return [
        *lines,
        f"weights on the device: {in_words(max(sizes))} at a time with --offload stage, {in_words(sum(sizes))} with "
        "--offload none; activations come on top and are not estimated",
    ]


def in_words(size: int) -> str:
    """Return a number of bytes in GiB, or in MiB where it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"

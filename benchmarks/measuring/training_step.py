"""Measure a training step of ours beside diffusers', for `training.py`."""

import argparse
import math
from typing import Any, NamedTuple

import torch
from harness import alternating_medians, layer_flops, markdown_table, peak_memories, speeds
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import patch_sizes
from measuring.equal_settings import attention_of
from measuring.training_arguments import DEFAULTS, EQUAL, OURS, RANK, deepspeed_config
from measuring.training_peer import Contender, Inputs, diffusers_step, names_of_diffusers
from support import relative_error

NEGLIGIBLE = 1e-6  # gradients, relative to the largest
AGREEMENT = 1e-4  # largest relative difference of loss and gradients in float32


class Comparison(NamedTuple):
    """Measurements by side: seconds, GiB and last loss; and the difference of both sides."""

    seconds: dict[str, float]
    memory: dict[str, float]
    last: dict[str, float]
    agreement: str


def measure(args: argparse.Namespace) -> Comparison:
    """Return the time, memory and agreement of both sides."""
    contenders = build(args)
    agreement = check_agreement(contenders, args.dtype)
    seconds = alternating_medians({name: each.step for name, each in contenders.items()}, args.repeats)
    last = {name: each.step().item() for name, each in contenders.items()}
    del contenders
    return Comparison(seconds, peak_memories(seconds, args.device), last, agreement)


def compare(args: argparse.Namespace) -> str:
    """Return time, memory and agreement of both sides, as Markdown."""
    seconds, memory, last, agreement = measure(args)
    flops = floating_point_operations(args)
    rows = [
        [name, *cells, f"{memory[name] / memory['diffusers']:.3f}", f"{last[name]:.6f}"]
        for name, cells in speeds(seconds, memory, flops).items()
    ]
    header = ["", "s per step", "TFLOP/s", "peak GiB", "time ratio", "memory ratio", f"loss of step {args.repeats + 2}"]
    return f"{markdown_table(header, rows)}\n\n{agreement}"


def check_agreement(contenders: dict[str, Contender], dtype: str) -> str:
    """Return a line about the differences of losses and gradients before the first step.

    Raises:
        SystemExit: the differences are too large.
    """
    (loss, gradients), (expected_loss, expected) = (contenders[name].gradients() for name in (OURS, DEFAULTS))
    if gradients.keys() != expected.keys():
        raise SystemExit(f"the trained weights differ: {sorted(gradients.keys() ^ expected.keys())[:4]}")
    # Some are zero except for rounding, since an equal bias of all keys does not change the attention.
    largest = max(gradient.norm() for gradient in expected.values())
    compared = [name for name, gradient in expected.items() if gradient.norm() > NEGLIGIBLE * largest]
    worst = max(compared, key=lambda name: relative_error(gradients[name], expected[name]))
    errors = relative_error(loss, expected_loss), relative_error(gradients[worst], expected[worst])
    text = (
        f"Relative difference before the first step: loss {errors[0]:.1e}, gradients at most {errors[1]:.1e} "
        f"(the worst of {len(compared)}: {worst})"
    )
    if dtype == "float32" and max(errors) > AGREEMENT:
        raise SystemExit(text)
    return text


def floating_point_operations(args: argparse.Namespace) -> float:
    """Return the operations of a step's matrix products in layers, without recomputation.

    The backward pass of an attention costs twice its forward pass. The backward pass of a product with a weight matrix
    costs the same as its forward pass for the input, which LoRA's first attention does not need, and again for a
    trained weight.
    """
    patch, position = patch_sizes(args.params["patch_size"]), args.params["modules"]["pos_embed_config"]["params"]
    tokens = position["text_length"] + math.prod(args.network_clip) // math.prod(patch)
    products, attention = layer_flops(tokens, args.params["hidden_size"])
    if args.kind == "full":
        return args.batch * args.layers * 3 * (products + attention)
    adapter = products * 16 * RANK / (24 * args.params["hidden_size"])
    untouched = products * 6 / 24
    return args.batch * (args.layers * (2 * products + 3 * (attention + adapter)) - untouched)


# The contenders


def build(args: argparse.Namespace) -> dict[str, Contender]:
    """Return the contenders; with `--memory-of` only that one."""
    from sgm import randomness

    engine = build_engine(args)
    batch = cached_batch(args, engine)
    seeds = list(range(args.batch))
    # The random numbers of our step, for the other side.
    with randomness.per_sample(seeds):
        image, latents = engine.encode_batch(batch)
        latents = latents.transpose(1, 2).contiguous()
        if engine.is_15:
            latents = torch.cat((latents[:, :1], latents), dim=1)
        timesteps = engine.loss_fn.sigma_sampler(args.batch, return_idx=True)[1].to(args.device)
        noise = engine.loss_fn.noise_like(latents)
    condition = None if image is None else engine.concat_condition(image, latents.shape[1])
    inputs = Inputs(
        latents.float(), noise, timesteps, batch["txt_embedding"], condition, engine.default_ofs(args.batch)
    )

    made = [args.memory_of] if args.memory_of else [DEFAULTS, *([EQUAL] if args.equal else []), OURS]
    network = build_network(args) if OURS in made else None
    contenders = {}
    for name in made:
        if name == OURS:
            contenders[name] = our_step(args, engine, network, batch, seeds)
        else:
            contenders[name] = diffusers_step(args, network, inputs, equal=name == EQUAL)
    return contenders


def build_engine(args: argparse.Namespace) -> nn.Module:
    """Return our engine without its network, conditioned on precomputed embeddings."""
    from cogvideox_sat.clips.latent_identity import conditioner_for_cache
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.parallel.process_groups import initialize_process_groups
    from diffusion_video import SATVideoDiffusionEngine

    initialize_process_groups()
    model_config = {
        **args.model_config,
        "conditioner_config": conditioner_for_cache(args.model_config["conditioner_config"]),
    }
    settings = EngineSettings(model_config, bf16=args.dtype == "bfloat16")
    return SATVideoDiffusionEngine(settings, ("conditioner",), args.device)


def build_network(args: argparse.Namespace) -> nn.Module:
    """Return our network with random weights; trained weights require gradients."""
    from cogvideox_sat.configuration.meta_device import instantiate_on_meta
    from cogvideox_sat.weights.loading import initialise_missing

    torch.manual_seed(0)
    network = instantiate_on_meta(args.model_config["network_config"]).to(getattr(torch, args.dtype))
    initialise_missing(network, args.device, {})
    for name, parameter in network.named_parameters():
        if ".matrix_B." in name:
            nn.init.normal_(parameter, std=0.02)
    network.to(args.device)
    network.disable_untrainable_params()
    network.use_attention(attention_of(args))
    return network.train()


def cached_batch(args: argparse.Namespace, engine: nn.Module) -> dict[str, Any]:
    """Return a loader's batch of cached latents."""
    generator = torch.Generator().manual_seed(0)
    channels = args.params["out_channels"]
    tokens = args.params["modules"]["pos_embed_config"]["params"]["text_length"]
    features = args.params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    shapes = {"moments": (2 * channels, *args.clip), "txt_embedding": (tokens, features)}
    if engine.noised_image_input:
        shapes["image_moments"] = (2 * channels, 1, *args.clip[1:])
    batch = {name: torch.randn(args.batch, *shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.to(args.device, engine.dtype) for name, tensor in batch.items()}


def our_step(
    args: argparse.Namespace, engine: nn.Module, network: nn.Module, batch: dict[str, Any], seeds: list[int]
) -> Contender:
    """Return a step as in `training.run`."""
    from cogvideox_sat.configuration.settings import LoopSettings
    from cogvideox_sat.training import deepspeed_engine
    from sgm import randomness
    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    config = deepspeed_config(args, "torch.optim.AdamW", fused=True)
    schedule = LoopSettings(1000, warmup=0.0, auto_warmup_steps=0, lr_decay_style="constant")
    wrapper = OpenAIWrapper(network, compile_model=args.compile, dtype=engine.dtype)
    runner = deepspeed_engine.initialize(wrapper, config, schedule, engine.dtype)

    def loss(model: nn.Module) -> Tensor:
        engine.model = model
        with randomness.per_sample(seeds):
            return engine.shared_step(batch, drop=False)[0]

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        value = loss(wrapper)  # DeepSpeed only supports its own backward pass
        found = torch.autograd.grad(value, list(trained.values()))
        return value.detach(), names_of_diffusers(dict(zip(trained, found, strict=True)))

    def step() -> Tensor:
        value = loss(runner)
        runner.backward(value)
        runner.step()
        return value.detach()

    return Contender(step, gradients)

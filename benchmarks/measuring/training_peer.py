"""A training step with diffusers, peft and PyTorch's optimizer, for `training.py`."""

import argparse
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import patch_sizes
from measuring.equal_settings import attention_of, compile_layers, fuse_projections
from measuring.training_arguments import BETAS, CLIPPING, LEARNING_RATE, LORA_ALPHA, RANK

PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Contender(NamedTuple):
    """One side of the comparison.

    Args:
        step: runs a whole step and returns its loss, on the device.
        gradients: runs forward and backward pass; returns the loss and the gradients of trained weights, by diffusers'
            names.
    """

    step: Callable[[], Tensor]
    gradients: Callable[[], tuple[Tensor, dict[str, Tensor]]]


class Inputs(NamedTuple):
    """The inputs of the other side's step.

    Args:
        latents, noise: (b, t, c, h, w), float32.
        timesteps: (b,).
        text: embeddings (b, tokens, features).
        condition: latents of the first frame (b, t, c, h, w), for image-to-video.
        ofs: (b,), for 1.5 image-to-video.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Tensor
    condition: Tensor | None
    ofs: Tensor | None


def diffusers_step(
    args: argparse.Namespace, network: nn.Module | None, inputs: Inputs, equal: bool = False
) -> Contender:
    """Return the step with diffusers' network and scheduler, peft's adapter and an optimizer.

    The optimizer is PyTorch's. The weights are those of `network`; without it they are random.

    Args:
        equal: use our settings: the attention kernel, with `--compile` compiled layers, and one product for queries,
            keys and values, unless an adapter is trained, for which peft needs three.
    """
    from diffusers import CogVideoXDPMScheduler
    from peft import LoraConfig

    from diffusers_network import build_diffusers_network, diffusers_rotary

    dtype = getattr(torch, args.dtype)
    twin = build_diffusers_network(args.params, args.device, dtype)
    weights = names_of_diffusers(network.state_dict()) if network else {}
    twin.load_state_dict({name: tensor for name, tensor in weights.items() if name in twin.state_dict()}, strict=False)
    if args.kind == "lora":
        twin.requires_grad_(False)
        twin.add_adapter(LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=PEFT_TARGETS))
        twin.load_state_dict({name: tensor for name, tensor in weights.items() if ".lora_" in name}, strict=False)
    elif equal:
        fuse_projections(twin)
    if equal and args.compile:
        compile_layers(twin)
    kernel = attention_of(args).applied if equal else nullcontext
    if args.checkpointing:
        twin.enable_gradient_checkpointing()
    twin.train()
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    optimizer = MasterAdamW(list(trained.values()))

    grid = tuple(s // p for s, p in zip(args.network_clip, patch_sizes(args.params["patch_size"]), strict=True))
    rotary = diffusers_rotary(args.params, grid)
    rotary = rotary and tuple(table.to(args.device) for table in rotary)
    discretization = args.model_config["denoiser_config"]["params"]["discretization_config"]["params"]
    scheduler = CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True, snr_shift_scale=discretization["shift_scale"], prediction_type="v_prediction"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(args.device)

    def loss() -> Tensor:
        noised = scheduler.add_noise(inputs.latents, inputs.noise, inputs.timesteps)
        x = noised.to(dtype)
        if inputs.condition is not None:
            x = torch.cat((x, inputs.condition), dim=2)
        output = twin(x, inputs.text, inputs.timesteps, ofs=inputs.ofs, image_rotary_emb=rotary, return_dict=False)[0]
        denoised = scheduler.get_velocity(output.float(), noised, inputs.timesteps)
        weight = 1 / (1 - scheduler.alphas_cumprod[inputs.timesteps]).view(-1, 1, 1, 1, 1)
        return (weight * (denoised - inputs.latents) ** 2).mean()

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        with kernel():
            value = loss()
        return value.detach(), dict(zip(trained, torch.autograd.grad(value, list(trained.values())), strict=True))

    def step() -> Tensor:
        with kernel():
            value = loss()
            value.backward()
        optimizer.step()
        return value.detach()

    return Contender(step, gradients)


class MasterAdamW:
    """AdamW after clipping, on float32 copies of 16-bit parameters.

    DeepSpeed uses such copies too.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self.adam = torch.optim.AdamW(self.masters, LEARNING_RATE, BETAS, weight_decay=0.0, fused=True)

    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, CLIPPING)
        self.adam.step()
        self.adam.zero_grad()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)


def names_of_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights or gradients of our network by the names of diffusers and peft."""
    from diffusers_network import map_weights

    base, adapter = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"transformer\.layers\.(\d+)\.attention\.(\w+)\.matrix_([AB])\.(\d)", name):
            layer, module, matrix, part = match.groups()
            target = PEFT_TARGETS[int(part)] if module == "query_key_value" else PEFT_TARGETS[-1]
            adapter[f"transformer_blocks.{layer}.attn1.{target}.lora_{matrix}.default.weight"] = tensor
        else:
            base[name.replace(".original.", ".")] = tensor
    return {**map_weights(base), **adapter}

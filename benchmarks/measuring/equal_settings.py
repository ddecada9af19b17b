"""Give diffusers' network our settings: one product for q, k and v, compiled layers."""

import argparse

import torch
from torch import nn

from cogvideox_sat.network.attention_choice import AttentionChoice, choose_attention


def attention_of(args: argparse.Namespace, gradients: bool = True) -> AttentionChoice:
    """Return the attention kernel that our network of `args.params` uses by default.

    Args:
        gradients: the network is trained.
    """
    head_dim = args.params["hidden_size"] // args.params["num_attention_heads"]
    return choose_attention("auto", args.device, getattr(torch, args.dtype), head_dim, gradients)


def fuse_projections(twin: nn.Module) -> None:
    """Join the products for queries, keys and values as diffusers does, and remove the three."""
    twin.fuse_qkv_projections()
    for block in twin.transformer_blocks:
        attention = block.attn1
        attention.to_q = attention.to_k = attention.to_v = None  # diffusers would keep them in memory


def compile_layers(twin: nn.Module) -> None:
    """Run each layer through torch.compile, with one graph for all."""
    for block in twin.transformer_blocks:
        block.compile(fullgraph=True)

"""Attention layers and the transformer blocks made of them, under the original's path."""

from torch.nn.attention import SDPBackend

from sgm.attention_kernels import ATTENTION, attend, attend_memory_efficiently, attend_with_xformers
from sgm.helpers import default, exists, uniq
from sgm.modules.attention_layers import (
    CrossAttention,
    LinearAttention,
    MemoryEfficientCrossAttention,
    Normalize,
    SpatialSelfAttention,
    init_,
    max_neg_value,
)
from sgm.modules.diffusionmodules.building_blocks import zero_module
from sgm.modules.transformer_blocks import (
    GEGLU,
    BasicTransformerBlock,
    BasicTransformerSingleLayerBlock,
    FeedForward,
    SpatialTransformer,
)

__all__ = [
    "ATTENTION",
    "GEGLU",
    "BasicTransformerBlock",
    "BasicTransformerSingleLayerBlock",
    "CrossAttention",
    "FeedForward",
    "LinearAttention",
    "MemoryEfficientCrossAttention",
    "Normalize",
    "SDPBackend",
    "SpatialSelfAttention",
    "SpatialTransformer",
    "attend",
    "attend_memory_efficiently",
    "attend_with_xformers",
    "default",
    "exists",
    "init_",
    "max_neg_value",
    "uniq",
    "zero_module",
]

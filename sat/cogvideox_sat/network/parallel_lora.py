"""LoRA on layers whose weights model-parallel ranks share.

SwissArmyTransformer's layer is right on column-parallel layers. On row-parallel ones each rank has a share of the input
features, and therefore a share of A; the products with A have to be summed over the ranks before B is applied, of which
all ranks have the whole. Its marks of what is shared, which norms of gradients are computed by, are those of a
column-parallel layer on both.
"""

import math

import torch
import torch.nn.functional as F
from sat import mpu
from sat.model.finetune.lora2 import LoraLinear
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from sat.mpu.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

from sgm.errors import UserError


class ParallelLoraLinear(LoraLinear):
    """A `LoraLinear` whose ranks together compute what one process does, and the same gradients.

    Args:
        layer: the one whose place it takes; their tensors are the same, and have the same names.

    Raises:
        UserError: it adapts no layer that ranks share.
    """

    def __init__(self, layer: LoraLinear):
        nn.Module.__init__(self)
        self.r, self.lora_alpha, self.scaling = layer.r, layer.lora_alpha, layer.scaling
        self.partition, self.lora_dropout = layer.partition, layer.lora_dropout
        self.original, self.matrix_A, self.matrix_B = layer.original, layer.matrix_A, layer.matrix_B
        if not isinstance(self.original, ColumnParallelLinear | RowParallelLinear):
            raise UserError(
                f"model_parallel_size: processes cannot share an adapter on {type(self.original).__name__}, as with "
                "qlora; leave model_parallel_size at 1"
            )
        self.cuts_inputs = isinstance(self.original, RowParallelLinear)
        for matrices, shared in ((self.matrix_A, self.cuts_inputs), (self.matrix_B, not self.cuts_inputs)):
            for matrix in matrices:
                matrix.model_parallel = shared
        if self.cuts_inputs:
            self._draw_whole_inputs()
        self.train(layer.training)

    def _draw_whole_inputs(self) -> None:
        """Draw the share of A anew as a part of the whole, whose values are smaller than those of a layer with so few
        inputs; nothing on the meta device."""
        rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        for matrix in self.matrix_A:
            if not matrix.is_meta:
                whole = matrix.new_empty(matrix.shape[0], matrix.shape[1] * size)
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                matrix.data.copy_(whole.chunk(size, dim=1)[rank])

    def forward(self, x: Tensor) -> Tensor:
        """Return what a `LoraLinear` of the whole layer returns, of output features this rank's.

        Args:
            x: (..., in), of input features this rank's where the layer shares them out.
        """
        out = self.original(x)
        low = F.linear(self._dropped(x), torch.cat(tuple(self.matrix_A)))
        low = reduce_from_model_parallel_region(low) if self.cuts_inputs else copy_to_model_parallel_region(low)
        parts = low.split([len(matrix) for matrix in self.matrix_A], dim=-1)
        added = [F.linear(part, matrix) for part, matrix in zip(parts, self.matrix_B, strict=True)]
        return out + torch.cat(added, dim=-1) * self.scaling

    def _dropped(self, x: Tensor) -> Tensor:
        """Return `x` after the adapter's dropout, whose mask is that of one process."""
        dropout = self.lora_dropout
        if not (self.cuts_inputs and self.training and isinstance(dropout, nn.Dropout)):
            return dropout(x)
        rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        whole = dropout(x.new_ones(*x.shape[:-1], x.shape[-1] * size))
        return x * whole.chunk(size, dim=-1)[rank]

"""LoRA on layers whose weights are shared by model-parallel ranks.

SwissArmyTransformer's layer is correct for column-parallel layers only. In a row-parallel layer, each rank has a share
of the input features and therefore a share of A; the products with A must be summed over the ranks before B, which
every rank has as a whole, is applied. SwissArmyTransformer also marks shared tensors, for computing gradient norms, as
in a column-parallel layer in both cases.
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


class ReplacedLoraLinear(LoraLinear):
    """A `LoraLinear` in place of another one, whose names in checkpoints it keeps.

    Args:
        layer: the layer to replace; its tensors are reused.
    """

    def __init__(self, layer: LoraLinear):
        nn.Module.__init__(self)
        self.r, self.lora_alpha, self.scaling = layer.r, layer.lora_alpha, layer.scaling
        self.partition, self.lora_dropout = layer.partition, layer.lora_dropout
        self.original, self.matrix_A, self.matrix_B = layer.original, layer.matrix_A, layer.matrix_B
        self.train(layer.training)


class ParallelLoraLinear(ReplacedLoraLinear):
    """A `LoraLinear` whose ranks together compute the same as one process, with its gradients.

    Raises:
        UserError: the adapted layer is not one that ranks share.
    """

    def __init__(self, layer: LoraLinear):
        super().__init__(layer)
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

    def _draw_whole_inputs(self) -> None:
        """Draw A again as a share of the whole matrix; does nothing on the meta device.

        The initial values of the whole matrix are smaller than those for the few inputs of one rank.
        """
        rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        for matrix in self.matrix_A:
            if not matrix.is_meta:
                whole = matrix.new_empty(matrix.shape[0], matrix.shape[1] * size)
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                matrix.data.copy_(whole.chunk(size, dim=1)[rank])

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's output features of what a `LoraLinear` of the whole layer returns.

        Args:
            x: (..., in); this rank's input features, if the layer divides its inputs.
        """
        out = self.original(x)
        low = F.linear(self._dropped(x), torch.cat(tuple(self.matrix_A)))
        low = reduce_from_model_parallel_region(low) if self.cuts_inputs else copy_to_model_parallel_region(low)
        parts = low.split([len(matrix) for matrix in self.matrix_A], dim=-1)
        added = [F.linear(part, matrix) for part, matrix in zip(parts, self.matrix_B, strict=True)]
        return out + torch.cat(added, dim=-1) * self.scaling

    def _dropped(self, x: Tensor) -> Tensor:
        """Return `x` after the adapter's dropout, with the mask that one process would use."""
        dropout = self.lora_dropout
        if not (self.cuts_inputs and self.training and isinstance(dropout, nn.Dropout)):
            return dropout(x)
        rank, size = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
        whole = dropout(x.new_ones(*x.shape[:-1], x.shape[-1] * size))
        return x * whole.chunk(size, dim=-1)[rank]

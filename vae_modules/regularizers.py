"""Regularizers under the path in the released configurations."""

from sgm.modules.autoencoding.regularizers import (
    FSQ,
    LFQ,
    AbstractQuantizer,
    AbstractRegularizer,
    DiagonalGaussianRegularizer,
    EMAVectorQuantizer,
    IdentityRegularizer,
    VectorQuantizer,
)

__all__ = [
    "FSQ",
    "LFQ",
    "AbstractQuantizer",
    "AbstractRegularizer",
    "DiagonalGaussianRegularizer",
    "EMAVectorQuantizer",
    "IdentityRegularizer",
    "VectorQuantizer",
]

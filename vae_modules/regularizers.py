"""The regularizers under the path that the released configurations use."""

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

"""Regularizers: from an encoder's output to latents, and penalties on the latents."""

from sgm.modules.autoencoding.regularizers.base import AbstractQuantizer, AbstractRegularizer
from sgm.modules.autoencoding.regularizers.continuous import DiagonalGaussianRegularizer, IdentityRegularizer
from sgm.modules.autoencoding.regularizers.finite_scalar_quantization import FSQ
from sgm.modules.autoencoding.regularizers.lookup_free_quantization import LFQ
from sgm.modules.autoencoding.regularizers.quantize import EMAVectorQuantizer, VectorQuantizer

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

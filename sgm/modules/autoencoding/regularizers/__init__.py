"""What turns an encoder's output into a latent, and the penalties that keep the latents well-behaved."""

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

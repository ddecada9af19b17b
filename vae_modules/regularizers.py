"""The regularizer under the name that the released configs use."""

from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer

__all__ = ["DiagonalGaussianRegularizer"]

"""Files as torchvision gives them for the networks behind LPIPS, with random numbers in place of the trained ones."""

from pathlib import Path

import torch
import torchvision

from seeded import seeded_tensor


def random_backbone(name: str) -> dict[str, torch.Tensor]:
    """Weights of `features.*` of a torchvision model, and of a classifier as small as it gets."""
    with torch.device("meta"):
        features = torchvision.models.get_model(name).features.state_dict()
    weights = {f"features.{key}": seeded_tensor(key, value.shape) for key, value in features.items()}
    return weights | {"classifier.6.bias": torch.zeros(1)}


def write_backbone(path: str | Path, name: str) -> Path:
    torch.save(random_backbone(name), path)
    return Path(path)

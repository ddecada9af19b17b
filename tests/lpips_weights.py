"""Random weights in torchvision's files of the networks behind LPIPS."""

from pathlib import Path

import torch
import torchvision

from seeded import seeded_tensor


def random_backbone(name: str) -> dict[str, torch.Tensor]:
    """Return random weights of `features.*` of a torchvision model, and of a small classifier."""
    with torch.device("meta"):
        features = torchvision.models.get_model(name).features.state_dict()
    weights = {f"features.{key}": seeded_tensor(key, value.shape) for key, value in features.items()}
    return weights | {"classifier.6.bias": torch.zeros(1)}


def write_backbone(path: str | Path, name: str) -> Path:
    torch.save(random_backbone(name), path)
    return Path(path)

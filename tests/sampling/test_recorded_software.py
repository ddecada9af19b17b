"""A record names the software and the device that compute a video."""

import pytest
import torch

from cogvideox_sat.sampling.recorded_software import source_hash, versions


@pytest.mark.parametrize("name", ["python", "torch", "numpy", "transformers", "safetensors", "ffmpeg", "program"])
def test_versions(name):
    found = versions(torch.device("cpu"))
    assert isinstance(found[name], str) and found[name]
    assert found["program"] == source_hash()

"""The first unit of every run: describe the device."""

import torch
from device_parts.recording import Recorder
from harness import machine

from sgm.errors import UserError


def describe(recorder: Recorder) -> None:
    """Write a line about the device and the versions of libraries.

    Raises:
        UserError: the device does not exist.
    """
    device = recorder.device
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: PyTorch finds no GPU; choose --device cpu --size toy, or repair the driver")
    text = machine(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text += f"; {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        text += f", cuDNN {torch.backends.cudnn.version()}"
    recorder.results.append({"machine": text})

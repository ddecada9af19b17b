"""Running a network whose layers do not fit on the device: they wait in host memory and come over one by one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def stream_layers(network: nn.Module, device: torch.device) -> None:
    """Move `network`, a DiffusionTransformer on the CPU, to `device`, all but its layers, which come when they run."""
    layers = layer_modules(network)
    streamed = {id(tensor) for modules in layers for module in modules for tensor in tensors_of(module)}
    for module in network.modules():
        for entries in (module._parameters, module._buffers):
            for tensor in entries.values():
                if tensor is not None and id(tensor) not in streamed:
                    tensor.data = tensor.data.to(device)
    network.layer_weights = LayerStreamer(layers, device)


def layer_modules(network: nn.Module) -> list[list[nn.Module]]:
    """For every layer the modules whose weights it uses."""
    adaln = network.mixins["adaln_layer"]
    per_layer = [network.transformer.layers, adaln.adaLN_modulations]
    if adaln.qk_ln:
        per_layer += [adaln.query_layernorm_list, adaln.key_layernorm_list]
    return [list(modules) for modules in zip(*per_layer, strict=True)]


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class LayerStreamer:
    """Context manager `streamer(i)`: inside it, the weights of layer i are on the device.

    While layer i computes, the weights of the next one are copied, from pinned memory on a stream of their own, so
    at most two layers are on the device.
    """

    def __init__(self, layers: list[list[nn.Module]], device: torch.device):
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if self.on_cuda else None
        self.layers = [[tensor for module in modules for tensor in tensors_of(module)] for modules in layers]
        self.host: list[list[Tensor]] = [
            [tensor.data.pin_memory() if self.on_cuda else tensor.data for tensor in tensors] for tensors in self.layers
        ]
        for tensors, host in zip(self.layers, self.host, strict=True):
            for tensor, data in zip(tensors, host, strict=True):
                tensor.data = data
        self.fetched: dict[int, list[Tensor]] = {}

    def fetch(self, index: int) -> None:
        """Start copying the weights of a layer to the device."""
        if index in self.fetched:
            return
        if not self.on_cuda:
            self.fetched[index] = [data.to(self.device, copy=True) for data in self.host[index]]
            return
        with torch.cuda.stream(self.copy_stream):
            self.fetched[index] = [data.to(self.device, non_blocking=True) for data in self.host[index]]

    @contextmanager
    def __call__(self, index: int) -> Iterator[None]:
        self.fetch(index)
        if self.on_cuda:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self.copy_stream)
            for data in self.fetched[index]:
                data.record_stream(compute)  # its memory is free for reuse only once this layer has run
        for tensor, data in zip(self.layers[index], self.fetched.pop(index), strict=True):
            tensor.data = data
        self.fetch((index + 1) % len(self.layers))
        try:
            yield
        finally:
            for tensor, data in zip(self.layers[index], self.host[index], strict=True):
                tensor.data = data

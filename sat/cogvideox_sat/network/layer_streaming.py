"""Run a network that does not fit on the device: layers are copied to it one by one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_sat.network.layer_runner import LayerContext, RunLayer


def stream_layers(network: nn.Module, device: torch.device) -> "LayerStreamer":
    """Move a network from the CPU to `device`, except its layers, which are copied when run.

    The weights that compute tabulated modulations (`tabulate_modulations`) are not moved.

    Args:
        network: a DiffusionTransformer.

    Returns:
        The streamer, which is now in the stack of `network.layer_runner`.
    """
    layers = layer_modules(network)
    tabulated = [] if network.modulation_table is None else [network.modulation_table.modulations]
    move_all_but(network, [*layers, *tabulated], device)
    streamer = LayerStreamer(layers, device)
    network.layer_runner.add(streamer)
    return streamer


def stream_blocks(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    dtypes: Sequence[Sequence[torch.dtype]] | None = None,
    pin: bool = True,
) -> "LayerStreamer":
    """Move a module on the CPU to `device`, except its blocks, which are copied when they run.

    Args:
        blocks: submodules that run one after the other, from the first to the last.
        dtypes, pin: see `LayerStreamer`.

    Returns:
        The streamer, which is now in the hooks of the blocks.
    """
    layers = [[block] for block in blocks]
    move_all_but(module, layers, device)
    streamer = LayerStreamer(layers, device, dtypes, pin)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_bring, streamer, index))
        block.register_forward_hook(partial(_return, streamer, index), always_call=True)
    return streamer


def _bring(streamer: "LayerStreamer", index: int, *_: Any) -> None:
    streamer.bring(index)


def _return(streamer: "LayerStreamer", index: int, *_: Any) -> None:
    streamer.send_back(index)


def move_all_but(module: nn.Module, layers: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
    """Move the tensors of `module` that are not in `layers` to `device`."""
    streamed = {id(tensor) for modules in layers for layer in modules for tensor in tensors_of(layer)}
    for tensor in tensors_of(module):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)


def layer_modules(network: nn.Module) -> list[list[nn.Module]]:
    """Return for every layer the modules whose weights it uses."""
    adaln = network.mixins["adaln_layer"]
    per_layer = [network.transformer.layers]
    if network.modulation_table is None:
        per_layer.append(adaln.adaLN_modulations)
    if adaln.qk_ln:
        per_layer += [adaln.query_layernorm_list, adaln.key_layernorm_list]
    return [list(modules) for modules in zip(*per_layer, strict=True)]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


class LayerStreamer:
    """Keeps the weights of a layer on the device while it runs; used by a `LayerRunner`.

    The device has two sets of buffers. While layer i computes with one set, the weights of the next layer are copied
    into the other one, on a separate stream.

    Args:
        layers: for each layer the modules whose weights it uses.
        dtypes: dtypes of the tensors of each layer while it runs; None: the dtypes in host memory.
        pin: on CUDA, first copy the weights into pinned host memory, from which copies to the device are fastest.
            Otherwise they are copied from where they are, for example from a mapped file, whose memory other processes
            share.
    """

    def __init__(
        self,
        layers: list[list[nn.Module]],
        device: torch.device,
        dtypes: Sequence[Sequence[torch.dtype]] | None = None,
        pin: bool = True,
    ):
        self.device, self.pin = device, pin
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._take(layers)
        self.dtypes = dtypes or [[tensor.dtype for tensor in host] for host in self.host]
        self.current, self.next = Slot(), Slot()

    def _take(self, layers: list[list[nn.Module]]) -> None:
        self.layers = [[tensor for module in modules for tensor in tensors_of(module)] for modules in layers]
        self.host = [[self._pinned(tensor.data) for tensor in tensors] for tensors in self.layers]
        for tensors, host in zip(self.layers, self.host, strict=True):
            _point(tensors, host)

    def renew(self, layers: list[list[nn.Module]]) -> None:
        """Stream the weights of other modules from now on, in their dtypes in host memory.

        No layer may run during this call.
        """
        self.leave_device()
        self._take(layers)
        self.dtypes = [[tensor.dtype for tensor in host] for host in self.host]

    def leave_device(self) -> None:
        """Free the buffers for layers on the device until a layer runs again."""
        if self.copy_stream is not None:
            self.copy_stream.synchronize()  # the next layer may still be being copied
        self.current, self.next = Slot(), Slot()
        if self.copy_stream is not None:
            torch.cuda.empty_cache()  # otherwise other streams could not use the memory

    def _pinned(self, data: Tensor) -> Tensor:
        return data.pin_memory() if self.copy_stream and self.pin else data

    def fetch(self, index: int, slot: "Slot") -> None:
        """Start copying a layer's weights into a slot, after the last computation that used it."""
        with torch.cuda.stream(self.copy_stream) if self.copy_stream else nullcontext():
            if self.copy_stream is not None and slot.used is not None:
                self.copy_stream.wait_event(slot.used)
            slot.make_room_for(self.host[index], self.dtypes[index], self.device)
            for buffer, data in zip(slot.buffers, self.host[index], strict=True):
                buffer.copy_(data, non_blocking=True)
            slot.filled = self.copy_stream and self.copy_stream.record_event()
        slot.layer = index

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return `run(hidden)`."""
        with self.on_device(context.layer):
            return run(hidden)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Keep the weights of a layer on the device within the block."""
        self.bring(index)
        try:
            yield
        finally:
            self.send_back(index)

    def bring(self, index: int) -> None:
        """Put the weights of a layer on the device, and start copying those of the next layer."""
        if self.next.layer != index:
            self.fetch(index, self.next)
        self.current, self.next = self.next, self.current
        compute = self.copy_stream and torch.cuda.current_stream(self.device)
        if compute:
            compute.wait_event(self.current.filled)
        self.fetch((index + 1) % len(self.layers), self.next)
        _point(self.layers[index], self.current.buffers)

    def send_back(self, index: int) -> None:
        """Point a layer that has run to its weights in host memory again."""
        _point(self.layers[index], self.host[index])
        compute = self.copy_stream and torch.cuda.current_stream(self.device)
        self.current.used = compute and compute.record_event()


class Slot:
    """A buffer for one layer on the device.

    It records which layer it holds and, on CUDA, when it was filled and last used.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.layer: int | None = None
        self.filled: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None

    def make_room_for(self, host: list[Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
        """Allocate buffers for a layer, unless those of the last layer have the same shapes."""
        wanted = [(data.shape, dtype) for data, dtype in zip(host, dtypes, strict=True)]
        if [(buffer.shape, buffer.dtype) for buffer in self.buffers] != wanted:
            self.buffers = []  # frees the old buffers first
            self.buffers = [
                torch.empty_like(data, dtype=dtype, device=device, pin_memory=False)
                for data, dtype in zip(host, dtypes, strict=True)
            ]


def _point(tensors: list[Tensor], data: list[Tensor]) -> None:
    """Let parameters and buffers use other memory."""
    for tensor, value in zip(tensors, data, strict=True):
        tensor.data = value

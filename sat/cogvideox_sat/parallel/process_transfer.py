"""Send objects between processes, with their tensors in shared memory.

Shared tensors are not copied again. A message is one packet of a socket, so that it arrives as a whole or not at all,
even from a process that is killed while it sends. The shared memory has no name: it is freed with the last tensor in
it, however the processes end, and it is not limited by the size of /dev/shm.
"""

import errno
import io
import mmap
import os
import pickle
import socket
import struct
from typing import Any

import torch
from torch import Tensor

PACKET = 32768  # bytes; the largest message that is sent without shared memory
ALIGNMENT = 64  # bytes, for each tensor
HEADER = struct.Struct("<qqq")  # in bytes: size of the pickle, offset and size of the list of tensors
TensorPlace = tuple[torch.dtype, tuple[int, ...], int]  # dtype, shape, and offset in bytes


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets for `send` and `receive`."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, content: Any) -> None:
    """Send an object that can be pickled; its tensors must be on the CPU.

    Raises:
        OSError: the other process has ended, or no memory is left.
    """
    tensors: list[Tensor] = []
    body = _pickled(content, tensors)
    if not tensors and len(body) < PACKET:
        to.send(HEADER.pack(len(body), 0, 0) + body)
        return
    places, end = [], _aligned(len(body))
    for tensor in tensors:
        places.append((tensor.dtype, tuple(tensor.shape), end))
        end = _aligned(end + tensor.numel() * tensor.element_size())
    listed = pickle.dumps(places)
    descriptor = os.memfd_create("clips", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, end + len(listed))
        memory = mmap.mmap(descriptor, end + len(listed))
        memory[: len(body)] = body
        memory[end : end + len(listed)] = listed
        for tensor, place in zip(tensors, places, strict=True):
            _view(memory, place).copy_(tensor)
        socket.send_fds(to, [HEADER.pack(len(body), end, len(listed))], [descriptor])
    finally:
        os.close(descriptor)


def receive(source: socket.socket) -> Any:
    """Return the object that was sent; no other process uses the memory of its tensors.

    Raises:
        EOFError: the other process has ended, and all its messages have been received.
        OSError: this process has too many open files to receive tensors.
    """
    try:
        packet, descriptors, _, _ = socket.recv_fds(source, HEADER.size + PACKET, 1)
    except ConnectionResetError as error:
        raise EOFError from error
    if not packet:
        raise EOFError
    size, listed_at, listed = HEADER.unpack_from(packet)
    if listed and not descriptors:  # the system drops descriptors for which there is no room
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if not descriptors:
        return pickle.loads(packet[HEADER.size : HEADER.size + size])
    try:
        memory = mmap.mmap(descriptors[0], listed_at + listed)
    finally:
        os.close(descriptors[0])
    places = pickle.loads(memory[listed_at : listed_at + listed])
    return _Unpickler(io.BytesIO(memory[:size]), [_view(memory, place) for place in places]).load()


def _view(memory: mmap.mmap, place: TensorPlace) -> Tensor:
    dtype, shape, offset = place
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pickled(content: Any, tensors: list[Tensor]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, tensors).dump(content)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Collects tensors in a list, and writes their indices into the pickle."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor:
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]

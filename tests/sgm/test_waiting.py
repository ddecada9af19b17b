"""Tensors wait on their device as long as there is room, then in host memory."""

import torch
from torch._subclasses import FakeTensorMode

from sgm.modules.autoencoding.waiting import WaitingRoom, in_host_memory


def test_room_is_used_first_and_given_back():
    with FakeTensorMode():
        room = WaitingRoom(100)
        first, second = (room.keep(torch.empty(80, dtype=torch.uint8, device="cuda")) for _ in range(2))
        assert (room.room, room.host_bytes) == (20, 80)
        assert first.take().device.type == "cuda" and room.room == 100
        back = second.take()
        assert back.device.type == "cuda" and back.shape == (80,)
        assert (room.host_bytes, room.host_peak) == (0, 80)


def test_on_a_cpu_they_stay():
    x = torch.arange(6.0)
    waiting = WaitingRoom().keep(x)
    assert waiting.take() is x
    copy = in_host_memory(x)
    x.zero_()
    assert copy.tolist() == [0, 1, 2, 3, 4, 5]


def test_layout_is_kept():
    x = torch.empty(1, 4, 2, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    assert in_host_memory(x).is_contiguous(memory_format=torch.channels_last_3d)
    assert in_host_memory(x.to("meta")).device.type == "cpu"

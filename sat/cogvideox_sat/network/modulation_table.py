"""Compute the adaLN modulations of a network in advance; their weights leave the device.

Modulations depend only on the time embedding, not on the sample. The modulations of all steps take little memory (3 MiB
per step for the 5B model) compared with the weights that compute them (1.5 GiB), which wait in host memory.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Key = tuple[torch.Size, torch.dtype, bytes]


class AskedLevel(NamedTuple):
    """The noise level of a step: `timesteps` (b,), and `ofs` (b,) for 1.5 image-to-video."""

    timesteps: Tensor
    ofs: Tensor | None


class LevelNotes:
    """A stand-in for a network that records the noise levels a sampler asks for, in `levels`."""

    def __init__(self) -> None:
        self.levels: list[AskedLevel] = []

    def __call__(self, x: Tensor, t: Tensor, c: Any, ofs: Tensor | None = None, **_: Any) -> Tensor:
        """Record the noise level; return zeros like `x`."""
        self.levels.append(AskedLevel(t, ofs))
        return torch.zeros_like(x)


class ModulationTable:
    """Table of the modulations of all layers, bit-identical to what the layers would compute.

    Missing entries are computed when they are needed, for which all weights pass through the device once.

    Args:
        modulations: for each layer the module that turns embeddings (b, e) into modulations (b, 12 d). Their weights
            are moved to host memory and stay there.
        device: device on which modulations are computed and used.
    """

    def __init__(self, modulations: Sequence[nn.Module], device: torch.device):
        self.modulations, self.device = list(modulations), device
        # In host memory, (layers, b or 1, 12 d) each; the most recently used entry is last.
        self.kept: dict[Key, Tensor] = {}
        tensors = [tensor for module in modulations for tensor in (*module.parameters(), *module.buffers())]
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu")
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)

    def __call__(self, emb: Tensor) -> Tensor:
        """Return the modulations (layers, b, 12 d) for embeddings (b, e), on the device."""
        self.fill([emb])
        return self.kept[_key(emb)].to(self.device).expand(-1, len(emb), -1).contiguous()

    @torch.no_grad()
    def fill(self, embeddings: Iterable[Tensor]) -> None:
        """Compute the missing entries for `embeddings`; drop old ones from a large table.

        The table may take as much memory as the weights. Each embedding is a tensor (b, e), exactly as layers get it:
        with another b, a matrix product may be rounded differently.
        """
        asked = {_key(emb): emb for emb in embeddings}
        missing = {key: emb for key, emb in asked.items() if key not in self.kept}
        if missing:
            layers: list[list[Tensor]] = [[] for _ in missing]
            for module in self.modulations:  # one after the other, so that the device holds the weights of only one
                weights = {
                    name: tensor.to(self.device)
                    for name, tensor in (*module.named_parameters(), *module.named_buffers())
                }
                for rows, emb in zip(layers, missing.values(), strict=True):
                    rows.append(functional_call(module, weights, (emb,)).to("cpu"))
            self.kept |= {key: _once(torch.stack(rows)) for key, rows in zip(missing, layers, strict=True)}
        for key in asked:
            self.kept[key] = self.kept.pop(key)
        self._make_room(len(asked))

    def _make_room(self, needed: int) -> None:
        """Drop the least recently used entries, but keep the last `needed` ones."""
        size = sum(rows.nbytes for rows in self.kept.values())
        for key in list(self.kept)[:-needed] if needed else []:
            if size <= self.weight_bytes:
                break
            size -= self.kept.pop(key).nbytes


def _key(emb: Tensor) -> Key:
    """Return the key of an embedding: its shape, dtype and bits."""
    return emb.shape, emb.dtype, emb.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _once(rows: Tensor) -> Tensor:
    """Return modulations (layers, b, 12 d) as (layers, 1, 12 d) if all samples have the same."""
    return rows[:, :1].clone() if torch.equal(rows, rows[:, :1].expand_as(rows)) else rows

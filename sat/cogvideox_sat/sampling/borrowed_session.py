"""A sampling session on an engine that someone else owns, such as a trainer."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.sampling.requests import SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from cogvideox_sat.sampling.visual_inputs import Pixels, load_pixels
from diffusion_video import SATVideoDiffusionEngine

Texts = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""Embeddings (1, tokens, features) of prompt and negative prompt, by both texts."""


class BorrowedSession(SamplingSession):
    """A session that samples with the existing parts of an engine, and keeps them unchanged.

    A missing part is loaded when a stage needs it, and dropped when the session is closed.

    Args:
        engine: engine whose network may be inside an optimizer's wrapper.
        settings: settings of the engine, and how processes share the work; `offload` has no effect.
        texts: embeddings for an engine whose conditioner encodes no texts.
        from_first: returns on all processes that take part in a request what a function returns on the first of them;
            None: the session's groups do this.
    """

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        settings: SessionSettings,
        texts: Texts = MappingProxyType({}),
        from_first: Callable[[Callable[[], Any]], Any] | None = None,
    ):
        self._theirs, self._texts, self._from_first = engine, texts, from_first
        self._kept = {part for part in PARTS if getattr(engine, part) is not None}
        super().__init__(settings)

    def _build_engine(self, settings: SessionSettings) -> SATVideoDiffusionEngine:
        self.adapters = ()  # only the engine's own adapter is used
        return self._theirs

    @property
    def _own_parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if part not in self._kept)

    def _encode_texts(self, prompt: str, negative_prompt: str) -> tuple[Tensor, Tensor]:
        known = self._texts.get((prompt, negative_prompt))
        return known or super()._encode_texts(prompt, negative_prompt)

    def _load_pixels(self, request: SampleRequest) -> Pixels:
        if self._from_first is None:
            return super()._load_pixels(request)
        return self._from_first(partial(load_pixels, request, self.limits))

"""A model that is opened once and samples videos on request, with events instead of files.

    with SamplingSession(settings) as session:
        for event in session.sample(request):
            match event:
                case Progress(): show(event.step, event.steps)
                case Frames(): player.append(event.frames)
                case Result(): gallery.add(event.latents, event.request)

This module prints nothing, writes no files and does not know the arguments of a command. `sampling.run` implements the
command with it.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self
from weakref import WeakSet

import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from cogvideox_sat.configuration.memory_advice import DECODING, ENCODING, SAMPLING, TEXT
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.model_limits import ModelLimits, check_offload, check_sharing
from cogvideox_sat.configuration.model_section import has_adapter
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs
from cogvideox_sat.configuration.video_layout import layout_of
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.engine.precision import dtype_of
from cogvideox_sat.engine_choice import build_engine
from cogvideox_sat.network.added_adapters import put_on
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.video_groups import video_groups
from cogvideox_sat.sampling.adapters import Chosen, added_up, read_adapters
from cogvideox_sat.sampling.drawing import Drawing
from cogvideox_sat.sampling.extension import extended
from cogvideox_sat.sampling.open_sessions import sessions_of_process
from cogvideox_sat.sampling.part_offloading import PartOffloader
from cogvideox_sat.sampling.request_samplers import RequestSamplers
from cogvideox_sat.sampling.requests import (
    Encoded,
    Frames,
    Latents,
    Result,
    SampleEvent,
    SampleRequest,
    SessionSettings,
)
from cogvideox_sat.sampling.text_embedding import embedded_texts
from cogvideox_sat.sampling.turns import RandomNumbers, in_turns
from cogvideox_sat.sampling.visual_inputs import EncodedInputs, Pixels, encode_inputs, load_pixels
from cogvideox_sat.weights.checkpoint_files import checkpoint_shares
from diffusion_video import SATVideoDiffusionEngine
from dit_video_concat import DiffusionTransformer
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.modules.diffusionmodules.sampling_start import steps_of_strength


class SamplingCancelled(Exception):
    """A request ended before its result, because `SamplingSession.cancel` was called."""


class SamplingSession:
    """A model that samples videos; a context manager that frees its memory at the end.

    The model is checked when the session is opened. The weights of a part are read when a stage first needs them, or by
    `load`.

    Attributes:
        engine: holds the conditioner, network and VAE; each is None while it is not loaded.
        limits: the sizes that the model takes.
        groups: the processes that make a video together.

    Raises:
        UserError: the model cannot be built, or the device or the checkpoint does not exist.
    """

    def __init__(self, settings: SessionSettings):
        self.settings = settings
        self.closed = False
        self.limits = ModelLimits.from_config(settings.model_config)
        self._cancellations = 0
        self._stage_runs = Lock()
        self._open: WeakSet[Generator[SampleEvent, None, None]] = WeakSet()
        self._last_texts: tuple[tuple[str, str], tuple[Tensor, Tensor]] | None = None
        sessions_of_process.enter(settings.model_parallel_size)
        try:
            self.groups = video_groups(layout_of(settings))
            self.engine = self._build_engine(settings)
            self.parts = PartOffloader(self.engine, settings.offload)
            self._samplers = RequestSamplers(self.engine)
        except BaseException:
            sessions_of_process.leave()
            raise

    def _build_engine(self, settings: SessionSettings) -> SATVideoDiffusionEngine:
        """Return the session's engine without parts, after all checks that need no weights."""
        dtype_of(settings)  # raises if two are on
        check_sharing(settings.model_config, settings.model_parallel_size, settings.lora_load)
        check_offload(settings.offload)
        for path in (settings.load, settings.lora_load):
            if path:  # an unusable checkpoint fails here, not after minutes of loading the text encoder
                checkpoint_shares(path)
        self.adapters = self._chosen(settings.adapters) if settings.adapters else ()
        check_model(settings, PARTS)  # before any weights are read
        device = choose_device(settings.device)
        engine = build_engine(settle_precision(settings, device), (), device, self.groups)
        engine.choose_attention()  # a missing kernel fails before weights are read
        hide_bar(engine.sampler)  # progress is reported by events
        engine.prepare_network = self._adapt
        return engine

    def _chosen(self, adapters: Iterable[tuple[str | Path, float]]) -> Chosen:
        """Return adapters with their strengths; raise UserError if they do not fit the network."""
        size = self.settings.model_parallel_size
        if has_adapter(self.settings.model_config):
            raise UserError(
                "lora: the model was loaded with a lora_config, which holds one adapter; load it without one"
            )
        if size > 1:
            raise UserError(f"lora: {size} processes share the network, which then takes no adapters; merge them first")
        return read_adapters(adapters, self.settings.model_config)

    def _adapt(self, network: nn.Module) -> None:
        """Apply the session's adapters to a network, in place of earlier ones."""
        sums = added_up(self.adapters)
        if isinstance(network, DiffusionTransformer):
            put_on(network, sums)
        elif sums:
            raise UserError(f"lora: {type(network).__name__} is not a network of this package; merge the adapters")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and dist.get_world_size() > 1:
            return  # freeing memory waits for the device, and the device may wait for a process that has failed
        self.close()

    def close(self) -> None:
        """End all requests and free the memory of the model; a second call does nothing."""
        if self.closed:
            return
        self.cancel()
        self.closed = True
        for events in list(self._open):
            with suppress(ValueError):  # another thread runs the request, and ends it at the next step
                events.close()
        with self._stage_runs:  # waits until that thread has left its stage
            self._last_texts = None
            for part in self._own_parts:
                if getattr(self.engine, part) is not None:
                    self.engine.release(part)
            sessions_of_process.leave()

    # Parts

    @property
    def _own_parts(self) -> tuple[str, ...]:
        """Return the parts that the session frees at its end."""
        return PARTS

    def load(self, part: str) -> None:
        """Load one of `engine.parts.PARTS` now; other parts leave the device as `offload` says.

        Stages load parts themselves. A caller that takes several requests through a stage together calls this before
        the stage, so that a failure to load is not attributed to one request.

        Raises:
            UserError: its weights cannot be read or do not fit, or memory is full.
        """
        if part != "conditioner" or self._encodes_texts:
            self.parts.use(part)

    @property
    def _encodes_texts(self) -> bool:
        """Return whether this process encodes prompts.

        If processes share the work on a video, only the first one does.
        """
        return self.groups.first or not self.groups.splits_work

    def set_adapters(self, adapters: Iterable[tuple[str | Path, float]]) -> None:
        """Use exactly these adapters from the next request on, without rebuilding the network.

        Raises:
            UserError: an adapter cannot be read or does not fit, or the network's configuration has its own adapter.
            RuntimeError: a request is within a stage.
        """
        chosen = self._chosen(adapters)
        if not self._stage_runs.acquire(blocking=False):
            raise RuntimeError("a request is within a stage: take it to the stage's end, or close its iterator")
        try:
            self.adapters = chosen
            if self.engine.model is not None:
                with memory_guard("putting adapters on"):
                    self._adapt(self.engine.network)
        finally:
            self._stage_runs.release()

    def release(self, part: str) -> None:
        """Drop a part that is currently not needed, and free its memory."""
        self.engine.release(part)

    # Requests

    def steps_of(self, steps: int | None, knobs: SamplerKnobs = NO_KNOBS, name: str = "sampling_num_steps") -> int:
        """Return the number of steps of a request; see `RequestSamplers.steps_of`."""
        return self._samplers.steps_of(steps, knobs, name)

    def steps_taken(self, request: SampleRequest) -> int:
        """Return the total number of steps of a request's windows, as `Progress` counts them.

        Raises:
            UserError: see `RequestSamplers.steps_of`.
        """
        steps = self.steps_of(request.steps, request.knobs)
        further = steps * len(request.extend)
        if request.goes_on:
            return further
        return further + (steps if request.video is None else steps_of_strength(request.share, steps))

    def cancel(self) -> None:
        """End all open requests, each at its next step or chunk.

        Their iterators raise SamplingCancelled. Another thread may call this. Later requests are not affected.
        """
        self._cancellations += 1

    def sample(self, request: SampleRequest) -> Generator[SampleEvent, None, None]:
        """Return an iterator over the events of a request.

        The events are `Encoded`, `Progress`, `Latents`, `Frames` and `Result`. A stage is computed when its first event
        is requested: first the prompt is encoded, then pictures and clips; then latents are sampled, and then decoded.
        For a request with further windows, this repeats for each window. Closing the iterator ends the request. Between
        two stages another request may run; within a stage it may not.

        Raises:
            UserError: the model cannot do what is asked; while iterating: a stage fails.
            OutOfMemory: while iterating: memory is full.
            SamplingCancelled: while iterating: `cancel` was called.
            RuntimeError: the session is closed; while iterating: another request is within a stage.
        """
        if self.closed:
            raise RuntimeError("the session is closed: open another one")
        request.check(self.limits)
        self.steps_of(request.steps, request.knobs)
        single = partial(self._single, cancellations=self._cancellations)
        events = extended(request, self.limits, single, self.steps_taken) if request.extend else single(request)
        self._open.add(events)
        return events

    def _single(self, request: SampleRequest, cancellations: int) -> Generator[SampleEvent, None, None]:
        """Return the events of a checked request with one window."""
        settled = replace(request, steps=self.steps_of(request.steps, request.knobs))
        return self._events(settled, request.steps, cancellations)

    def _events(
        self, request: SampleRequest, asked_steps: int | None, cancellations: int
    ) -> Generator[SampleEvent, None, None]:
        """Yield the events of a request with one window and a number of steps.

        Args:
            asked_steps: number of steps as the caller gave it; None: the sampler's own number.
            cancellations: number of cancellations when the request was made; one more ends it.
        """

        def go_on() -> None:
            if self._cancellations != cancellations:
                raise SamplingCancelled("the request is cancelled")

        go_on()
        texts = self._encode_texts(request.prompt, request.negative_prompt)
        yield Encoded("prompt")
        go_on()
        random_numbers, inputs = RandomNumbers(self.engine.device), EncodedInputs({})
        if what := request.shows:
            doing = "encoding images" if what == "image" else ENCODING
            with self._stage("first_stage_model", doing), random_numbers:
                inputs = encode_inputs(self.engine, request, self._load_pixels(request))
            yield Encoded(what)
            go_on()
        with self._stage("model", SAMPLING):
            sampler = self._samplers.of(request.knobs)
            drawing = Drawing(self.engine, request, asked_steps, texts, inputs, self.limits.latent_channels, sampler)
            with closing(in_turns(drawing, random_numbers)) as steps:
                for progress in steps:
                    go_on()
                    yield progress
                    go_on()
        yield Latents(drawing.latents)
        go_on()
        with self._stage("first_stage_model", DECODING):
            for frames in self.engine.decode_stream(rearrange(drawing.latents, "1 t c h w -> 1 c t h w")):
                yield Frames(rearrange(frames, "1 c t h w -> t c h w"))
                go_on()
        yield Result(drawing.latents, request)

    def _load_pixels(self, request: SampleRequest) -> Pixels:
        """Return a request's pictures and clips, read by the first process if processes share it."""
        load = partial(load_pixels, request, self.limits)
        return self.groups.from_first(load) if self.groups.splits_work else load()

    @contextmanager
    def _stage(self, part: str, doing: str) -> Iterator[None]:
        """Keep a part on the device, and other requests out of stages, within the block."""
        if not self._stage_runs.acquire(blocking=False):
            raise RuntimeError("another request is within a stage: take it to the stage's end, or close its iterator")
        try:
            self.parts.use(part)
            with memory_guard(doing):
                yield
        finally:
            self._stage_runs.release()

    def _encode_texts(self, prompt: str, negative_prompt: str) -> tuple[Tensor, Tensor]:
        """Return `embedded_texts` of both texts; the embeddings of the last request are reused."""
        if self._last_texts is not None and self._last_texts[0] == (prompt, negative_prompt):
            return self._last_texts[1]

        def embed() -> tuple[Tensor, Tensor]:
            with self._stage("conditioner", TEXT):
                return embedded_texts(self.engine, prompt, negative_prompt)

        embeddings = self.groups.from_first(embed) if self.groups.splits_work else embed()
        self._last_texts = (prompt, negative_prompt), embeddings
        return embeddings

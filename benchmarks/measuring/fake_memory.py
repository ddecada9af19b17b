"""Count the device memory of a whole sampling run, with the real code on fake tensors.

The parts of the engine move as `sampling.part_offloading` decides, layers are streamed, all layers and steps run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.memory.sampling_peaks import (
    DEFAULT_TOKENS,
    IMAGE,
    NETWORK,
    TEXT,
    VIDEO,
    MemoryPolicy,
    VideoSize,
    attention_without_scores,
)
from cogvideox_sat.memory.weightless import WeightlessEngine
from cogvideox_sat.network import modulation_table
from cogvideox_sat.sampling.part_offloading import PartOffloader
from sgm.models.video_coder_memory import AllocatedBytes
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.encoders.t5_loading import block_dtypes

DEVICE = "cuda:0"


class FakeEngine(WeightlessEngine):
    """The engine with parts of fake tensors, on the devices of real ones."""

    def _build_network(self, device: torch.device | str) -> nn.Module:
        with _disable_current_modes():
            model = super()._build_network("meta")
        with_fake_tensors(model, device)
        model.diffusion_model.attention = attention_without_scores
        return model

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        with _disable_current_modes():
            first_stage = super()._build_first_stage("meta")
        return with_fake_tensors(first_stage, device)

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        with _disable_current_modes():
            conditioner = super()._build_conditioner("meta")
        embedder = FrozenT5Embedder.__new__(FrozenT5Embedder)  # `__init__` would read weights from a file
        nn.Module.__init__(embedder)
        embedder.transformer = with_fake_tensors(conditioner.text_encoder, device)
        embedder.block_dtypes = block_dtypes(embedder.transformer)
        conditioner.text_encoder = embedder
        return conditioner


def with_fake_tensors(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Return the module with fake tensors on `device` instead of its own."""
    fakes: dict[int, torch.Tensor] = {}
    slots = [entries for part in module.modules() for entries in (part._parameters, part._buffers)]
    for old in [*module.parameters(), *module.buffers()]:
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        fakes[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
    for entries in slots:
        entries.update({name: fakes[id(old)] for name, old in entries.items() if old is not None})
    return module


@contextmanager
def on_fake_tensors() -> Iterator[AllocatedBytes]:
    """Make fake tensors within the block, and count those of the device."""

    def set_data(tensor: FakeTensor, value: FakeTensor) -> None:
        torch.Tensor.data.__set__(tensor, value)
        tensor.fake_device = value.fake_device

    data = property(lambda tensor: torch.Tensor.data.__get__(tensor), set_data)
    with (
        patch.object(FakeTensor, "data", data, create=True),
        patch.object(torch.cuda, "Stream", lambda *_: None),  # layers are copied without another stream
        patch.object(torch.random, "fork_rng", lambda **_: nullcontext()),  # the device may not exist
        patch.object(modulation_table, "_key", lambda emb: (emb.shape, emb.dtype, b"")),
        patch.object(modulation_table, "_once", lambda rows: rows[:, :1].clone()),
        torch.no_grad(),
        FakeTensorMode(),
        AllocatedBytes(workspaces=True) as allocated,
    ):
        yield allocated


def stage_peaks(settings: EngineSettings, video: VideoSize, policy: MemoryPolicy, steps: int) -> dict[str, int]:
    """Return the peak bytes on the device in each stage of sampling one video.

    Args:
        video: latent frames, height and width in pixels.
        steps: number of sampling steps; all have the same peak.
    """
    arguments = policy._asdict()
    offload = arguments.pop("offload")
    settings = replace(settings, **arguments)
    frames, height, width = video
    peaks = {}
    with on_fake_tensors() as allocated:
        engine = FakeEngine(settings, parts=(), device=DEVICE, assumes_t5=True)
        hide_bar(engine.sampler)
        parts = PartOffloader(engine, offload)

        @contextmanager
        def stage(name: str, part: str) -> Iterator[None]:
            allocated.peak = allocated.live
            parts.use(part)
            yield
            peaks[name] = allocated.peak

        parts.use("first_stage_model")  # the command also loads all weights first
        with stage(TEXT, "conditioner"):
            tokens = torch.zeros(1, text_tokens(engine), dtype=torch.long, device=DEVICE)
            text = engine.conditioner.text_encoder.transformer(input_ids=tokens).last_hidden_state.cpu()
        engine.release("conditioner")
        image = None
        if engine.noised_image_input:
            with stage(IMAGE, "first_stage_model"):
                pixels = torch.empty(1, 3, 1, height, width, device=DEVICE)
                image = engine.encode_condition_image(pixels).cpu()
                del pixels
        with stage(NETWORK, "model"):
            cond, uc = ({"crossattn": text.to(DEVICE)} for _ in range(2))
            concat = None if image is None else engine.concat_condition(image.to(DEVICE), frames)
            size = (engine.network.out_channels, height // SPACE_FACTOR, width // SPACE_FACTOR)
            ofs = engine.default_ofs(1)
            latents = engine.sample(cond, uc, 1, (frames, *size), concat, ofs, num_steps=steps)
            latents = engine.drop_extra_frame(latents).cpu()
            del cond, uc, concat
        with stage(VIDEO, "first_stage_model"):
            for _ in engine.decode_stream(latents.transpose(1, 2)):
                pass
    return peaks


def text_tokens(engine: WeightlessEngine) -> int:
    """Return the number of tokens of a prompt in the text encoder."""
    return engine.config["conditioner_config"]["params"]["emb_models"][0]["params"].get("max_length", DEFAULT_TOKENS)

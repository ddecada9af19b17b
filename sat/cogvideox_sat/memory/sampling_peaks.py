"""Compute the device memory that sampling takes, by offload policy, without weights.

The engine samples a few steps on PyTorch's meta device, where tensors have shapes but no content, and the tensors that
are made and freed are counted; the same is done for its text encoder and its VAE. The figures therefore follow the
configured model. If several processes share a video, the figures are those of the first process, which has the most
tokens and the text encoder.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.video_layout import VideoLayout
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.files.sizes import GIB
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from cogvideox_sat.memory.weightless import FirstOfGroup, WeightlessEngine, module_bytes
from cogvideox_sat.network import sequence_parallel
from cogvideox_sat.network.layer_streaming import layer_modules
from sgm.models.video_coder import VideoCoder
from sgm.models.video_coder_memory import AllocatedBytes
from sgm.modules.diffusionmodules.sampling_bar import hide_bar

LIBRARIES = GIB  # memory of CUDA and its libraries, besides tensors
LAYERS, STEPS = 2, 3  # that are simulated; more of them take no more memory
DEFAULT_TOKENS = 77  # of `FrozenT5Embedder`
LONGEST_CHUNK = 12  # frames
TO_HEADS, TO_TOKENS = (
    each._opoverload for each in (sequence_parallel.tokens_to_heads, sequence_parallel.heads_to_tokens)
)
TEXT, IMAGE, NETWORK, VIDEO = "text encoder", "first frame", "network", "VAE"


class MemoryPolicy(NamedTuple):
    """Arguments that trade device memory for time in sampling, by their names."""

    offload: str
    guidance_batch: int
    vae_frames_at_once: int | None = None
    vae_tile_size: int | None = None

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self._asdict().items() if value is not None)


class VideoSize(NamedTuple):
    """Shape of a video: latent frames, as `sampling_num_frames` counts them, and pixels."""

    latent_frames: int
    height: int
    width: int


class PartBytes(NamedTuple):
    """Bytes of a part's weights.

    Attributes:
        whole: all weights.
        rest: weights outside of the layers.
        slots: space for layers that are loaded one after the other.
    """

    whole: int
    rest: int
    slots: int


class SamplingMemory:
    """Device memory that sampling takes, including `LIBRARIES`.

    Args:
        settings: of the engine; settings that a `MemoryPolicy` contains are not read.
        videos: the sizes of the videos.
        keeps_text_encoder: the text encoder stays for further prompts, as when prompts are typed.
        decodes: latents are decoded.
        layout: how processes share a video.

    Raises:
        UserError: a part of the model cannot be built.
    """

    def __init__(
        self,
        settings: EngineSettings,
        videos: Collection[VideoSize],
        keeps_text_encoder: bool = False,
        decodes: bool = True,
        layout: VideoLayout | None = None,
    ):
        self.videos, self.keeps_text_encoder, self.decodes = set(videos), keeps_text_encoder, decodes
        self.layout = layout or VideoLayout()
        self.engine = WeightlessEngine(settings, parts=PARTS, device="meta", assumes_t5=True)
        self.engine.to("meta")  # moves tables that were built with real content
        hide_bar(self.engine.sampler)
        self.network, self.vae = self.engine.network, self.engine.first_stage_model
        if self.layout.sequence > 1:
            self.network.share_tokens(FirstOfGroup(self.layout.sequence))
        self.takes_image = self.engine.noised_image_input
        pieces = hasattr(getattr(self.vae, "encoder", None), "in_pieces")
        shared = (self.engine.config["first_stage_config"]["params"].get("cp_size") or 1) > 1
        self.takes_pieces = isinstance(self.vae, VideoCoder) and pieces and not shared
        self.parts = self._part_bytes()
        self.text_activations = self._text_activations()
        self.image_activations = self._image_activations() if self.takes_image else 0
        self.network_activations = cache(self._network_activations)
        self.decoding_activations = cache(self._decoding_activations)

    def _part_bytes(self) -> dict[str, PartBytes]:
        encoder = self.engine.conditioner.text_encoder
        network, tabulated = self.network, 0
        if network.why_layers_are_not_plain() is None:
            network.modulation_table = TabulatedOnMeta(network.mixins["adaln_layer"].adaLN_modulations)
            tabulated = sum(map(module_bytes, network.modulation_table.modulations))
        whole, rest, slots = streamed_bytes(network, layer_modules(network))
        self.tabulated = tabulated
        return {
            TEXT: streamed_bytes(encoder, [[block] for block in encoder.encoder.block]),
            NETWORK: PartBytes(whole, rest - tabulated, slots),
            VIDEO: PartBytes(module_bytes(self.vae), 0, 0),
        }

    @property
    def longest_side(self) -> int:
        """Return the longest side of the videos in pixels."""
        return max(max(video.height, video.width) for video in self.videos)

    def peak(self, policy: MemoryPolicy) -> int:
        """Return the bytes of device memory that sampling takes under a policy."""
        return max(self.stages(policy).values())

    def stages(self, policy: MemoryPolicy) -> dict[str, int]:
        """Return the bytes of device memory that each stage takes under a policy."""
        text, network, vae = self.parts[TEXT], self.parts[NETWORK], self.parts[VIDEO].whole
        keeps_vae = self.decodes or self.takes_image
        if policy.offload == "none":
            beside = vae * keeps_vae + text.whole * self.keeps_text_encoder
            weights = {
                TEXT: vae * keeps_vae + text.whole + network.whole * self.keeps_text_encoder,
                IMAGE: beside + network.whole * self.keeps_text_encoder,
                NETWORK: beside + network.whole,
                VIDEO: beside + network.whole,
            }
        elif policy.offload == "stage":
            weights = {TEXT: text.whole, IMAGE: vae, NETWORK: network.whole - self.tabulated, VIDEO: vae}
        else:
            waiting = network.rest  # weights outside of the layers stay once they are loaded
            earlier = waiting * self.keeps_text_encoder
            weights = {
                TEXT: text.rest + text.slots + earlier,
                IMAGE: vae + earlier,
                NETWORK: waiting + network.slots,
                VIDEO: vae + waiting,
            }
        activations = {TEXT: self.text_activations}
        batch = 1 if self.layout.guidance > 1 else policy.guidance_batch
        activations[NETWORK] = self.network_activations(batch, policy.offload != "none")
        if self.takes_image:
            activations[IMAGE] = self.image_activations
        if self.decodes:
            activations[VIDEO] = self.decoding_activations(policy.vae_frames_at_once, policy.vae_tile_size)
        needed = {stage: LIBRARIES + weights[stage] + taken for stage, taken in activations.items()}
        if policy.offload == "stage":  # the network is loaded before its modulations are computed
            needed[NETWORK] = max(needed[NETWORK], LIBRARIES + network.whole)
        return needed

    def _text_activations(self) -> int:
        """Return the bytes that the text encoder takes for a prompt, besides its weights."""
        embedder = self.engine.config["conditioner_config"]["params"]["emb_models"][0]["params"]
        tokens = torch.zeros(1, embedder.get("max_length", DEFAULT_TOKENS), dtype=torch.long, device="meta")
        return peak_of(lambda: self.engine.conditioner.text_encoder(input_ids=tokens), self.engine)

    def _image_activations(self) -> int:
        """Return the bytes that the VAE takes to encode a first frame."""
        height, width = self._largest_image()
        image = torch.empty(1, 3, 1, height, width, device="meta")
        return peak_of(lambda: self.engine.encode_condition_image(image), self.engine)

    def _network_activations(self, guidance_batch: int, tabulated: bool) -> int:
        """Return the bytes that network and sampler take for a video, besides weights."""
        engine, network, params = self.engine, self.network, self.engine.config["network_config"]["params"]
        frames, height, width = max(self.videos, key=lambda video: video.latent_frames * video.height * video.width)
        channels, layers, table = network.out_channels, network.num_layers, network.modulation_table
        engine.settings = replace(engine.settings, guidance_batch=guidance_batch)
        size = (height // SPACE_FACTOR, width // SPACE_FACTOR)
        modules = params["modules"]
        text = network.mixins["pos_embed"].text_length, modules["patch_embed_config"]["params"]["text_hidden_size"]

        def draw() -> Tensor:
            cond, uc = ({"crossattn": torch.empty(1, *text, device="meta")} for _ in range(2))
            image = None
            if self.takes_image:
                image = engine.concat_condition(torch.empty(1, 1, channels, *size, device="meta"), frames)
            shape = (frames, channels, *size)
            return engine.sample(cond, uc, 1, shape, image, engine.default_ofs(1), num_steps=STEPS)

        network.num_layers, network.modulation_table = min(LAYERS, layers), table if tabulated else None
        network.attention = attention_without_scores
        try:
            with torch.random.fork_rng(devices=[]):
                return peak_of(draw, self.engine)
        finally:
            network.num_layers, network.modulation_table = layers, table

    def _decoding_activations(self, frames_at_once: int | None, tile_size: int | None) -> int:
        """Return the bytes that the VAE takes to decode a video, besides its weights."""
        height, width = self._largest_image()
        frames = max(video.latent_frames for video in self.videos) - int(self.engine.is_15)
        size = (height // SPACE_FACTOR, width // SPACE_FACTOR)
        latents = torch.empty(1, self.network.out_channels, frames, *size, device="meta")
        if isinstance(self.vae, VideoCoder):
            self.vae.use_tiles(tile_size)
            if self.takes_pieces:
                self.vae.use_frames_at_once(frames_at_once, waiting_bytes=0)
            latents = latents[:, :, : self.vae.traced_latents(frames)]

        def decode() -> None:
            for _ in self.engine.decode_stream(latents):
                pass

        return peak_of(decode, self.engine) + self._gathered_bytes(height, width)

    def _gathered_bytes(self, height: int, width: int) -> int:
        """Return the bytes for gathering the chunks of frames that processes decode at a time."""
        if self.layout.processes == 1:
            return 0
        chunk = 3 * LONGEST_CHUNK * height * width * self.engine.dtype.itemsize
        return (1 + 2 * self.layout.processes) * chunk  # padded, received, put together

    def _largest_image(self) -> tuple[int, int]:
        _, height, width = max(self.videos, key=lambda video: video.height * video.width)
        return height, width


class BytesWithExchanges(AllocatedBytes):
    """Counter of tensors, including those sent and received in `network.sequence_parallel`."""

    def during(self, function: Any, args: tuple[Any, ...], result: Any) -> int:
        """Return the bytes in use during a function; see `AllocatedBytes`.

        The received tensor becomes the result, or has its size.
        """
        own = super().during(function, args, result)
        if function is TO_HEADS:
            return own + sum(part.nbytes for part in args[0])
        return own + (args[0].nbytes + result.nbytes if function is TO_TOKENS else 0)


class TabulatedOnMeta:
    """Substitute for a `ModulationTable` whose modulations have no content.

    Args:
        modulations: the module of each layer that computes its modulations.
    """

    def __init__(self, modulations: Iterable[nn.Module]):
        self.modulations = list(modulations)

    def __call__(self, emb: Tensor) -> Tensor:
        """Return modulations (layers, b, 12 d) for embeddings (b, e)."""
        width = self.modulations[0][1].out_features
        return emb.new_empty(len(self.modulations), len(emb), width)

    def fill(self, embeddings: Iterable[Tensor]) -> None:
        """Do nothing, since there is no content."""


def attention_without_scores(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Return a tensor like `q` (b, heads, n, e), without allocating scores (b, heads, n, n).

    Attention kernels do not store scores either.
    """
    b, heads, tokens, _ = q.shape
    normalizers = q.new_empty(b, heads, tokens, dtype=torch.float32)  # allocated and freed
    return torch.empty_like(q) if normalizers.numel() else q


def streamed_bytes(module: nn.Module, layers: Iterable[Iterable[nn.Module]]) -> PartBytes:
    """Return the bytes of a part that has two layers on the device at a time."""
    sizes = [sum(map(module_bytes, modules)) for modules in layers]
    whole = module_bytes(module)
    return PartBytes(whole, whole - sum(sizes), 2 * max(sizes, default=0))


@torch.no_grad()
def peak_of(run: Callable[[], Any], beside: nn.Module) -> int:
    """Return the peak bytes of tensors that `run` makes, not counting those of `beside`."""
    allocated = BytesWithExchanges(workspaces=True)
    allocated.leave_out(tensor.untyped_storage() for tensor in (*beside.parameters(), *beside.buffers()))
    with allocated:
        run()
    return allocated.peak

"""The engine: conditioner, first stage, network and the glue between them."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.configuration.model_section import ALL, not_trainable_prefixes, plain_model_section
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR, patch_sizes
from cogvideox_sat.network.attention_choice import AttentionChoice, choose_attention
from cogvideox_sat.network.batch_parts import in_parts
from cogvideox_sat.network.layer_runner import SamplingProgress
from cogvideox_sat.network.modulation_table import AskedLevel, LevelNotes
from cogvideox_sat.parallel.process_groups import parallel_groups
from cogvideox_sat.parallel.video_groups import ALONE, VideoGroups
from cogvideox_sat.weights.checkpoint_files import is_adapter
from cogvideox_sat.weights.loading import load_network
from sgm import randomness
from sgm.config_places import Place, section
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.models.video_coder import VideoCoder
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.diffusionmodules.guidance_parallel import GuidanceParallel
from sgm.modules.diffusionmodules.key_frames import KeyFrameDraws, noise_pictures
from sgm.modules.diffusionmodules.sampling import Sampler
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.modules.diffusionmodules.sampling_start import NOISE, Start
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper, why_not_compilable
from sgm.signatures import accepts
from sgm.util import class_at, instantiate_from_config

logger = logging.getLogger(__name__)

PARTS = ("conditioner", "first_stage_model", "model")
PART_NAMES = {"conditioner": "the text encoder", "first_stage_model": "the VAE", "model": "the network"}
AUTO = "auto"  # of `compile_model`
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(settings: EngineSettings) -> torch.dtype:
    """Return float16 for `fp16`, bfloat16 for `bf16`, else float32.

    Raises:
        UserError: both are set.
    """
    chosen = [name for name in DTYPES if getattr(settings, name)]
    if len(chosen) > 1:
        raise UserError("fp16 and bf16 are both on: choose one")
    return DTYPES[chosen[0]] if chosen else torch.float32


class SATVideoDiffusionEngine(nn.Module):
    """Video latent diffusion: what a training loop or a sampling command needs, by the names configurations use.

    The attributes `conditioner` (text to embeddings), `first_stage_model` (pixels to latents) and `model` (the
    network in its wrapper) are built on request, so that a program may hold them in turn.

    Attributes:
        settings: what it is built from; `args` as it was given, for subclasses that read more.

    Args:
        args: `EngineSettings`, or an object with such attributes (at least `model_config`), as in the original.
        parts: which of `PARTS` to build now.
        device: where parts are put.
        params_dtype: the dtype of all parts, as SwissArmyTransformer's `get_model` says it; None: that of `args`.
    """

    def __init__(
        self,
        args: EngineSettings | Any,
        parts: tuple[str, ...] = PARTS,
        device: torch.device | str = "cpu",
        params_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.args, self.settings = args, EngineSettings.from_args(args)
        self.config = config = plain_model_section(self.settings.model_config)
        self.dtype = params_dtype or dtype_of(self.settings)
        self.drops = True  # captions and images, where a call does not say
        self.device = torch.device(device)
        self.scale_factor = config.get("scale_factor", 1.0)
        self.log_keys = config.get("log_keys") or ["txt"]
        self.input_key = config.get("input_key", "mp4")
        self.latent_input = config.get("latent_input", False)
        self.samples_at_a_time = samples_at_a_time(config.get("en_and_decode_n_samples_a_time"))
        self.noised_image_input = config.get("noised_image_input", False)
        self.noised_image_all_concat = config.get("noised_image_all_concat", False)
        self.noised_image_dropout = config.get("noised_image_dropout", 0.0)
        self.key_frames = KeyFrameDraws(config["conditioning"]) if config.get("conditioning") else None
        if self.key_frames is not None:
            self.check_key_frames()
        self.not_trainable_prefixes = not_trainable_prefixes(config)
        self.attention: AttentionChoice | None = None
        self.compiled = False  # the network goes through torch.compile
        self.text_blocks_as_stored = False  # see `FrozenT5Embedder`, for whoever brings its blocks when they run
        self.video_groups = ALONE
        self.prepare_network: Callable[[nn.Module], None] | None = None  # called with a network that has its weights

        with self.section():
            self.denoiser = instantiate_from_config(config["denoiser_config"])
            self.sampler: Any = self._optional("sampler_config")
            self.loss_fn: Any = self._optional("loss_fn_config")
            # The first stage's own, for latents that were encoded before.
            self.regularizer = instantiate_from_config(config["first_stage_config"]["params"]["regularizer_config"])
        for part in PARTS:
            setattr(self, part, None)
        for part in parts:
            self.build(part)

    def section(self) -> AbstractContextManager[None]:
        """Return a context in which objects are built of this configuration, whose files errors then name."""
        return section("model", self.config, self.settings.sources)

    def _optional(self, key: str) -> Any:
        """Return what the configuration describes at a key; None if it has no such key."""
        return instantiate_from_config(self.config[key]) if self.config.get(key) else None

    def share_videos(self, groups: VideoGroups) -> None:
        """Make each video together with other processes, which all do the same; call it before parts are built.

        Raises:
            UserError: the sampler has no guider whose halves could be shared.
        """
        self.video_groups = groups
        self.shared_sampler(self.sampler)

    def shared_sampler(self, sampler: Any) -> Any:
        """Return a sampler, with the halves of its guider shared out as `share_videos` says.

        Raises:
            UserError: it has no guider whose halves could be shared.
        """
        if (group := self.video_groups.guidance) is not None:
            if not hasattr(sampler, "guider"):
                raise UserError(
                    f"guidance_parallel: {type(sampler).__name__} has no `guider`; leave it out, and let all "
                    "processes share the sequence"
                )
            sampler.guider = GuidanceParallel(sampler.guider, group)
        return sampler

    # Parts

    def build(self, part: str, device: torch.device | str | None = None) -> nn.Module:
        """Build one of `PARTS`, with its weights, in the engine's dtype; nothing if it is there.

        `device` is where it is put, if not on the engine's own.
        """
        if getattr(self, part) is None:
            build = {
                "conditioner": self._build_conditioner,
                "first_stage_model": self._build_first_stage,
                "model": self._build_network,
            }[part]
            with memory_guard(f"loading {PART_NAMES[part]}"), self.section():
                setattr(self, part, build(self.device if device is None else device))
        return getattr(self, part)

    def release(self, part: str) -> None:
        """Drop a part and return its memory."""
        setattr(self, part, None)
        gc.collect()  # SwissArmyTransformer's hooks tie a network into a circle that reference counts do not free
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        # Given to the text encoder rather than cast later: it keeps some layers in float32 when it runs in float16, and
        # takes weights from its file one by one.
        config = copy.deepcopy(dict(self.config["conditioner_config"]))
        for embedder in config["params"]["emb_models"]:
            if embedder["target"].endswith("FrozenT5Embedder"):
                embedder["params"] |= {"dtype": self.dtype, "device": device}
                if self.text_blocks_as_stored:
                    embedder["params"]["blocks_as_stored"] = True
        return instantiate_from_config(config).to(device)

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        first_stage = instantiate_from_config(self.config["first_stage_config"])
        if self.settings.vae_tile_size is not None and isinstance(first_stage, VideoCoder):
            first_stage.use_tiles(self.settings.vae_tile_size)
        if self.video_groups.splits_work and isinstance(first_stage, VideoCoder):
            first_stage.group = self.video_groups.group
        if self.settings.vae_frames_at_once is not None and isinstance(first_stage, VideoCoder):
            first_stage.use_frames_at_once(self.settings.vae_frames_at_once, self.settings.vae_waiting_bytes)
        first_stage = first_stage.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        if isinstance(first_stage, VideoCoder):
            first_stage.lay_out_weights()
        return first_stage

    def _build_network(self, device: torch.device | str) -> nn.Module:
        config, settings, overrides = self.config["network_config"], self.settings, {}
        if (size := settings.model_parallel_size) is not None:
            overrides["transformer_args"] = {**config["params"]["transformer_args"], "model_parallel_size": size}
        if settings.load:
            network = instantiate_on_meta(config, **overrides).to(self.dtype)
            load_network(
                network,
                settings.load,
                lora_load=settings.lora_load,
                allow_missing=settings.force_inference,
                new_adapter=settings.new_adapter,
                device=device,
                in_shares=settings.weights_in_shares,
            )
        else:
            network = instantiate_from_config(config, **overrides).to(device=device, dtype=self.dtype)
        if self.loss_fn is not None:  # building the network has set up the groups
            groups = self.video_groups
            shared = (groups.group, groups.peers) if groups.splits_work else parallel_groups()
            self.loss_fn.set_parallel_groups(*shared)
        if settings.lora_scale is not None:
            set_lora_scale(network, settings.lora_scale)
        if self.prepare_network is not None:
            self.prepare_network(network)
        if hasattr(network, "use_attention"):
            network.use_attention(self.attention or self.choose_attention())
        if self.video_groups.sequence is not None:
            if not hasattr(network, "share_tokens"):
                raise UserError(
                    f"sequence_parallel: {type(network).__name__} has no `share_tokens`; use guidance_parallel alone"
                )
            network.share_tokens(self.video_groups.sequence)
        wrapper: type = OpenAIWrapper
        if self.config.get("network_wrapper"):
            place = Place(("model",), self.config, self.settings.sources).below("network_wrapper")
            wrapper = class_at(self.config["network_wrapper"], place, place.slot)
        self.compiled = self._compiles(network)
        if self.compiled:
            engine = weakref.ref(self)  # it has the network
            network.compiler_failed = lambda: setattr(engine(), "compiled", False)
            logger.info("compile_model: the network is compiled when it first runs")
        return wrapper(network, compile_model=self.compiled, dtype=self.dtype)

    def _compiles(self, network: nn.Module) -> bool:
        """Return whether the network goes through torch.compile: as `compile_model` says, or `auto`, which is where it
        pays: on a GPU, if the network's layers can be compiled. Without a compiler it does not, and a line says so."""
        asked = self.config.get("compile_model")
        asked = AUTO if asked is None else asked
        pays = self.device.type == "cuda" and hasattr(network, "compile_layers")
        if not (pays if asked == AUTO else asked):
            return False
        if reason := why_not_compilable(self.device):
            logger.warning("compile_model: the network runs without torch.compile, which fails here: %s", reason)
            return False
        return bool(asked != AUTO or network.compile_layers())

    def choose_attention(self, gradients: bool = False) -> AttentionChoice:
        """Choose the kernel of the network's attention and try it; else that is done when the network is built.

        Args:
            gradients: the network will be trained.

        Raises:
            UserError: the kernel that the settings name does not compute such tensors on the device.
        """
        params = self.config["network_config"]["params"]
        head_dim = params["hidden_size"] // params["num_attention_heads"]
        choice = choose_attention(self.settings.attention, self.device, self.dtype, head_dim, gradients)
        self.attention = choice
        return choice

    @property
    def network(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def is_15(self) -> bool:
        """Whether the network patches two latent frames at a time, as CogVideoX1.5 does."""
        return patch_sizes(self.config["network_config"]["params"]["patch_size"])[0] > 1

    def disable_untrainable_params(self) -> None:
        """Freeze what training leaves alone: `not_trainable_prefixes` and, with LoRA, all but the adapter.

        A prefix `all` means everything. The matrices of an adapter are trained whatever the prefixes.

        Raises:
            UserError: nothing is left to be trained.
        """
        self.network.disable_untrainable_params()
        prefixes = tuple("" if prefix == ALL else prefix for prefix in self.not_trainable_prefixes)
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes) and not is_adapter(name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                f"nothing is to be trained: model.not_trainable_prefixes is {list(self.not_trainable_prefixes)}, which "
                "leaves no parameter of the network; name fewer"
            )

    # Pixels and latents

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors on the engine's device."""
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def load_clip(self, frames: Tensor) -> Tensor:
        """Frames (b, frames, 3, height, width), uint8 or in [-1, 1], as the first stage takes them:
        (b, 3, frames, height, width) in [-1, 1], in the engine's dtype."""
        clip = rearrange(frames, "b t c h w -> b c t h w")
        return (clip.float() / 127.5 - 1 if clip.dtype == torch.uint8 else clip).to(self.dtype)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
        """Clips (b, 3, frames, height, width) in [-1, 1] to scaled latents (b, c, t, h, w).

        With `latent_input: True` the clips are latents already, (b, t, c, h, w), and are only scaled.
        """
        if self.latent_input:
            return rearrange(x, "b t c h w -> b c t h w") * self.scale_factor
        groups = self.groups(x)
        if len(groups) == 1:
            return self.scale_factor * self.first_stage_model.encode(x.to(self.dtype))
        if not hasattr(self.first_stage_model, "regularization"):  # a first stage without moments to draw from
            return self.scale_factor * torch.cat([self.first_stage_model.encode(g.to(self.dtype)) for g in groups])
        # The whole batch at once, so that the noise is the same however the batch is divided.
        regularize = getattr(self.first_stage_model, "regularize", self.first_stage_model.regularization)
        return self.scale_factor * regularize(self.encode_moments(x))[0]

    @torch.no_grad()
    def encode_moments(self, x: Tensor) -> Tensor:
        """Clips (b, 3, frames, height, width) in [-1, 1] to the moments (b, 2c, t, h, w) of their unscaled latents."""
        encode = self.first_stage_model.encode
        return torch.cat([encode(group.to(self.dtype), unregularized=True)[0] for group in self.groups(x)])

    @torch.no_grad()
    def encode_means(self, x: Tensor) -> Tensor:
        """Clips (b, 3, frames, height, width) in [-1, 1] to the means of their scaled latents (b, c, t, h, w): what a
        clip is sampled from, without a random number."""
        moments = self.encode_moments(x.to(self.device))
        if isinstance(self.regularizer, DiagonalGaussianRegularizer):
            return self.scale_factor * moments.chunk(2, dim=1)[0]
        return self.scale_factor * self.regularizer(moments)[0]  # it draws nothing

    def groups(self, x: Tensor) -> list[Tensor]:
        """Return the samples that the first stage takes at once: `en_and_decode_n_samples_a_time`, or all of them."""
        return list(x.split(self.samples_at_a_time or max(len(x), 1)))

    def sample_latent(self, moments: Tensor) -> Tensor:
        """Moments (b, 2c, t, h, w) to scaled latents (b, c, t, h, w), as `encode_first_stage` draws them."""
        return self.scale_factor * self.regularizer(moments.to(self.dtype))[0]

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (b, c, t, h, w) to clips (b, 3, frames, height, width); see `decode_stream` for long ones."""
        return torch.cat([torch.cat(list(self._decode_group(group)), dim=2) for group in self.groups(z)])

    @torch.no_grad()
    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Yield what `decode_first_stage` returns, chunk by chunk in time; at once for a class that has its own."""
        if type(self).decode_first_stage is not SATVideoDiffusionEngine.decode_first_stage:
            yield self.decode_first_stage(z)
            return
        for chunks in zip(*map(self._decode_group, self.groups(z)), strict=True):
            yield chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _decode_group(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the decoded chunks in time of samples that the first stage takes at once; one if it has no chunks."""
        z = (z / self.scale_factor).to(self.device, self.dtype)
        if not hasattr(self.first_stage_model, "decode_chunks"):
            return iter([self.first_stage_model.decode(z)])
        return self.first_stage_model.decode_chunks(z)

    def encode_condition_image(self, image: Tensor) -> Tensor:
        """First frame (b, 3, 1, height, width) to its latent (b, 1, c, h, w), scaled as the network learnt it."""
        return self.scale_condition(self.encode_first_stage(image))

    def scale_condition(self, latent: Tensor) -> Tensor:
        """Scaled latent (b, c, 1, h, w) of a first frame as the condition (b, 1, c, h, w).

        1.0 models saw the scaled latent, 1.5 models the plain one.
        """
        if self.is_15:
            latent = latent / self.scale_factor
        return rearrange(latent, "b c t h w -> b t c h w")

    def concat_condition(self, image_latent: Tensor, frames: int) -> Tensor:
        """Return the condition (b, frames, c, h, w) of a network that is told some frames.

        Args:
            image_latent: of the first frame (b, 1, c, h, w), after which zeros follow, or the model repeats it; or of
                all latent frames, as decoding counts them, with zeros for those that are not told.
        """
        if self.noised_image_all_concat:
            return image_latent.expand(-1, frames, -1, -1, -1)
        told = image_latent.shape[1]
        extra = frames - told if told > 1 else 0  # 1.5 models have a frame more, before the second
        condition = image_latent.new_zeros(image_latent.shape[0], frames, *image_latent.shape[2:])
        condition[:, :1] = image_latent[:, :1]
        condition[:, 1 + extra : told + extra] = image_latent[:, 1:]
        return condition

    def concat_key_frames(self, latents: Mapping[int, Tensor], frames: int) -> Tensor:
        """Return `concat_condition` of the latents of single pictures (b, 1, c, h, w) by the number of the latent frame
        that they stand in, as decoding counts.

        Raises:
            UserError: the model has no place for other frames than the first (`noised_image_all_concat`).
        """
        if latents.keys() == {0}:
            return self.concat_condition(latents[0], frames)
        self.check_key_frames()
        some = next(iter(latents.values()))
        placed = some.new_zeros(some.shape[0], frames - int(self.is_15), *some.shape[2:])
        for number, latent in latents.items():
            placed[:, number] = latent[:, 0]
        return self.concat_condition(placed, frames)

    def check_key_frames(self) -> None:
        """Check that the model has a place for other frames than the first, else raise UserError."""
        if not self.noised_image_input:
            raise UserError("keyframes: this is a text-to-video model; use an '_i2v' configuration")
        if self.noised_image_all_concat:
            raise UserError("keyframes: this model takes the first frame alone (noised_image_all_concat is on)")

    # Training

    @contextmanager
    def without_drops(self) -> Iterator[None]:
        """Drop no captions and images within the block, unless a call says so."""
        before, self.drops = self.drops, False
        try:
            yield
        finally:
            self.drops = before

    def validation_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `shared_step` returns without drops; a subclass may have the original's `shared_step(batch)`."""
        with self.without_drops():
            return self.shared_step(batch, **({"drop": False} if accepts(self.shared_step, "drop") else {}))

    def shared_step(self, batch: dict[str, Any], drop: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch.

        Random numbers are drawn in the order: noise level and noise of the first frame, encoding of the first frame,
        then, where `conditioning` tells other frames, which ones, their noise and their encoding; encoding of the clip,
        image dropout, then those of the loss.

        Args:
            batch: clips `mp4` (b, frames, 3, height, width), uint8 or in [-1, 1], and captions `txt`; or, encoded
                before, `moments` (b, 2c, t, h, w) and, for image-to-video, `image_moments` (b, 2c, 1, h, w), with
                `key_moments` (b, 2c, t - 1, h, w) where `conditioning` tells other frames than the first.
            drop: drop captions and images at random, as training does; None: unless in `without_drops`.
        """
        drop = self.drops if drop is None else drop
        batch = self.on_device(batch)
        with memory_guard("encoding clips"):
            image, latent = self.encode_batch(batch)
        # Contiguous, since noise drawn in its likeness follows the order in memory.
        latent = self.with_extra_frame(rearrange(latent, "b c t h w -> b t c h w").contiguous())
        if image is not None:
            condition = self.concat_condition(image, latent.shape[1])
            if drop:
                rate = self.noised_image_dropout
                keep = randomness.keep_whole_batch(len(latent), rate, purpose="image dropout", device=self.device)
                condition = condition * keep.to(condition.dtype)[:, None, None, None, None]
            batch = {**batch, "concat_images": condition}
        return self(latent, batch, **({"drop": drop} if accepts(self.forward, "drop") else {}))

    def encode_batch(self, batch: Mapping[str, Any], noise: bool = True) -> tuple[Tensor | None, Tensor]:
        """The condition image, if the model takes one, and the scaled latents (b, c, t, h, w).

        The image is the first frame (b, 1, c, h, w) with some noise, or without `noise` as it is; where the model's
        `conditioning` tells others too, it is (b, t, c, h, w) with zeros for those that are not told.
        """
        image = None
        if "moments" in batch:
            if self.noised_image_input:
                image = self.scale_condition(self.sample_latent(batch["image_moments"]))
                image = self._with_key_frames(image, batch["moments"].shape[2], noise, lambda _: batch["key_moments"])
            return image, self.sample_latent(batch["moments"])
        if self.latent_input:
            if self.noised_image_input:
                raise UserError("noised_image_input needs pixels to add noise to: set latent_input: False")
            return None, self.encode_first_stage(batch[self.input_key].to(self.dtype), batch)
        clip = self.load_clip(batch[self.input_key])
        if self.noised_image_input:
            first = clip[:, :, :1]
            image = self.encode_condition_image(noise_first_frame(first) if noise else first)
            frames = (clip.shape[2] - 1) // TIME_FACTOR + 1
            image = self._with_key_frames(image, frames, noise, lambda told: self.encode_key_frames(clip, told, noise))
        return image, self.encode_first_stage(clip, batch)

    def _with_key_frames(
        self, image: Tensor, frames: int, chance: bool, moments_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the latents of the frames that are told; the first alone where `conditioning` tells no others.

        Args:
            image: latent of the first frame (b, 1, c, h, w).
            chance: draw which are told.
            moments_of: gives the moments of the others (b, 2c, frames - 1, h, w), by which of them are told.
        """
        if self.key_frames is None or self.key_frames.first_alone:
            return image
        count = len(image)
        if chance:
            told = self.key_frames.draw(count, frames)
        else:
            told = self.key_frames.of_kind(self.key_frames.usual, frames).expand(count, -1)
        others = self.scale_condition(self.sample_latent(moments_of(told[:, 1:])))
        mask = told.to(image.device)[:, :, None, None, None]
        return torch.where(mask, torch.cat((image, others.to(image)), dim=1), 0.0)

    @torch.no_grad()
    def encode_key_frames(self, clip: Tensor, told: Tensor | None = None, noise: bool = True) -> Tensor:
        """Return the moments (b, 2c, t - 1, h, w) of single frames of clips (b, 3, frames, height, width): the last of
        each latent frame but the first, each encoded by itself.

        Args:
            told: bool (b, t - 1), those that are wanted, the others are zeros; None: all.
            noise: add that of training.
        """
        pictures = clip[:, :, TIME_FACTOR::TIME_FACTOR]
        pictures = noise_pictures(pictures, "key frame") if noise else pictures
        wanted = torch.ones(len(clip), pictures.shape[2], dtype=torch.bool) if told is None else told
        chosen = rearrange(pictures, "b c t h w -> b t c 1 h w")[wanted.to(clip.device)]
        height, width = (side // SPACE_FACTOR for side in clip.shape[-2:])
        channels = 2 * self.config["network_config"]["params"]["out_channels"]
        moments = clip.new_zeros(*wanted.shape, channels, 1, height, width)
        if len(chosen):
            moments[wanted.to(clip.device)] = self.encode_moments(chosen).to(moments)
        return rearrange(moments, "b t c 1 h w -> b c t h w")

    def forward(self, x: Tensor, batch: dict[str, Any], drop: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of latents (b, t, c, h, w): its mean, and the same by name for logging."""
        drop = self.drops if drop is None else drop
        ofs = self.default_ofs(len(x))
        network = self.model if ofs is None else partial(self.model, ofs=ofs)
        loss = self.loss_fn(network, self.denoiser, partial(self.conditioner, drop=drop), x, batch).mean()
        return loss, {"loss": loss}

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        cond: dict[str, Tensor],
        uc: dict[str, Tensor] | None = None,
        batch_size: int = 1,
        shape: tuple[int, ...] | None = None,
        concat_images: Tensor | None = None,
        ofs: Tensor | None = None,
        num_steps: int | None = None,
        callback: Callable[..., None] | None = None,
        check_finite: bool = False,
        prefix: Tensor | None = None,
        start: Start | None = None,
        sampler: Any = None,
    ) -> Tensor:
        """Draw latents.

        Args:
            cond, uc: conditional and unconditional embeddings, as the conditioner gives them.
            batch_size, shape: the latents are (batch_size, *shape) with shape (t, c, h, w).
            concat_images: image condition (batch_size, t, c, h, w); guidance leaves it in place.
            ofs: (batch_size,), for 1.5 image-to-video.
            num_steps: number of steps, if not the sampler's own.
            callback: called as `callback(steps done, steps)`, by samplers that take one; see `Sampler.__call__`.
            check_finite: end at the first output of the network that is not finite.
            prefix: clean latents (batch_size, fewer than t, c, h, w) in front, from which the rest goes on.
            start: a clip to start from, and a prefix where `prefix` gives none.
            sampler: in place of the configured one.

        Returns:
            Scaled latents (batch_size, t, c, h, w), float32. The initial noise comes from the CPU generator, so that
            a seed means the same on every device.
        """
        if shape is None:
            raise TypeError("sample() needs the shape of the latents, (t, c, h, w)")
        start = NOISE if start is None else start
        if prefix is not None:
            start = replace(start, prefix=prefix)
        start = self._agreed_start(start, (batch_size, *shape))
        own = self.sampler if sampler is None else sampler
        noise = self.video_groups.agreed(torch.randn(batch_size, *shape, dtype=torch.float32).to(self.device))
        noise = start.with_prefix(noise)  # where samplers of the original look for it
        if concat_images is not None:
            cond = {**cond, "concat": concat_images}
            uc = uc and {**uc, "concat": concat_images}

        def draw(network: Callable[..., Tensor], sampler: Any, noise: Tensor, **keywords: Any) -> Tensor:
            if self.settings.guidance_batch == 1:
                network = in_parts(network, batch_size)

            def denoise(x: Tensor, level: Tensor, c: dict[str, Tensor], **model_inputs: Any) -> Tensor:
                x = self.video_groups.agreed(x)
                denoised = self.denoiser(network, x, level, c, **{**untaken, **model_inputs})
                # Of processes that share the work all must stop at the same place, where all have the same.
                self._check_finite(x if self.video_groups.splits_work else denoised, check_finite)
                return denoised

            return sampler(denoise, noise, cond, uc=uc, num_steps=num_steps, **keywords)

        progress = SamplingProgress()

        def count(done: int, steps: int, denoised: Tensor | None = None) -> None:
            progress.step, progress.steps = done, steps
            if callback is not None:
                callback(done, steps, **({} if denoised is None or not shows else {"denoised": denoised}))

        shows = callback is not None and accepts(callback, "denoised")
        keywords = {"ofs": ofs, "callback": count, "start": start}
        if start.clip is not None and not accepts(own, "start"):
            raise UserError(f"video: {type(own).__name__} takes no `start`; use one of this package's samplers")
        taken: dict[str, Any] = {name: value for name, value in keywords.items() if accepts(own, name)}
        untaken = {} if ofs is None or "ofs" in taken else {"ofs": ofs}
        if "callback" in taken:
            steps = num_steps or getattr(own, "num_steps", None)
            progress.step, progress.steps = 0, steps and start.steps(steps)
        # A network or a wrapper of the user's own may be without one.
        inner = getattr(self.model, "diffusion_model", None)
        runner, table = getattr(inner, "layer_runner", None), getattr(inner, "modulation_table", None)
        if table is not None and isinstance(own, Sampler):  # one of the user's own may do more than sample
            told = {name: value for name, value in taken.items() if name != "callback"}
            smallest = noise.new_zeros(batch_size, *[1] * len(shape))
            told["start"] = replace(start, clip=None if start.clip is None else smallest, prefix=None)
            levels = self._levels_of(partial(draw, noise=smallest, **told), own)
            table.fill(self.network.embed_condition(*level) for level in levels)
        with nullcontext() if runner is None else runner.during(progress):
            latents = self.video_groups.agreed(draw(self.model, own, noise, **taken))
        self._check_finite(latents, check_finite and self.video_groups.splits_work)
        return latents

    def _agreed_start(self, start: Start, shape: tuple[int, ...]) -> Start:
        """Return what sampling starts from, on the engine's device, the same in all processes that share the work."""
        clip, prefix = start.clip, start.prefix
        if clip is not None and clip.shape != shape:
            raise UserError(f"video: latents of shape {tuple(clip.shape)} do not fit into {shape}")
        if prefix is not None and not (
            prefix.shape[1] < shape[1] and prefix.shape == (shape[0], prefix.shape[1], *shape[2:])
        ):
            raise UserError(f"prefix: latents of shape {tuple(prefix.shape)} are not the first frames of {shape}")
        agreed = self.video_groups.agreed
        on_device = [None if x is None else agreed(x.float().to(self.device)) for x in (clip, prefix)]
        return replace(start, clip=on_device[0], prefix=on_device[1])

    def _check_finite(self, x: Tensor, wanted: bool) -> None:
        if wanted and not torch.isfinite(x).all():
            raise UserError(f"the network's output is not finite: {other_precision(self.dtype)}")

    def _levels_of(self, draw: Callable[..., Tensor], sampler: Any) -> list[AskedLevel]:
        """Return the levels that the network is asked for by `draw(network, sampler)`, whose random numbers do not
        count."""
        notes, sampler = LevelNotes(), copy.copy(sampler)
        hide_bar(sampler)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            draw(notes, sampler)
        return notes.levels

    @torch.no_grad()
    def log_video(
        self,
        batch: dict[str, Any],
        N: int = 4,
        only_log_video_latents: bool = False,
        reconstruct: bool = True,
        **sample_arguments: Any,
    ) -> dict[str, Any]:
        """What a trainer shows of a batch: `inputs`, `reconstructions` and `samples` of its first N clips and captions.

        Clips are (n, frames, 3, height, width) in [-1, 1]; with `only_log_video_latents` the samples are `latents`
        (n, t, c, h, w) instead, and the first stage decodes nothing. Without `reconstruct` there are only samples. Of
        a batch that was encoded before there are no `inputs`; a first stage that is not there is built for the time
        of the call.
        """
        batch = {key: value[:N] if isinstance(value, Tensor | list) else value for key, value in batch.items()}
        batch = self.on_device(batch)
        texts = [key for embedder in self.conditioner.embedders for key in embedder.input_keys]
        cond, uc = self.conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=texts)
        image, latent = self.encode_batch(batch, noise=False)
        count, channels, frames, *size = latent.shape
        shape = (frames + int(self.is_15), channels, *size)
        concat_images = None if image is None else self.concat_condition(image, shape[0])
        samples = self.sample(
            cond, uc, count, shape, concat_images=concat_images, ofs=self.default_ofs(count), **sample_arguments
        )
        samples = self.drop_extra_frame(samples)

        log: dict[str, Any] = {key: batch[key] for key in self.log_keys if key in batch}
        if only_log_video_latents:
            return log | {"latents": samples}
        if reconstruct and self.input_key in batch and not self.latent_input:
            log["inputs"] = rearrange(self.load_clip(batch[self.input_key]), "b c t h w -> b t c h w")
        borrowed = self.first_stage_model is None
        self.build("first_stage_model")
        if reconstruct:
            log["reconstructions"] = rearrange(self.decode_first_stage(latent), "b c t h w -> b t c h w")
        decoded = self.decode_first_stage(rearrange(samples, "b t c h w -> b c t h w"))
        if borrowed:
            self.release("first_stage_model")
        return log | {"samples": rearrange(decoded, "b c t h w -> b t c h w")}

    def default_ofs(self, batch_size: int) -> Tensor | None:
        """`ofs` for networks that take it, the 1.5 image-to-video ones: always 2.0."""
        if self.config["network_config"]["params"].get("ofs_embed_dim") is None:
            return None
        return torch.full((batch_size,), 2.0, device=self.device)

    def with_extra_frame(self, latents: Tensor) -> Tensor:
        """Latents (b, t, c, h, w) with the first twice for 1.5 networks, which need an even number."""
        return torch.cat((latents[:, :1], latents), dim=1) if self.is_15 else latents

    def drop_extra_frame(self, latents: Tensor) -> Tensor:
        """Latents (b, t, c, h, w) without the leading frame that 1.5 networks need to make their number even."""
        return latents[:, 1:] if self.is_15 else latents


def samples_at_a_time(value: Any) -> int | None:
    """Return `en_and_decode_n_samples_a_time` of the `model:` section: a whole number from 1, or None for all.

    Raises:
        UserError: the value is something else.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(
            f"model.en_and_decode_n_samples_a_time: {value!r} does not fit; give a whole number from 1, or leave it out"
        )
    return value


def noise_first_frame(image: Tensor) -> Tensor:
    """Return first frames (b, 3, 1, height, width) with the noise of training; see `noise_pictures`."""
    return noise_pictures(image)


def other_precision(dtype: torch.dtype) -> str:
    """Return what to do about values that are not finite in `dtype`."""
    if dtype == torch.float16:
        return "fp16 is too narrow for this model, use bf16 (--bf16)"
    files = "check the weights and the adapter: they may be damaged, another model's, or converted to fp16 (use bf16)"
    return f"use float32 (--no-bf16), or {files}" if dtype == torch.bfloat16 else files


def set_lora_scale(network: nn.Module, scale: float) -> None:
    """Multiply the contribution of every LoRA layer by `scale`; 0 leaves the base model."""
    for module in network.modules():
        if hasattr(module, "matrix_A"):
            module.scaling = scale * module.lora_alpha / module.r

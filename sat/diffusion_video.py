"""The engine: conditioner, first stage, network, and the code that connects them."""

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
AUTO = "auto"  # value of `compile_model`
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
    """Video latent diffusion, with the names that configurations, training and sampling use.

    The attributes `conditioner` (text to embeddings), `first_stage_model` (pixels to latents) and `model` (the network
    in its wrapper) are built on request, so that a program can hold one of them at a time.

    Attributes:
        settings: the settings from which the engine is built; `args` is the argument as given, for subclasses that read
            more.

    Args:
        args: `EngineSettings`, or an object with such attributes (at least `model_config`), as in the original.
        parts: those of `PARTS` that are built now.
        device: device of the parts.
        params_dtype: dtype of all parts, under the name of SwissArmyTransformer's `get_model`; None: the dtype in
            `args`.
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
        self.drops = True  # default of `drop`: whether captions and images are dropped at random
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
        self.compiled = False  # whether the network is compiled with torch.compile
        self.text_blocks_as_stored = False  # see `FrozenT5Embedder`; for callers that stream its blocks
        self.video_groups = ALONE
        self.prepare_network: Callable[[nn.Module], None] | None = (
            None  # called with the network after its weights are loaded
        )

        with self.section():
            self.denoiser = instantiate_from_config(config["denoiser_config"])
            self.sampler: Any = self._optional("sampler_config")
            self.loss_fn: Any = self._optional("loss_fn_config")
            # The regularizer of the first stage, for precomputed latents.
            self.regularizer = instantiate_from_config(config["first_stage_config"]["params"]["regularizer_config"])
        for part in PARTS:
            setattr(self, part, None)
        for part in parts:
            self.build(part)

    def section(self) -> AbstractContextManager[None]:
        """Return a context for building objects of this configuration; errors name its files."""
        return section("model", self.config, self.settings.sources)

    def _optional(self, key: str) -> Any:
        """Return the object that the configuration describes at a key; None if the key is missing."""
        return instantiate_from_config(self.config[key]) if self.config.get(key) else None

    def share_videos(self, groups: VideoGroups) -> None:
        """Make each video together with other processes, which all call this, too.

        Call this before parts are built.

        Raises:
            UserError: the sampler has no guider whose halves can be divided between processes.
        """
        self.video_groups = groups
        self.shared_sampler(self.sampler)

    def shared_sampler(self, sampler: Any) -> Any:
        """Return a sampler whose guider's halves are divided as `share_videos` says.

        Raises:
            UserError: the sampler has no guider whose halves can be divided between processes.
        """
        if (group := self.video_groups.guidance) is not None:
            if not hasattr(sampler, "guider"):
                raise UserError(
                    f"guidance_parallel: {type(sampler).__name__} has no `guider`; leave out guidance_parallel, and "
                    "let all processes share the sequence"
                )
            sampler.guider = GuidanceParallel(sampler.guider, group)
        return sampler

    # Parts

    def build(self, part: str, device: torch.device | str | None = None) -> nn.Module:
        """Build one of `PARTS` with its weights, in the engine's dtype, unless it is built.

        Args:
            device: device of the part; None: the device of the engine.
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
        """Drop a part and free its memory."""
        setattr(self, part, None)
        gc.collect()  # SwissArmyTransformer's hooks form reference cycles, which reference counting does not free
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        # The dtype is passed to the text encoder, which keeps some layers in float32 when it runs in float16, and reads
        # weights from its file one by one. Casting later would lose both.
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
        if self.loss_fn is not None:  # building the network has set up the process groups
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
            engine = weakref.ref(self)  # weak, because the engine refers to the network
            network.compiler_failed = lambda: setattr(engine(), "compiled", False)
            logger.info("compile_model: the network is compiled when it first runs")
        return wrapper(network, compile_model=self.compiled, dtype=self.dtype)

    def _compiles(self, network: nn.Module) -> bool:
        """Return whether the network is compiled, as `compile_model` says.

        With `auto`, it is compiled where that is faster: on a GPU, if the network's layers can be compiled. If no
        compiler is available, the network is not compiled, and a warning is logged.
        """
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
        """Choose the network's attention kernel and test it.

        If this is not called, the kernel is chosen when the network is built.

        Args:
            gradients: whether the network will be trained.

        Raises:
            UserError: the configured kernel does not support such tensors on the device.
        """
        params = self.config["network_config"]["params"]
        head_dim = params["hidden_size"] // params["num_attention_heads"]
        choice = choose_attention(self.settings.attention, self.device, self.dtype, head_dim, gradients)
        self.attention = choice
        return choice

    @property
    def network(self) -> nn.Module:
        """Return the network without its wrapper."""
        return self.model.diffusion_model

    @property
    def is_15(self) -> bool:
        """Return whether the network patches two latent frames at a time, as CogVideoX1.5 does."""
        return patch_sizes(self.config["network_config"]["params"]["patch_size"])[0] > 1

    def disable_untrainable_params(self) -> None:
        """Freeze `not_trainable_prefixes` and, with LoRA, everything but the adapter.

        A prefix `all` means everything. The matrices of an adapter are trained whatever the prefixes are.

        Raises:
            UserError: no parameter is left for training.
        """
        self.network.disable_untrainable_params()
        prefixes = tuple("" if prefix == ALL else prefix for prefix in self.not_trainable_prefixes)
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes) and not is_adapter(name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                f"model.not_trainable_prefixes is {list(self.not_trainable_prefixes)}, so that nothing is to be "
                "trained; name fewer prefixes"
            )

    # Pixels and latents

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with its tensors on the engine's device."""
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def load_clip(self, frames: Tensor) -> Tensor:
        """Return frames as the first stage takes them, in the engine's dtype.

        Args:
            frames: (b, frames, 3, height, width), uint8 or in [-1, 1].

        Returns:
            (b, 3, frames, height, width) in [-1, 1].
        """
        clip = rearrange(frames, "b t c h w -> b c t h w")
        return (clip.float() / 127.5 - 1 if clip.dtype == torch.uint8 else clip).to(self.dtype)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
        """Return the scaled latents (b, c, t, h, w) of clips.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1]. With `latent_input: True` they are latents (b, t, c, h,
                w), which are only scaled.
        """
        if self.latent_input:
            return rearrange(x, "b t c h w -> b c t h w") * self.scale_factor
        groups = self.groups(x)
        if len(groups) == 1:
            return self.scale_factor * self.first_stage_model.encode(x.to(self.dtype))
        if not hasattr(self.first_stage_model, "regularization"):  # this first stage has no moments to draw from
            return self.scale_factor * torch.cat([self.first_stage_model.encode(g.to(self.dtype)) for g in groups])
        # Noise is drawn for the whole batch, so that it does not depend on how the batch is divided.
        regularize = getattr(self.first_stage_model, "regularize", self.first_stage_model.regularization)
        return self.scale_factor * regularize(self.encode_moments(x))[0]

    @torch.no_grad()
    def encode_moments(self, x: Tensor) -> Tensor:
        """Return the moments (b, 2c, t, h, w) of the unscaled latents of clips.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1].
        """
        encode = self.first_stage_model.encode
        return torch.cat([encode(group.to(self.dtype), unregularized=True)[0] for group in self.groups(x)])

    @torch.no_grad()
    def encode_means(self, x: Tensor) -> Tensor:
        """Return the means of the scaled latents (b, c, t, h, w) of clips.

        Sampling starts from these latents when it starts from a clip. They take no random numbers.

        Args:
            x: clips (b, 3, frames, height, width) in [-1, 1].
        """
        moments = self.encode_moments(x.to(self.device))
        if isinstance(self.regularizer, DiagonalGaussianRegularizer):
            return self.scale_factor * moments.chunk(2, dim=1)[0]
        return self.scale_factor * self.regularizer(moments)[0]  # it draws nothing

    def groups(self, x: Tensor) -> list[Tensor]:
        """Return the batch in parts that the first stage takes at a time.

        Each part has `en_and_decode_n_samples_a_time` samples; without this setting, there is one part.
        """
        return list(x.split(self.samples_at_a_time or max(len(x), 1)))

    def sample_latent(self, moments: Tensor) -> Tensor:
        """Return scaled latents (b, c, t, h, w), drawn from moments (b, 2c, t, h, w)."""
        return self.scale_factor * self.regularizer(moments.to(self.dtype))[0]

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return the clips (b, 3, frames, height, width) of scaled latents (b, c, t, h, w).

        See `decode_stream` for long clips.
        """
        return torch.cat([torch.cat(list(self._decode_group(group)), dim=2) for group in self.groups(z)])

    @torch.no_grad()
    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the result of `decode_first_stage` in chunks of time.

        For a subclass with its own `decode_first_stage`, there is one chunk.
        """
        if type(self).decode_first_stage is not SATVideoDiffusionEngine.decode_first_stage:
            yield self.decode_first_stage(z)
            return
        for chunks in zip(*map(self._decode_group, self.groups(z)), strict=True):
            yield chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def _decode_group(self, z: Tensor) -> Iterator[Tensor]:
        """Return an iterator over the decoded chunks of samples that are decoded together.

        If the first stage has no chunks, there is one.
        """
        z = (z / self.scale_factor).to(self.device, self.dtype)
        if not hasattr(self.first_stage_model, "decode_chunks"):
            return iter([self.first_stage_model.decode(z)])
        return self.first_stage_model.decode_chunks(z)

    def encode_condition_image(self, image: Tensor) -> Tensor:
        """Return the condition latent (b, 1, c, h, w) of first frames (b, 3, 1, height, width).

        It is scaled as the network was trained.
        """
        return self.scale_condition(self.encode_first_stage(image))

    def scale_condition(self, latent: Tensor) -> Tensor:
        """Return the condition (b, 1, c, h, w) of a first frame's scaled latent (b, c, 1, h, w).

        1.0 models take the scaled latent, 1.5 models the unscaled one.
        """
        if self.is_15:
            latent = latent / self.scale_factor
        return rearrange(latent, "b c t h w -> b t c h w")

    def concat_condition(self, image_latent: Tensor, frames: int) -> Tensor:
        """Return the condition (b, frames, c, h, w) of a network that is given some frames.

        Args:
            image_latent: latent of the first frame (b, 1, c, h, w), which is followed by zeros, or repeated by models
                that do so; or of all latent frames, counted as in decoding, with zeros for frames that are not given.
        """
        if self.noised_image_all_concat:
            return image_latent.expand(-1, frames, -1, -1, -1)
        told = image_latent.shape[1]
        extra = frames - told if told > 1 else 0  # 1.5 models have one frame more, before the second frame
        condition = image_latent.new_zeros(image_latent.shape[0], frames, *image_latent.shape[2:])
        condition[:, :1] = image_latent[:, :1]
        condition[:, 1 + extra : told + extra] = image_latent[:, 1:]
        return condition

    def concat_key_frames(self, latents: Mapping[int, Tensor], frames: int) -> Tensor:
        """Return `concat_condition` for the latents of single pictures.

        Args:
            latents: latents (b, 1, c, h, w) by the number of the latent frame of each, counted as in decoding.

        Raises:
            UserError: the model takes only the first frame (`noised_image_all_concat`).
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
        """Check that the model takes other frames than the first, else raise UserError."""
        if not self.noised_image_input:
            raise UserError("keyframes: this is a text-to-video model; use an '_i2v' configuration")
        if self.noised_image_all_concat:
            raise UserError("keyframes: this model takes only the first frame (noised_image_all_concat is on)")

    # Training

    @contextmanager
    def without_drops(self) -> Iterator[None]:
        """Drop no captions and images within the block, unless a call asks for it."""
        before, self.drops = self.drops, False
        try:
            yield
        finally:
            self.drops = before

    def validation_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result of `shared_step` without drops.

        A subclass may have the original's `shared_step(batch)`, without `drop`.
        """
        with self.without_drops():
            return self.shared_step(batch, **({"drop": False} if accepts(self.shared_step, "drop") else {}))

    def shared_step(self, batch: dict[str, Any], drop: bool | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and the same by name for logging.

        Random numbers are drawn in this order: noise level and noise of the first frame; encoding of the first frame;
        if `conditioning` gives other frames: which ones, their noise and their encoding; encoding of the clip; image
        dropout; then those of the loss.

        Args:
            batch: clips `mp4` (b, frames, 3, height, width), uint8 or in [-1, 1], and captions `txt`. Precomputed:
                `moments` (b, 2c, t, h, w) and, for image-to-video, `image_moments` (b, 2c, 1, h, w), with `key_moments`
                (b, 2c, t - 1, h, w) if `conditioning` gives other frames than the first.
            drop: drop captions and images at random, as in training; None: yes, except in `without_drops`.
        """
        drop = self.drops if drop is None else drop
        batch = self.on_device(batch)
        with memory_guard("encoding clips"):
            image, latent = self.encode_batch(batch)
        # Contiguous, because `randn_like` draws noise in the order of memory.
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
        """Return the condition image, if the model takes one, and the scaled latents.

        The latents have the shape (b, c, t, h, w). The image is the first frame (b, 1, c, h, w); if the model's
        `conditioning` gives other frames too, it is (b, t, c, h, w), with zeros for frames that are not given.

        Args:
            noise: add the noise of training to the frames.
        """
        image = None
        if "moments" in batch:
            if self.noised_image_input:
                image = self.scale_condition(self.sample_latent(batch["image_moments"]))
                image = self._with_key_frames(image, batch["moments"].shape[2], noise, lambda _: batch["key_moments"])
            return image, self.sample_latent(batch["moments"])
        if self.latent_input:
            if self.noised_image_input:
                raise UserError("noised_image_input adds noise to pixels; set latent_input: False")
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
        """Return the latents of the given frames; the first one alone without `conditioning`.

        Args:
            image: latent of the first frame (b, 1, c, h, w).
            frames: number of latent frames.
            chance: draw at random which frames are given.
            moments_of: returns the moments of the other frames (b, 2c, frames - 1, h, w), for a mask of those that are
                given.
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
        """Return the moments (b, 2c, t - 1, h, w) of single frames of clips.

        The frames are the last frame of each latent frame, except the first; each is encoded separately.

        Args:
            clip: (b, 3, frames, height, width).
            told: bool (b, t - 1), the wanted frames; the moments of others are zeros. None: all.
            noise: add the noise of training.
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
        """Return the mean loss of latents (b, t, c, h, w), and the same by name for logging."""
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
        """Return sampled latents.

        Args:
            cond, uc: conditional and unconditional embeddings, as the conditioner returns them.
            batch_size, shape: the latents have the shape (batch_size, *shape), with shape (t, c, h, w).
            concat_images: image condition (batch_size, t, c, h, w), which guidance does not change.
            ofs: (batch_size,), for 1.5 image-to-video.
            num_steps: number of steps; None: the sampler's own number.
            callback: called as `callback(steps done, steps)` by samplers that support it; see `Sampler.__call__`.
            check_finite: raise UserError at the first output of the network that is not finite.
            prefix: clean latents (batch_size, fewer than t, c, h, w) with which the video begins and which the rest
                continues.
            start: a clip to start from, and a prefix if `prefix` is None.
            sampler: sampler to use in place of the configured one.

        Returns:
            Scaled latents (batch_size, t, c, h, w), float32. The initial noise comes from the CPU generator, so that a
            seed has the same meaning on every device.
        """
        if shape is None:
            raise TypeError("sample() needs the shape of the latents, (t, c, h, w)")
        start = NOISE if start is None else start
        if prefix is not None:
            start = replace(start, prefix=prefix)
        start = self._agreed_start(start, (batch_size, *shape))
        own = self.sampler if sampler is None else sampler
        noise = self.video_groups.agreed(torch.randn(batch_size, *shape, dtype=torch.float32).to(self.device))
        noise = start.with_prefix(noise)  # samplers of the original expect it there
        if concat_images is not None:
            cond = {**cond, "concat": concat_images}
            uc = uc and {**uc, "concat": concat_images}

        def draw(network: Callable[..., Tensor], sampler: Any, noise: Tensor, **keywords: Any) -> Tensor:
            if self.settings.guidance_batch == 1:
                network = in_parts(network, batch_size)

            def denoise(x: Tensor, level: Tensor, c: dict[str, Tensor], **model_inputs: Any) -> Tensor:
                x = self.video_groups.agreed(x)
                denoised = self.denoiser(network, x, level, c, **{**untaken, **model_inputs})
                # Processes that share the work must all stop at the same place, where all of them have the same values.
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
        # A user's own network or wrapper may lack these attributes.
        inner = getattr(self.model, "diffusion_model", None)
        runner, table = getattr(inner, "layer_runner", None), getattr(inner, "modulation_table", None)
        if table is not None and isinstance(own, Sampler):  # a user's own sampler may have side effects
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
        """Return the start of sampling on the engine's device, equal in all sharing processes."""
        clip, prefix = start.clip, start.prefix
        if clip is not None and clip.shape != shape:
            raise UserError(f"video: latents of shape {tuple(clip.shape)} do not fit into {shape}")
        if prefix is not None and not (
            prefix.shape[1] < shape[1] and prefix.shape == (shape[0], prefix.shape[1], *shape[2:])
        ):
            raise UserError(f"prefix: latents of shape {tuple(prefix.shape)} cannot be the first frames of {shape}")
        agreed = self.video_groups.agreed
        on_device = [None if x is None else agreed(x.float().to(self.device)) for x in (clip, prefix)]
        return replace(start, clip=on_device[0], prefix=on_device[1])

    def _check_finite(self, x: Tensor, wanted: bool) -> None:
        if wanted and not torch.isfinite(x).all():
            raise UserError(f"the network's output is not finite: {other_precision(self.dtype)}")

    def _levels_of(self, draw: Callable[..., Tensor], sampler: Any) -> list[AskedLevel]:
        """Return the noise levels that `draw(network, sampler)` asks the network for.

        The random state is restored afterwards.
        """
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
        """Return what a trainer shows of a batch, for its first N clips and captions.

        The result has `inputs`, `reconstructions` and `samples`, clips (n, frames, 3, height, width) in [-1, 1]. With
        `only_log_video_latents`, it has `latents` (n, t, c, h, w) in place of samples, and the first stage decodes
        nothing. Without `reconstruct`, it has only samples. For a precomputed batch, it has no `inputs`. If the first
        stage is not built, it is built for this call.
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
        """Return `ofs` for networks that take it (1.5 image-to-video): always 2.0."""
        if self.config["network_config"]["params"].get("ofs_embed_dim") is None:
            return None
        return torch.full((batch_size,), 2.0, device=self.device)

    def with_extra_frame(self, latents: Tensor) -> Tensor:
        """Return latents (b, t, c, h, w), with the first frame repeated for 1.5 networks.

        These networks need an even number of frames.
        """
        return torch.cat((latents[:, :1], latents), dim=1) if self.is_15 else latents

    def drop_extra_frame(self, latents: Tensor) -> Tensor:
        """Return latents (b, t, c, h, w) without the leading frame that 1.5 networks add."""
        return latents[:, 1:] if self.is_15 else latents


def samples_at_a_time(value: Any) -> int | None:
    """Return `en_and_decode_n_samples_a_time` of the `model:` section; None means all.

    Raises:
        UserError: the value is not a whole number from 1.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(
            f"model.en_and_decode_n_samples_a_time: {value!r} does not fit; give a whole number from 1, or leave it out"
        )
    return value


def noise_first_frame(image: Tensor) -> Tensor:
    """Return first frames (b, 3, 1, height, width) with training noise; see `noise_pictures`."""
    return noise_pictures(image)


def other_precision(dtype: torch.dtype) -> str:
    """Return advice for values that are not finite in `dtype`."""
    if dtype == torch.float16:
        return "fp16 is too narrow for this model, use bf16 (--bf16)"
    files = "check the weights and the adapter: they may be damaged, another model's, or converted to fp16 (use bf16)"
    return f"use float32 (--no-bf16), or {files}" if dtype == torch.bfloat16 else files


def set_lora_scale(network: nn.Module, scale: float) -> None:
    """Multiply the contribution of every LoRA layer by `scale`; 0 gives the base model."""
    for module in network.modules():
        if hasattr(module, "matrix_A"):
            module.scaling = scale * module.lora_alpha / module.r

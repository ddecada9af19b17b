"""The engine: its parts, a training step, a run of sampling."""

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

from cogvideox_sat.configuration.model_section import ALL, not_trainable_prefixes, plain_model_section
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.engine.compilation_choice import choose_compilation
from cogvideox_sat.engine.frame_conditioner import FrameConditioner
from cogvideox_sat.engine.parts import (
    PART_NAMES,
    PARTS,
    build_conditioner,
    build_first_stage,
    build_network,
    network_wrapper,
    share_tokens,
)
from cogvideox_sat.engine.precision import check_finite_output, dtype_of
from cogvideox_sat.engine.sampler_run import SamplerRun, agreed_start
from cogvideox_sat.latent_geometry import TIME_FACTOR
from cogvideox_sat.network.attention_choice import AttentionChoice, choose_attention
from cogvideox_sat.parallel.process_groups import parallel_groups
from cogvideox_sat.parallel.video_groups import ALONE, VideoGroups
from cogvideox_sat.weights.checkpoint_files import is_adapter
from sgm import randomness
from sgm.config_places import section
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.modules.diffusionmodules.guidance_parallel import GuidanceParallel
from sgm.modules.diffusionmodules.key_frames import noise_pictures
from sgm.modules.diffusionmodules.sampling import Sampler
from sgm.modules.diffusionmodules.sampling_start import NOISE, Start
from sgm.signatures import accepts
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)


class SATVideoDiffusionEngine(FrameConditioner):
    """Video latent diffusion, with the names that configurations, training and sampling use.

    The attributes `conditioner` (text to embeddings), `first_stage_model` (pixels to latents) and `model` (the network
    in its wrapper) are built on request, so that a program can hold one of them at a time. Methods that
    encode and decode are in `LatentCoder`, those for given frames in `FrameConditioner`.

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
        settings = EngineSettings.from_args(args)
        config = plain_model_section(settings.model_config)
        dtype = params_dtype or dtype_of(settings)
        with section("model", config, settings.sources):
            regularizer = instantiate_from_config(config["first_stage_config"]["params"]["regularizer_config"])
        super().__init__(config, regularizer, dtype, device)
        self.args, self.settings = args, settings
        self.log_keys = config.get("log_keys") or ["txt"]
        self.input_key = config.get("input_key", "mp4")
        self.noised_image_dropout = config.get("noised_image_dropout", 0.0)
        self.not_trainable_prefixes = not_trainable_prefixes(config)
        self.drops = True  # default of `drop`: whether captions and images are dropped at random
        self.attention: AttentionChoice | None = None
        self.compiled = False  # whether the network is compiled with torch.compile
        self.text_blocks_as_stored = False  # see `FrozenT5Embedder`; for callers that stream its blocks
        self.video_groups = ALONE
        # Called with the network after its weights are loaded.
        self.prepare_network: Callable[[nn.Module], None] | None = None

        with self.section():
            self.denoiser = instantiate_from_config(config["denoiser_config"])
            self.sampler: Any = self._optional("sampler_config")
            self.loss_fn: Any = self._optional("loss_fn_config")
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
        """Return the conditioner; a subclass may build another one."""
        return build_conditioner(
            self.config["conditioner_config"], device, self.dtype, blocks_as_stored=self.text_blocks_as_stored
        )

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        """Return the first stage; a subclass may build another one."""
        return build_first_stage(
            self.config["first_stage_config"], self.settings, device, self.dtype, self.video_groups
        )

    def _build_network(self, device: torch.device | str) -> nn.Module:
        """Return the network in its wrapper; a subclass may build another one."""
        network = build_network(self.config["network_config"], self.settings, device, self.dtype)
        groups = self.video_groups
        if self.loss_fn is not None:  # building the network has set up the process groups
            shared = (groups.group, groups.peers) if groups.splits_work else parallel_groups()
            self.loss_fn.set_parallel_groups(*shared)
        if self.prepare_network is not None:
            self.prepare_network(network)
        if hasattr(network, "use_attention"):
            network.use_attention(self.attention or self.choose_attention())
        if groups.sequence is not None:
            share_tokens(network, groups.sequence)
        wrapper = network_wrapper(self.config, self.settings.sources)
        self.compiled = choose_compilation(self.config.get("compile_model"), network, self.device)
        if self.compiled:
            engine = weakref.ref(self)  # weak, because the engine refers to the network
            network.compiler_failed = lambda: setattr(engine(), "compiled", False)
            logger.info("compile_model: the network is compiled when it first runs")
        return wrapper(network, compile_model=self.compiled, dtype=self.dtype)

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

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with its tensors on the engine's device."""
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

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
                image = self.with_key_frames(image, batch["moments"].shape[2], noise, lambda _: batch["key_moments"])
            return image, self.sample_latent(batch["moments"])
        if self.latent_input:
            if self.noised_image_input:
                raise UserError("noised_image_input adds noise to pixels; set latent_input: False")
            return None, self.encode_first_stage(batch[self.input_key].to(self.dtype), batch)
        clip = self.load_clip(batch[self.input_key])
        if self.noised_image_input:
            first = clip[:, :, :1]
            image = self.encode_condition_image(noise_pictures(first) if noise else first)
            frames = (clip.shape[2] - 1) // TIME_FACTOR + 1
            image = self.with_key_frames(image, frames, noise, lambda told: self.encode_key_frames(clip, told, noise))
        return image, self.encode_first_stage(clip, batch)

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
        start = agreed_start(start, (batch_size, *shape), self.device, self.video_groups)
        noise = torch.randn(batch_size, *shape, dtype=torch.float32).to(self.device)
        noise = start.with_prefix(self.video_groups.agreed(noise))  # samplers of the original expect it there
        if concat_images is not None:
            cond = {**cond, "concat": concat_images}
            uc = uc and {**uc, "concat": concat_images}
        run = SamplerRun(
            self.sampler if sampler is None else sampler,
            self.denoiser,
            self.video_groups,
            cond=cond,
            uc=uc,
            start=start,
            num_steps=num_steps,
            ofs=ofs,
            callback=callback,
            batch=batch_size if self.settings.guidance_batch == 1 else None,
            check=partial(check_finite_output, dtype=self.dtype) if check_finite else None,
        )
        # A user's own network or wrapper may lack these attributes.
        network = getattr(self.model, "diffusion_model", None)
        runner, table = getattr(network, "layer_runner", None), getattr(network, "modulation_table", None)
        if table is not None and isinstance(run.sampler, Sampler):  # a user's own sampler may have side effects
            table.fill(self.network.embed_condition(*level) for level in run.asked_levels(noise))
        with nullcontext() if runner is None else runner.during(run.progress):
            return run(self.model, noise)

    def default_ofs(self, batch_size: int) -> Tensor | None:
        """Return `ofs` for networks that take it (1.5 image-to-video): always 2.0."""
        if self.config["network_config"]["params"].get("ofs_embed_dim") is None:
            return None
        return torch.full((batch_size,), 2.0, device=self.device)

    # Logging

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

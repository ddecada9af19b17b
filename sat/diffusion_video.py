"""The engine: conditioner, first stage, network and the glue between them."""

import copy
import gc
import logging
import random
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from model_limits import patch_sizes
from network_weights import instantiate_on_meta, load_network
from process_groups import parallel_groups
from sgm.errors import UserError
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import get_obj_from_str, instantiate_from_config

logger = logging.getLogger(__name__)

PARTS = ("conditioner", "first_stage_model", "model")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(args: Namespace) -> torch.dtype:
    """float16 for `fp16: True`, bfloat16 for `bf16: True`, else float32.

    Raises:
        UserError: both are set.
    """
    chosen = [name for name in DTYPES if getattr(args, name, False)]
    if len(chosen) > 1:
        raise UserError("fp16 and bf16 are both on: choose one")
    return DTYPES[chosen[0]] if chosen else torch.float32


class SATVideoDiffusionEngine(nn.Module):
    """Video latent diffusion: what a training loop or a sampling command needs, by the names configurations use.

    The attributes `conditioner` (text to embeddings), `first_stage_model` (pixels to latents) and `model` (the
    network in its wrapper) are built on request, so that a program may hold them in turn.

    Args:
        args: `model_config` is the `model:` section of a configuration; `fp16` or `bf16` set the dtype of all parts;
            `load` and `lora_load` name the network's weights, `force_inference` lets some be missing;
            `model_parallel_size` overrides that of the network's configuration.
        parts: which of `PARTS` to build now.
        device: where parts are put.
    """

    def __init__(self, args: Namespace, parts: tuple[str, ...] = PARTS, device: torch.device | str = "cpu"):
        super().__init__()
        config = args.model_config
        self.args, self.config = args, config
        self.dtype = dtype_of(args)
        self.device = torch.device(device)
        self.scale_factor = config.get("scale_factor", 1.0)
        self.log_keys = config.get("log_keys") or ["txt"]
        self.input_key = config.get("input_key", "mp4")
        self.latent_input = config.get("latent_input", False)
        self.noised_image_input = config.get("noised_image_input", False)
        self.noised_image_all_concat = config.get("noised_image_all_concat", False)
        self.noised_image_dropout = config.get("noised_image_dropout", 0.0)
        self.not_trainable_prefixes = tuple(config.get("not_trainable_prefixes", ("first_stage_model", "conditioner")))

        self.denoiser = instantiate_from_config(config["denoiser_config"])
        self.sampler = instantiate_from_config(config["sampler_config"]) if "sampler_config" in config else None
        self.loss_fn = instantiate_from_config(config["loss_fn_config"]) if "loss_fn_config" in config else None
        for part in PARTS:
            setattr(self, part, None)
        for part in parts:
            self.build(part)

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
            setattr(self, part, build(self.device if device is None else device))
        return getattr(self, part)

    def release(self, part: str) -> None:
        """Drop a part and return its memory."""
        setattr(self, part, None)
        gc.collect()  # SwissArmyTransformer's hooks tie a network into a circle that reference counts do not free
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build_conditioner(self, device: torch.device | str) -> nn.Module:
        # Given to the text encoder rather than cast later: it keeps some layers in float32 when it runs in float16.
        config = copy.deepcopy(dict(self.config["conditioner_config"]))
        for embedder in config["params"]["emb_models"]:
            if embedder["target"].endswith("FrozenT5Embedder"):
                embedder["params"]["dtype"] = self.dtype
        return instantiate_from_config(config).to(device)

    def _build_first_stage(self, device: torch.device | str) -> nn.Module:
        first_stage = instantiate_from_config(self.config["first_stage_config"])
        return first_stage.to(device=device, dtype=self.dtype).eval().requires_grad_(False)

    def _build_network(self, device: torch.device | str) -> nn.Module:
        config = self.config["network_config"]
        size = getattr(self.args, "model_parallel_size", None)
        overrides = {}
        if size is not None:
            overrides["transformer_args"] = {**config["params"]["transformer_args"], "model_parallel_size": size}
        load, lora_load = (getattr(self.args, name, None) for name in ("load", "lora_load"))
        if load:
            network = instantiate_on_meta(config, **overrides).to(self.dtype)
            load_network(
                network,
                load,
                lora_load=lora_load,
                allow_missing=getattr(self.args, "force_inference", False),
                device=device,
            )
        else:
            network = instantiate_from_config(config, **overrides).to(device=device, dtype=self.dtype)
        if self.loss_fn is not None:  # building the network has set up the groups
            self.loss_fn.set_parallel_groups(*parallel_groups())
        lora_scale = getattr(self.args, "lora_scale", None)
        if lora_scale is not None:
            set_lora_scale(network, lora_scale)
        wrapper = OpenAIWrapper
        if self.config.get("network_wrapper"):
            wrapper = get_obj_from_str(self.config["network_wrapper"])
        return wrapper(network, compile_model=self.config.get("compile_model", False), dtype=self.dtype)

    @property
    def network(self) -> nn.Module:
        return self.model.diffusion_model

    @property
    def is_15(self) -> bool:
        """Whether the network patches two latent frames at a time, as CogVideoX1.5 does."""
        return patch_sizes(self.config["network_config"]["params"]["patch_size"])[0] > 1

    def disable_untrainable_params(self) -> None:
        """Freeze what training leaves alone: `not_trainable_prefixes` and, with LoRA, all but the adapter."""
        self.network.disable_untrainable_params()
        for name, parameter in self.named_parameters():
            if name.startswith(self.not_trainable_prefixes):
                parameter.requires_grad_(False)
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        logger.info("trainable parameters: %d of %d", trainable, sum(p.numel() for p in self.parameters()))

    # Pixels and latents

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor, batch: Mapping[str, Any] | None = None) -> Tensor:
        """Clips (b, 3, frames, height, width) in [-1, 1] to scaled latents (b, c, t, h, w).

        With `latent_input: True` the clips are latents already, (b, t, c, h, w), and are only scaled.
        """
        if self.latent_input:
            return rearrange(x, "b t c h w -> b c t h w") * self.scale_factor
        return self.scale_factor * self.first_stage_model.encode(x.to(self.dtype))

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents (b, c, t, h, w) to clips (b, 3, frames, height, width); see `decode_stream` for long ones."""
        return torch.cat(list(self.decode_stream(z)), dim=2)

    @torch.no_grad()
    def decode_stream(self, z: Tensor):
        """`decode_first_stage`, chunk by chunk in time."""
        yield from self.first_stage_model.decode_chunks((z / self.scale_factor).to(self.device, self.dtype))

    def encode_condition_image(self, image: Tensor) -> Tensor:
        """First frame (b, 3, 1, height, width) to its latent (b, 1, c, h, w), scaled as the network learnt to expect.

        1.0 models saw the scaled latent, 1.5 models the plain one.
        """
        latent = self.encode_first_stage(image)
        if self.is_15:
            latent = latent / self.scale_factor
        return rearrange(latent, "b c t h w -> b t c h w")

    def concat_condition(self, image_latent: Tensor, frames: int) -> Tensor:
        """The first frame's latent (b, 1, c, h, w), followed by zeros (or repeated) up to `frames`."""
        if self.noised_image_all_concat:
            return image_latent.expand(-1, frames, -1, -1, -1)
        padding = image_latent.new_zeros(image_latent.shape[0], frames - 1, *image_latent.shape[2:])
        return torch.cat((image_latent, padding), dim=1)

    # Training

    def shared_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch: clips `mp4` (b, frames, 3, height, width) in [-1, 1] and captions `txt`.

        Random numbers are drawn in the order: noise level and noise of the first frame, encoding of the first frame,
        encoding of the clip, image dropout, then those of the loss.
        """
        clip = batch[self.input_key].to(self.device, self.dtype)
        x = clip if self.latent_input else rearrange(clip, "b t c h w -> b c t h w")
        if self.noised_image_input:
            if self.latent_input:
                raise UserError("noised_image_input needs pixels to add noise to: set latent_input: False")
            image = self.encode_condition_image(noise_first_frame(x[:, :, :1]))
        # Contiguous, since noise drawn in its likeness follows the order in memory.
        latent = rearrange(self.encode_first_stage(x, batch), "b c t h w -> b t c h w").contiguous()
        if self.is_15:  # an even number of latent frames: the first one twice
            latent = torch.cat((latent[:, :1], latent), dim=1)
        if self.noised_image_input:
            condition = self.concat_condition(image, latent.shape[1])
            if random.random() < self.noised_image_dropout:
                condition = torch.zeros_like(condition)
            batch = {**batch, "concat_images": condition}
        return self(latent, batch)

    def forward(self, x: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of latents (b, t, c, h, w): its mean, and the same by name for logging."""
        loss = self.loss_fn(self.model, self.denoiser, self.conditioner, x, batch).mean()
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
        callback: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw latents.

        Args:
            cond, uc: conditional and unconditional embeddings, as the conditioner gives them.
            batch_size, shape: the latents are (batch_size, *shape) with shape (t, c, h, w).
            concat_images: image condition (batch_size, t, c, h, w); guidance leaves it in place.
            ofs: (batch_size,), for 1.5 image-to-video.
            num_steps: number of steps, if not the sampler's own.
            callback: called as `callback(steps done, steps)`.

        Returns:
            Scaled latents (batch_size, t, c, h, w), float32. The initial noise comes from the CPU generator, so that
            a seed means the same on every device.
        """
        noise = torch.randn(batch_size, *shape, dtype=torch.float32).to(self.device)
        if concat_images is not None:
            cond = {**cond, "concat": concat_images}
            uc = uc and {**uc, "concat": concat_images}

        def denoise(x: Tensor, level: Tensor, c: dict[str, Tensor], **model_inputs: Any) -> Tensor:
            return self.denoiser(self.model, x, level, c, **model_inputs)

        return self.sampler(denoise, noise, cond, uc=uc, ofs=ofs, num_steps=num_steps, callback=callback)

    @torch.no_grad()
    def log_video(
        self, batch: dict[str, Any], N: int = 4, only_log_video_latents: bool = False, **sample_arguments: Any
    ) -> dict[str, Any]:
        """What a trainer shows of a batch: `inputs`, `reconstructions` and `samples` of its first N clips and captions.

        Clips are (n, frames, 3, height, width) in [-1, 1]; with `only_log_video_latents` the samples are `latents`
        (n, t, c, h, w) instead, and the first stage decodes nothing.
        """
        clip = batch[self.input_key][:N].to(self.device, self.dtype)
        count = clip.shape[0]
        texts = {"txt": list(batch["txt"][:count])}
        cond, uc = self.conditioner.get_unconditional_conditioning(texts, force_uc_zero_embeddings=["txt"])
        x = clip if self.latent_input else rearrange(clip, "b t c h w -> b c t h w")
        latent = self.encode_first_stage(x, batch)
        shape = (latent.shape[2] + int(self.is_15), latent.shape[1], *latent.shape[3:])
        concat_images = ofs = None
        if self.noised_image_input:
            concat_images = self.concat_condition(self.encode_condition_image(x[:, :, :1]), shape[0])
            ofs = self.default_ofs(count)
        samples = self.sample(cond, uc, count, shape, concat_images=concat_images, ofs=ofs, **sample_arguments)
        samples = self.drop_extra_frame(samples)

        log: dict[str, Any] = {key: list(batch[key][:count]) for key in self.log_keys if key in batch}
        if only_log_video_latents:
            return log | {"latents": samples}
        if not self.latent_input:
            log["inputs"] = clip
        log["reconstructions"] = rearrange(self.decode_first_stage(latent), "b c t h w -> b t c h w")
        decoded = self.decode_first_stage(rearrange(samples, "b t c h w -> b c t h w"))
        return log | {"samples": rearrange(decoded, "b c t h w -> b t c h w")}

    def default_ofs(self, batch_size: int) -> Tensor | None:
        """`ofs` for networks that take it, the 1.5 image-to-video ones: always 2.0."""
        if self.config["network_config"]["params"].get("ofs_embed_dim") is None:
            return None
        return torch.full((batch_size,), 2.0, device=self.device)

    def drop_extra_frame(self, latents: Tensor) -> Tensor:
        """Latents (b, t, c, h, w) without the leading frame that 1.5 networks need to make their number even."""
        return latents[:, 1:] if self.is_15 else latents


def noise_first_frame(image: Tensor) -> Tensor:
    """Frames (b, 3, 1, height, width) plus noise with log σ ~ N(−3, 0.5²), so that the condition may be imperfect."""
    sigma = torch.normal(mean=-3.0, std=0.5, size=(image.shape[0],)).to(image.device)
    sigma = sigma.exp().to(image.dtype)
    return image + torch.randn_like(image) * sigma[:, None, None, None, None]


def set_lora_scale(network: nn.Module, scale: float) -> None:
    """Multiply the contribution of every LoRA layer by `scale`; 0 leaves the base model."""
    for module in network.modules():
        if hasattr(module, "matrix_A"):
            module.scaling = scale * module.lora_alpha / module.r

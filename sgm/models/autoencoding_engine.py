"""Train an autoencoder with Lightning: reconstruction, penalties and a discriminator."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from sgm.context_parallel import gather_frames, sum_over_ranks
from sgm.errors import UserError
from sgm.models.abstract_autoencoder import Config
from sgm.models.autoencoder_optimizers import AUTOENCODER, DISCRIMINATOR, OptimizedAutoencoder
from sgm.models.calling_losses import call_loss
from sgm.modules.checkpoint import TRAINING_ONLY
from sgm.randomness import per_sample
from sgm.seeds import hashed_seed
from sgm.util import instantiate_from_config


class Reconstruction(NamedTuple):
    """The inputs of the loss, pixels (b c h w) or (b c t h w), and the regularizer's report.

    Attributes:
        frames: None, or the number of frames of each rank; the pixels are then this rank's part of a clip.
        weight: a factor of the reconstruction's part of the loss.
        latent: this rank's part of the decoded latent.
    """

    inputs: Tensor
    outputs: Tensor
    report: dict[str, Tensor]
    frames: list[int] | None = None
    weight: float = 1.0
    latent: Tensor | None = None


class AutoencodingEngine(OptimizedAutoencoder):
    """Trains an encoder, a decoder and a regularizer, in turn with their discriminator.

    Optimization is manual, so that accumulation and clipping are settings here, not of the trainer. One step of the
    trainer (`global_step`) is a step of one optimizer: the autoencoder's up to `disc_start_iter`, then the
    discriminator's and the autoencoder's in turn. All processes take the same turns. With a discriminator the DDP
    strategy must be `ddp_find_unused_parameters_true`.

    A batch may have a `seed` for each of its samples; the random numbers of a sample then depend on its seed alone.

    Args:
        args, others: see `OptimizedAutoencoder`.
        encoder_config, decoder_config, regularizer_config, loss_config: the parts. A regularizer returns a latent and a
            dictionary of scalars; see `call_loss` for a loss.
        disc_start_iter: the first step of the discriminator, unless the loss has a later `disc_start`.
        additional_decode_keys: entries of a batch that are passed to the decoder by name, if the batch has them.
        diff_boost_factor: factor of differences in `log_images`, to make them visible.
        accumulate_grad_batches: number of batches whose mean gradient makes a step.
        parts: further modules by name, trained with encoder and decoder.

    Raises:
        UserError: a setting is wrong, or the initial weights do not fit.
    """

    group: ProcessGroup | None = None  # the ranks that share a clip

    def __init__(
        self,
        *args: Any,
        encoder_config: Config,
        decoder_config: Config,
        loss_config: Config,
        regularizer_config: Config,
        disc_start_iter: int = 0,
        diff_boost_factor: float = 3.0,
        accumulate_grad_batches: int = 1,
        parts: Mapping[str, nn.Module] | None = None,
        additional_decode_keys: str | Sequence[str] | None = None,
        **others: Any,
    ):
        super().__init__(*args, **others)
        self.automatic_optimization = False
        if accumulate_grad_batches < 1:
            raise UserError(f"accumulate_grad_batches: got {accumulate_grad_batches}; expected at least 1")
        self.encoder = instantiate_from_config(encoder_config)
        self.decoder = instantiate_from_config(decoder_config)
        for name, part in (parts or {}).items():
            self.add_module(name, part)
        self.regularization = instantiate_from_config(regularizer_config)
        self.loss = instantiate_from_config(loss_config)

        self.disc_start_iter = disc_start_iter
        self.diff_boost_factor = diff_boost_factor
        keys = additional_decode_keys or ()
        self.additional_decode_keys = {keys} if isinstance(keys, str) else set(keys)
        self.accumulate_grad_batches = accumulate_grad_batches
        self._accumulated = 0

        self.choose_trained()
        self.load_start()

    def get_last_layer(self) -> nn.Parameter:
        """Return the weight of the last layer, for losses that balance terms by its gradient."""
        if hasattr(self.decoder, "get_last_layer"):
            return self.decoder.get_last_layer()
        return self.decoder.conv_out.weight

    def coder_state_dict(self, ema: bool) -> dict[str, Tensor]:
        """Return the weights of the autoencoder without training's, on their device.

        Args:
            ema: return the averages of the weights.

        Raises:
            UserError: no averages are kept.
        """
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith(TRAINING_ONLY)}
        if not ema:
            return weights
        if self.model_ema is None:
            raise UserError("ema_decay: no average of the weights is kept; set a decay")
        return {**weights, **self.model_ema.shadows()}

    # ------------------------------------------------------------ reconstruction

    def encode(
        self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the latents of images (b, c, h, w).

        Args:
            return_reg_log: return a pair of the latents and the regularizer's report.
            unregularized: return a pair of the encoder's output and an empty report.
        """
        return self._regularized(self.encoder(x), return_reg_log, unregularized)

    def _regularized(
        self, z: Tensor, return_reg_log: bool, unregularized: bool
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the result of `encode` from the encoder's output `z`."""
        if unregularized:
            return z, {}
        latent, report = self.regularization(z)
        return (latent, report) if return_reg_log else latent

    def decode(self, z: Tensor, **options: Any) -> Tensor:
        """Return the images (b, c, h, w) of latents; `options` go to the decoder."""
        return self.decoder(z, **options)

    def forward(self, x: Tensor, **decode_options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return latents, reconstruction and the regularizer's report of images (b, c, h, w)."""
        z, report = self.encode(x, return_reg_log=True)
        return z, self.decode(z, **decode_options), report

    def reconstruct(self, x: Tensor, **decode_options: Any) -> Reconstruction:
        """Return the reconstruction of a step's input; `decode_options` go to the decoder.

        Raises:
            UserError: the sizes do not fit the autoencoder.
        """
        latent, outputs, report = self(x, **decode_options)
        return Reconstruction(x, outputs, report, latent=latent)

    def _decode_options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keywords that the decoder takes from a batch."""
        return {key: batch[key] for key in self.additional_decode_keys if key in batch}

    # ------------------------------------------------------------ training

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Run a batch of the next optimizer; return {"loss": scalar, "log": named scalars}.

        All values are detached.
        """
        turn = self.next_optimizer()
        optimizer = _as_list(self.optimizers())[turn]
        self._accumulated += 1
        complete = self._accumulated == self.accumulate_grad_batches
        with optimizer.toggle_model(sync_grad=complete):
            loss, log = self.compute_loss(batch, turn)
            self.manual_backward(loss / self.accumulate_grad_batches)
        if complete:
            self._accumulated = 0
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if schedulers := _as_list(self.lr_schedulers()):
                schedulers[turn].step()
            if turn == AUTOENCODER and self.model_ema is not None:
                self.model_ema(self)
        self.log_dict(log)
        return {"loss": loss.detach(), "log": log}

    def next_optimizer(self) -> int:
        """Return the index of the next optimizer.

        The discriminator starts, so that the autoencoder never learns from an untrained one.
        """
        start = max(self.disc_start_iter, getattr(self.loss, "disc_start", 0))
        since_start = self.global_step - start
        return DISCRIMINATOR if self.has_discriminator and since_start >= 0 and since_start % 2 == 0 else AUTOENCODER

    def compute_loss(
        self, batch: Mapping[str, Any], optimizer_idx: int, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and its detached parts by name.

        Args:
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
        """
        with _random_numbers(batch), torch.set_grad_enabled(torch.is_grad_enabled() and optimizer_idx == AUTOENCODER):
            reconstruction = self.reconstruct(self.get_input(batch), **self._decode_options(batch))
        return self._loss(reconstruction, optimizer_idx, split)

    def _loss(self, reconstruction: Reconstruction, optimizer_idx: int, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result of `compute_loss` for a reconstruction that is already made."""
        given = {
            "regularization_log": reconstruction.report,
            "optimizer_idx": optimizer_idx,
            "global_step": self.global_step,
            "last_layer": self.get_last_layer(),
            "split": split,
            "weights": None if reconstruction.weight == 1 else reconstruction.weight,
            "group": self.group,
            "frames": reconstruction.frames,
            "z": reconstruction.latent,
            "autoencoder": self,
        }
        return call_loss(self.loss, reconstruction.inputs, reconstruction.outputs, given)

    def on_train_start(self) -> None:
        super().on_train_start()
        model = self.trainer.strategy.model
        if self.has_discriminator and isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
            raise UserError(
                "strategy: with a discriminator each step uses only some of the parameters; "
                "use ddp_find_unused_parameters_true"
            )

    # ------------------------------------------------------------ validation

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Log and return the numbers of `validate`; Lightning averages them over the processes."""
        log = self.validate(batch, batch_idx)
        self.log_dict(log, sync_dist=True, batch_size=len(batch[self.input_key]))
        return log

    def validate(self, batch: Mapping[str, Any], batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the loss's parts as `val/...`, and with averaged weights as `val_ema/...`.

        `.../rec` is the mean |x - x̂|. The random numbers of a sample follow from its `seed`, or else from its place in
        the data, so that values of different steps compare.
        """
        with self._evaluating():
            log = self._evaluate(batch, batch_idx, "val")
            if self.model_ema is not None:
                with self.ema_scope():
                    log |= self._evaluate(batch, batch_idx, "val_ema")
        return log

    def _evaluate(self, batch: Mapping[str, Any], batch_idx: int, split: str) -> dict[str, Tensor]:
        """Return the result of `validate` for the present weights, named `{split}/...`."""
        with _random_numbers(batch, len(batch[self.input_key]), batch_idx):
            reconstruction = self.reconstruct(self.get_input(batch), **self._decode_options(batch))
        log: dict[str, Tensor] = {}
        for optimizer_idx in range(1 + self.has_discriminator):
            log |= self._loss(reconstruction, optimizer_idx, split)[1]
        distance = (reconstruction.inputs - reconstruction.outputs).abs().sum(dtype=torch.float32)
        count = torch.tensor(float(reconstruction.inputs.numel()), device=distance.device)
        group = None if reconstruction.frames is None else self.group
        total, count = sum_over_ranks(torch.stack([distance, count]), group)
        return {**log, f"{split}/rec": total / count}

    def log_images(
        self, batch: Mapping[str, Any], additional_log_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return `inputs`, `reconstructions`, `diff` and `diff_boost`, pictures in [-1, 1].

        With averaged weights, `..._ema` is added for all but `inputs`. Differences are |x - x̂| / 2, and the same times
        `diff_boost_factor`; -1 is no difference. Pictures of the loss's method `log_images`, if it exists, are added by
        name.

        Args:
            additional_log_kwargs: further arguments of the decoder; its result is added as `reconstructions-key=value`.
            kwargs: accepted from callbacks, without effect.
        """
        with self._evaluating():
            images = self._images(batch, "", additional_log_kwargs)
            if self.model_ema is not None:
                with self.ema_scope():
                    images |= self._images(batch, "_ema", additional_log_kwargs)
        return images

    def _images(
        self, batch: Mapping[str, Any], suffix: str, additional_log_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """Return the result of `log_images` for the present weights, under names with a suffix."""
        options = self._decode_options(batch)
        inputs, outputs = self._pictures(batch, options)
        difference = (inputs - outputs).abs() / 2
        images = {
            "inputs": inputs,
            f"reconstructions{suffix}": outputs,
            f"diff{suffix}": 2 * difference - 1,
            f"diff_boost{suffix}": 2 * (self.diff_boost_factor * difference).clamp(max=1) - 1,
        }
        if hasattr(self.loss, "log_images") and not suffix:
            images |= self.loss.log_images(inputs, outputs)
        if additional_log_kwargs:
            name = "-".join(f"{key}={value}" for key, value in additional_log_kwargs.items())
            images[f"reconstructions-{name}{suffix}"] = self._pictures(batch, options | dict(additional_log_kwargs))[1]
        return images

    def _pictures(self, batch: Mapping[str, Any], decode_options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the whole input and its reconstruction, float32 within [-1, 1]."""
        with _random_numbers(batch, len(batch[self.input_key])):
            reconstruction = self.reconstruct(self.get_input(batch), **decode_options)
        pictures = [reconstruction.inputs, reconstruction.outputs]
        if reconstruction.frames is not None:
            pictures = [gather_frames(share, reconstruction.frames, self.group) for share in pictures]
        inputs, outputs = (x.float().clamp(-1, 1) for x in pictures)
        return inputs, outputs

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Use evaluation mode without gradients within the block."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)


def _random_numbers(batch: Mapping[str, Any], count: int | None = None, *place: int) -> AbstractContextManager[None]:
    """Return a context for a batch's random numbers: from seeds, or from its `place`.

    Without seeds and `count`, the random numbers are the next ones.
    """
    if "seed" in batch:
        return per_sample([int(seed) for seed in batch["seed"]])
    if count is None:
        return nullcontext()
    return per_sample([hashed_seed("validation", *place, sample) for sample in range(count)])


def _as_list(value: Any) -> list[Any]:
    """Return a list of Lightning's optimizers or schedulers, which may be None, one or a list."""
    return value if isinstance(value, list) else [] if value is None else [value]

"""The base class of all autoencoders that Lightning trains."""

import difflib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sgm.errors import UserError
from sgm.modules.checkpoint import TRAINING_ONLY, CheckpointEngine
from sgm.modules.ema import LitEma
from sgm.util import instantiate_from_config

log = logging.getLogger(__name__)

Config = Mapping[str, Any]


class AbstractAutoencoder(pl.LightningModule, ABC):
    """An autoencoder for Lightning: its batches, its initial weights and their average.

    Args:
        ema_decay: decay of an average of the trained weights (see `LitEma`); None: no average.
        monitor: the logged number by which the best checkpoint is chosen.
        input_key: the entry of a batch that is encoded.
        ckpt_path, ignore_keys: a file of initial weights, and prefixes of its entries to leave out.
        ckpt_engine: the initial weights as one setting: a path, or the configuration of an object that, called with
            this module, loads weights into it and returns the names without weights (see `CheckpointEngine`).
        strict: these weights must fit exactly; False loads those that fit, and lists the others in the log.

    Raises:
        UserError: a setting is wrong or unknown, or the initial weights do not fit.
    """

    def __init__(
        self,
        ema_decay: float | None = None,
        monitor: str | None = None,
        input_key: str = "jpg",
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        ckpt_engine: str | Path | Config | None = None,
        strict: bool = True,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise UserError(f"{type(self).__name__} has no setting {_with_nearest(type(self), unknown)}")
        if ema_decay is not None and not 0 <= ema_decay <= 1:
            raise UserError(f"ema_decay: got {ema_decay}; expected a number from 0 to 1")
        if ckpt_path is not None and ckpt_engine is not None:
            raise UserError("ckpt_path and ckpt_engine both give initial weights; give one of them")
        self.ema_decay, self.monitor, self.input_key = ema_decay, monitor, input_key
        self.model_ema: LitEma | None = None
        start = ckpt_engine if ckpt_path is None else ckpt_path
        self._checkpoint = self._checkpoint_of(start, ignore_keys, strict)

    @staticmethod
    def _checkpoint_of(
        start: str | Path | Config | None, ignore_keys: Sequence[str] = (), strict: bool = True
    ) -> Callable[[nn.Module], list[str] | None] | None:
        """Return the function that loads initial weights into a module.

        Args:
            start: a file, or the configuration of such a function.
        """
        if start is None:
            return None
        if isinstance(start, Mapping):
            return instantiate_from_config(start)
        return CheckpointEngine(start, ignore_keys, strict)

    @property
    def use_ema(self) -> bool:
        """Return whether an average of the weights is kept."""
        return self.ema_decay is not None

    @abstractmethod
    def encode(
        self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the latents of pixels; see `AutoencodingEngine.encode`."""

    @abstractmethod
    def decode(self, z: Tensor, **options: Any) -> Tensor:
        """Return the pixels of latents."""

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the images of a batch (b, c, h, w): floats in [-1, 1], or bytes scaled to that.

        Raises:
            UserError: the batch has no entry `input_key`.
        """
        if self.input_key not in batch:
            raise UserError(f"input_key: the batch has no '{self.input_key}', only {', '.join(map(str, batch))}")
        x = batch[self.input_key]
        return x.to(self.dtype) / 127.5 - 1 if x.dtype == torch.uint8 else x.to(self.dtype)

    # ------------------------------------------------------------ weights

    def load_start(self) -> None:
        """Load the initial weights and begin their average.

        A constructor calls this when all parts are built.
        """
        self._begin_average()
        if self._checkpoint is not None:
            missing = self._checkpoint(self)
            if missing is None or any(name.startswith("model_ema.") for name in missing):
                self._begin_average()

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = (), strict: bool = True) -> None:
        """Load the weights from a file before training, except given prefixes.

        Args:
            ignore_keys: prefixes of the entries to leave out.

        Raises:
            UserError: the file cannot be read, or is of another architecture (see `load_autoencoder`).
        """
        self._checkpoint = CheckpointEngine(path, ignore_keys, strict)
        self.load_start()

    def apply_ckpt(self, ckpt: str | Path | Config | None) -> None:
        """Load weights before training.

        Args:
            ckpt: see `ckpt_engine` of the constructor.

        Raises:
            UserError: the file cannot be read, or is of another architecture.
        """
        if ckpt is not None:
            self._checkpoint = self._checkpoint_of(ckpt)
            self.load_start()

    def _begin_average(self) -> None:
        if self.ema_decay is not None:
            self.model_ema = LitEma(self, self.ema_decay, skip=TRAINING_ONLY)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights, if there are any, within the block.

        Args:
            context: a name for the log.
        """
        if self.model_ema is None:
            yield
            return
        parameters = self.model_ema.averaged_parameters(self)
        self.model_ema.store(parameters)
        self.model_ema.copy_to(self)
        if context is not None:
            log.info("%s: with the averaged weights", context)
        try:
            yield
        finally:
            self.model_ema.restore(parameters)
            if context is not None:
                log.info("%s: back to the weights in training", context)

    # ------------------------------------------------------------ optimizers

    def instantiate_optimizer_from_config(
        self, params: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, cfg: Config
    ) -> Optimizer:
        """Return an optimizer from a configuration, for parameters or groups of parameters.

        Args:
            lr: the learning rate.

        Raises:
            UserError: the configuration does not name an optimizer, or has unknown parameters.
        """
        log.debug("optimizer: %s", cfg.get("target"))
        config = {**cfg, "params": {**(cfg.get("params") or {}), "lr": lr}}
        return instantiate_from_config(config, params=params)

    # ------------------------------------------------------------ several processes

    def setup(self, stage: str) -> None:
        # DDP would broadcast all buffers before every step, but the averages are the same on all processes.
        names = [] if self.model_ema is None else [f"model_ema.{name}" for name, _ in self.model_ema.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def on_train_start(self) -> None:
        if self.model_ema is not None and dist.is_initialized():
            for average in self.model_ema.buffers():
                dist.broadcast(average, src=0)


def _with_nearest(engine: type, unknown: Iterable[str]) -> str:
    bases: tuple[type[object], ...] = engine.__mro__
    known = {name for base in bases for name in inspect.signature(base.__init__).parameters}
    name = min(unknown)
    near = difflib.get_close_matches(name, known, n=1)
    return f"'{name}'" + (f"; did you mean '{near[0]}'?" if near else "")

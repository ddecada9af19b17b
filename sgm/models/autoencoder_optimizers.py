"""The optimizers of an autoencoder and its discriminator, and the weights they train."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sgm.config_places import current_place, within
from sgm.errors import UserError
from sgm.models.abstract_autoencoder import AbstractAutoencoder, Config
from sgm.models.calling_losses import check_loss
from sgm.models.parameter_groups import match_groups, pair_arguments
from sgm.util import class_of_config, instantiate_from_config

AUTOENCODER, DISCRIMINATOR = 0, 1
"""The indices of the optimizers, `optimizer_idx` of a loss."""


class OptimizedAutoencoder(AbstractAutoencoder):
    """An autoencoder with an optimizer of its own, and one for the discriminator of its loss.

    A subclass builds `loss` and `regularization`, and then calls `choose_trained`.

    Args:
        args: the leading arguments of `AbstractAutoencoder`: ema_decay, monitor, input_key.
        optimizer_config: target and params of both optimizers, by default `torch.optim.Adam`. The learning rate of the
            discriminator is the `lr` of these params, or else `learning_rate`.
        lr_g_factor: the learning rate of the autoencoder (the generator) as a multiple of the discriminator's.
        scheduler_config: target and params of a function, such as those of `sgm.lr_scheduler`, from the number of steps
            of an optimizer to a factor of its learning rates.
        trainable_ae_params, trainable_disc_params: groups of parameters to train, each a list of regular expressions
            that match the beginning of names (`encoder\\.conv_in`); other parameters stay fixed. None: one group of
            all, of encoder, decoder, regularizer and the loss's log-variance, or of the discriminator.
        ae_optimizer_args, disc_optimizer_args: for each group the optimizer's arguments that differ (`lr`, without
            factors; `weight_decay`, ...).
        gradient_clip_val: the largest norm of the gradient of a step; None: any.
        others: see `AbstractAutoencoder`.

    Attributes:
        learning_rate: to be set before training, unless the optimizer's params have an `lr`.

    Raises:
        UserError: a setting is wrong.
    """

    loss: nn.Module
    regularization: nn.Module
    learning_rate: float | None = None

    def __init__(
        self,
        *args: Any,
        optimizer_config: Config | None = None,
        lr_g_factor: float = 1.0,
        scheduler_config: Config | None = None,
        trainable_ae_params: Sequence[Sequence[str]] | None = None,
        ae_optimizer_args: Sequence[Mapping[str, Any]] | None = None,
        trainable_disc_params: Sequence[Sequence[str]] | None = None,
        disc_optimizer_args: Sequence[Mapping[str, Any]] | None = None,
        gradient_clip_val: float | None = None,
        **others: Any,
    ):
        super().__init__(*args, **others)
        self.optimizer_config = optimizer_config or {"target": "torch.optim.Adam"}
        self.lr_g_factor = lr_g_factor
        self.scheduler_config = scheduler_config
        self._place = current_place()  # in the configuration, for the optimizers built when training starts
        for config in filter(None, (self.optimizer_config, scheduler_config)):
            class_of_config(config)
        self._wanted = {
            "ae": (trainable_ae_params, ae_optimizer_args),
            "disc": (trainable_disc_params, disc_optimizer_args),
        }
        self._groups: list[list[tuple[list[str], Mapping[str, Any]]]] = []
        self.gradient_clip_val = gradient_clip_val

    def choose_trained(self) -> None:
        """Choose the parameters that each optimizer trains, and fix all others.

        A constructor calls this when all parts are built.

        Raises:
            UserError: the settings do not fit the parameters.
        """
        self._groups = [
            self._choose(kind, candidates, *wanted)
            for (kind, wanted), candidates in zip(self._wanted.items(), self._trainable(), strict=True)
        ]
        if not any(names for names, _ in self._groups[AUTOENCODER]):
            raise UserError("trainable_ae_params: no parameter of the autoencoder is trained; name at least one")
        chosen = {name for groups in self._groups for names, _ in groups for name in names}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)

    def get_autoencoder_params(self) -> list[nn.Parameter]:
        """Return the parameters that the autoencoder's optimizer can train.

        A subclass may return fewer, to train only these. The constructor calls this when the parts of the configuration
        are built.
        """
        special = _identities(self.loss, "parameters") | _identities(self.regularization, "parameters")
        trained = _identities(self.loss, "get_trainable_autoencoder_parameters")
        trained |= _identities(self.regularization, "get_trainable_parameters")
        return [each for each in self.parameters() if id(each) in trained or id(each) not in special]

    def get_discriminator_params(self) -> list[nn.Parameter]:
        """Return the parameters that the discriminator's optimizer can train, if there are any."""
        trained = _identities(self.loss, "get_trainable_parameters")
        return [each for each in self.parameters() if id(each) in trained]

    def get_param_groups(
        self, parameter_names: Sequence[Sequence[str]], optimizer_args: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[dict[str, Any]], int]:
        """Return groups of parameters for an optimizer, and their number of elements in all.

        Args:
            parameter_names: for each group, regular expressions that match the beginning of names.
            optimizer_args: for each group, the optimizer's arguments that differ.

        Raises:
            UserError: an expression matches nothing, a parameter is in two groups, or the number of arguments differs
                from that of the groups.
        """
        members = match_groups(dict(self.named_parameters()), parameter_names, what="parameter_names")
        pair_arguments(members, optimizer_args, what="optimizer_args")
        groups = [
            {"params": list(group.values()), **own}
            for group, own in zip(members, optimizer_args or [{}] * len(members), strict=True)
        ]
        return groups, sum(parameter.numel() for group in members for parameter in group.values())

    def _trainable(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Return the trainable parameters of the autoencoder and of the discriminator, by name."""
        named = {name: each for name, each in self.named_parameters() if each.requires_grad}
        chosen = [{id(each) for each in get()} for get in (self.get_autoencoder_params, self.get_discriminator_params)]
        autoencoder, discriminator = ({name: each for name, each in named.items() if id(each) in ids} for ids in chosen)
        return autoencoder, discriminator

    @staticmethod
    def _choose(
        kind: str,
        candidates: Mapping[str, nn.Parameter],
        patterns: Sequence[Sequence[str]] | None,
        arguments: Sequence[Mapping[str, Any]] | None,
    ) -> list[tuple[list[str], Mapping[str, Any]]]:
        """Return an optimizer's groups: the names of their parameters, and their own arguments."""
        if patterns is None:
            groups = [dict(candidates)] if candidates else []
        else:
            groups = match_groups(candidates, patterns, what=f"trainable_{kind}_params")
        return pair_arguments(groups, arguments, what=f"{kind}_optimizer_args")

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LambdaLR]]:
        """Return the optimizers, the autoencoder's first, and the configured schedules.

        Raises:
            UserError: no learning rate is set, or the loss or an optimizer's arguments do not fit.
        """
        params = dict(self.optimizer_config.get("params") or {})
        rate = params.pop("lr", self.learning_rate)
        if rate is None:
            raise UserError("learning_rate: missing; set it, or lr in the params of optimizer_config")
        if isinstance(self.loss, nn.Identity):
            raise UserError("loss_config: torch.nn.Identity cannot train an autoencoder; name a loss")
        check_loss(self.loss)
        parameters = dict(self.named_parameters())
        optimizers = []
        for groups, lr in zip(self._groups, (rate * self.lr_g_factor, rate), strict=True):
            if groups:
                members = [{"params": [parameters[name] for name in names], **own} for names, own in groups]
                config = {**self.optimizer_config, "params": params}
                with within(self._place):
                    optimizers.append(self.instantiate_optimizer_from_config(members, lr, config))
        if self.scheduler_config is None:
            return optimizers, []
        with within(self._place):
            schedule = instantiate_from_config(self.scheduler_config)
        return optimizers, [LambdaLR(optimizer, schedule) for optimizer in optimizers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the step of a stored schedule; rates and lengths are the configuration's."""
        for state in checkpoint.get("lr_schedulers", ()):
            state["lr_lambdas"] = [None] * len(state["lr_lambdas"])  # LambdaLR keeps its own for None
            state.pop("base_lrs", None)

    @property
    def has_discriminator(self) -> bool:
        """Return whether the loss has a discriminator to train."""
        return bool(self._groups[DISCRIMINATOR])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip gradients, which are averaged over processes and, with mixed precision, unscaled."""
        if self.gradient_clip_val is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip_val)


def _identities(module: nn.Module, method: str) -> set[int]:
    """Return the identities of the parameters that a method of `module` returns, if any."""
    parameters: Iterable[nn.Parameter] = getattr(module, method, tuple)()
    return {id(parameter) for parameter in parameters}

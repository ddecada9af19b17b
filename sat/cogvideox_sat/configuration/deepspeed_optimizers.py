"""Check the optimizer and the scheduler of the `deepspeed:` section."""

from collections.abc import Mapping
from typing import Any

from cogvideox_sat.configuration.deepspeed_values import check_number, checked_section
from cogvideox_sat.configuration.similar_names import nearest
from cogvideox_sat.configuration.targets import why_target_fails
from sgm.errors import UserError, shown

OUR_OPTIMIZERS = ("sat.ops.FusedEmaAdam", "ema_adam.EmaAdam")  # two names of one class
WHOLE_MATRICES = "sgm.muon.Muon"
ADAM_PARAMS = {"lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad", "adam_w_mode", "set_grad_none"}
TORCH_ADAM_PARAMS = {"torch_adam", "fp32_optimizer_states", "foreach", "fused", "maximize", "capturable"}
ADAM_FLAGS = {"bias_correction", "amsgrad", "adam_w_mode", "set_grad_none", *TORCH_ADAM_PARAMS}
OPTIMIZER_PARAMS = {
    # `use_num_upates` is SwissArmyTransformer's spelling.
    **{name: ADAM_PARAMS | {"ema_decay", "use_num_upates", "use_num_updates"} for name in OUR_OPTIMIZERS},
    WHOLE_MATRICES: {"lr", "momentum", "adam_lr_factor", "betas", "eps", "weight_decay", "ema_decay"},
    "adam": ADAM_PARAMS | TORCH_ADAM_PARAMS,
    "adamw": ADAM_PARAMS | TORCH_ADAM_PARAMS,
}
# DeepSpeed accepts its own names in upper and lower case.
DEEPSPEED_OPTIMIZERS = {"adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd"}
TORCH_OPTIMIZERS = {"Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
DEEPSPEED_SCHEDULERS = {"LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"}


def type_and_params(config: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    """Return the type and the parameters of the optimizer or scheduler at `place`.

    Raises:
        UserError: the section is not a mapping or has an unknown key, or one of the two is missing.
    """
    section = checked_section(config, place)
    name, params = section.get("type"), section.get("params")
    if not isinstance(name, str) or not name:
        raise UserError(f"deepspeed: {place}.type: got {shown(name)}; expected a name")
    if not isinstance(params, Mapping):
        raise UserError(f"deepspeed: {place}.params: got {shown(params)}; expected keys and values")
    return name, params


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Check the type and the parameters of the optimizer, else raise UserError."""
    if "optimizer" not in config:
        raise UserError(f"deepspeed: optimizer: missing; give its type, such as {OUR_OPTIMIZERS[0]}, and params.lr")
    name, params = type_and_params(config, "optimizer")
    check_optimizer_type(name)
    known = OPTIMIZER_PARAMS.get(name if "." in name else name.lower(), params)  # without a table, all are accepted
    for key in params:
        if key not in known:
            hint = nearest(str(key), sorted(known), otherwise="")
            raise UserError(f"deepspeed.optimizer.params: unknown key '{key}'{hint}")
    check_optimizer_params(params, has_table=known is not params)


def check_optimizer_type(name: str) -> None:
    """Check that an optimizer has a known name or imports, else raise UserError."""
    if "." in name:
        if problem := why_target_fails(name):
            raise UserError(f"deepspeed: optimizer.type: {name}: {problem}")
    elif name.lower() not in DEEPSPEED_OPTIMIZERS and name not in TORCH_OPTIMIZERS:
        hint = nearest(name, sorted(DEEPSPEED_OPTIMIZERS | TORCH_OPTIMIZERS), otherwise="; give an import path")
        raise UserError(f"deepspeed: unknown optimizer.type '{name}'{hint}")


def check_optimizer_params(params: Mapping[str, Any], has_table: bool) -> None:
    """Check the values of an optimizer's parameters, else raise UserError.

    Args:
        has_table: the optimizer is in `OPTIMIZER_PARAMS`; others may take the names in another meaning.
    """
    if "lr" not in params:
        raise UserError("deepspeed: optimizer.params.lr: missing; give the learning rate")
    check_number("optimizer.params.lr", params["lr"], least=0)
    for key in ("eps", "weight_decay"):
        if key in params:
            check_number(f"optimizer.params.{key}", params[key], least=0)
    if "ema_decay" in params:
        check_number("optimizer.params.ema_decay", params["ema_decay"], least=0, below=1)
    if has_table:
        for key in ADAM_FLAGS & params.keys():
            if params[key] not in (None, True, False):
                raise UserError(f"deepspeed: optimizer.params.{key}: got {shown(params[key])}; expected true or false")
    if "betas" in params:
        betas = params["betas"]
        if not isinstance(betas, list) or len(betas) < 2 or (has_table and len(betas) > 2):
            raise UserError(f"deepspeed: optimizer.params.betas: got {shown(betas)}; expected two numbers")
        for beta in betas:
            check_number("optimizer.params.betas", beta, least=0, below=1)


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Check that the scheduler is one of DeepSpeed's or PyTorch's, else raise UserError."""
    name, _ = type_and_params(config, "scheduler")
    if name not in DEEPSPEED_SCHEDULERS and why_target_fails(f"torch.optim.lr_scheduler.{name}"):
        hint = nearest(name, sorted(DEEPSPEED_SCHEDULERS), otherwise="")
        raise UserError(f"deepspeed: unknown scheduler.type '{name}'{hint}")

"""Check the parts of the `deepspeed:` section that only DeepSpeed reads.

DeepSpeed would fail at wrong values there with errors of its own. Nothing here imports PyTorch or DeepSpeed.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sgm.config_places import Key, dotted, walk
from sgm.errors import UserError, one_line, shown

# Parts that must be mappings.
FEATURES = {
    *("data_types", "activation_checkpointing", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"),
    *("comms_logger", "timers", "autotuning", "aio", "compile", "checkpoint", "datastates_ckpt", "data_efficiency"),
    *("pipeline", "hybrid_engine", "weight_quantization", "tensor_parallel", "expert_parallel", "torch_autocast"),
}
SHORT_DTYPES = ("fp32", "fp16", "bf16")
DTYPES = (*SHORT_DTYPES, "float32", "float16", "bfloat16", "float", "half", "int8")
CHOICES = {
    "communication_data_type": SHORT_DTYPES,
    "seq_parallel_communication_data_type": SHORT_DTYPES,
    "data_types.grad_accum_dtype": DTYPES,
    "torch_autocast.dtype": DTYPES,
    "checkpoint.tag_validation": ("warn", "ignore", "fail"),
    "gradient_allreduce_op": ("mean", "sum"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
}
# Whole numbers that DeepSpeed uses only when a step is taken.
NUMBERS = {
    "flops_profiler": ("profile_step", "module_depth", "top_modules"),
    "autotuning": ("start_profile_step", "end_profile_step", "num_tuning_micro_batch_sizes"),
}
# Packages that a part imports when it is enabled.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "datastates_ckpt": "datastates"}


def check_features(config: Mapping[str, Any]) -> None:
    """Check those parts of the `deepspeed:` section that only DeepSpeed reads.

    Raises:
        UserError: a part is not a mapping, a value is not one of the choices, or a package is missing.
    """
    for name in sorted(FEATURES & set(config)):
        part = config[name]
        if not isinstance(part, Mapping):
            raise UserError(f"deepspeed: {name}: got {shown(part)}; expected keys and values")
        on = part.get("enabled", name == "datastates_ckpt" and bool(part))
        if on is not None and type(on) is not bool and on not in (0, 1):
            raise UserError(f"deepspeed: {name}.enabled: got {shown(on)}; expected true or false")
        for key in NUMBERS.get(name, ()):
            if part.get(key) is not None and type(part[key]) is not int:
                raise UserError(f"deepspeed: {name}.{key}: got {shown(part[key])}; expected a whole number")
        package = PACKAGES.get(name)
        if on and package and importlib.util.find_spec(package) is None:
            raise UserError(f"deepspeed: {name} needs the package {package}; install it, or leave {name} out")
    for name, choices in CHOICES.items():
        part, _, key = name.rpartition(".")
        value = (config.get(part, {}) if part else config).get(key)
        if value is not None and str(value).lower().removeprefix("torch.") not in choices:
            raise UserError(f"deepspeed: {name}: got {shown(value)}; it can be {', '.join(choices)}")
    factor = config.get("gradient_predivide_factor", 1)
    if type(factor) not in (int, float) or not factor > 0:
        raise UserError(f"deepspeed: gradient_predivide_factor: got {shown(factor)}; expected a positive number")
    modules = config.get("torch_autocast", {}).get("lower_precision_safe_modules")
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise UserError(
            f"deepspeed: torch_autocast.lower_precision_safe_modules: got {shown(modules)}; expected a list of texts"
        )


def complaint(error: Exception, section: Mapping[str, Any]) -> str:
    """Return DeepSpeed's error about its section as one line, with the key if it is known."""
    text = " ".join(str(error).split()).partition(" For further information")[0] or type(error).__name__
    key = next(_keys_in(text, section), ())
    return f"{dotted(('deepspeed', *key))}: {one_line(text, 500)}"


def _keys_in(text: str, section: Mapping[str, Any]) -> Iterator[Key]:
    """Yield the keys of a section that a message may be about, likely ones first."""
    keys = [(*key, name) for key, node in walk(section) if isinstance(node, Mapping) for name in node]
    words = set(re.findall(r"\w+", text))
    named = [key for key in keys if key[-1] in words]
    squeezed = text.lower()
    yield from (key for key in named if len(key) > 1 and str(key[-2]).replace("_", "") in squeezed)
    yield from sorted(named, key=len, reverse=True)
    for key in keys:
        value: Any = section
        for part in key:
            value = value[part]
        if isinstance(value, str) and len(value) > 1 and repr(value) in text:
            yield key

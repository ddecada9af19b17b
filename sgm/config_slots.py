"""Check the classes that a configuration names (`target:`) before they are called."""

import importlib
import inspect
from abc import ABCMeta
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Slot:
    """The kind of class that a key of a configuration takes.

    Args:
        what: the kind in words.
        base: import path of the required base class.
        methods: further required methods.
    """

    what: str
    base: str | None = None
    methods: tuple[str, ...] = ()


_MODULE = "torch.nn.Module"
_MIXIN = Slot("SwissArmyTransformer's mixins", "sat.model.base_model.BaseMixin")
_CALLED = ("__call__",)

# By the name of the key; for items of a list, the key of the list.
SLOTS = {
    "model": Slot("engines that Lightning trains", "pytorch_lightning.LightningModule"),
    "denoiser_config": Slot("denoisers", _MODULE),
    "weighting_config": Slot("weightings", methods=_CALLED),
    "scaling_config": Slot("scalings", methods=_CALLED),
    "discretization_config": Slot("noise schedules", methods=_CALLED),
    "sampler_config": Slot("samplers", methods=_CALLED),
    "guider_config": Slot("guiders", methods=(*_CALLED, "prepare_inputs")),
    "dyn_thresh_config": Slot("ways to combine the halves of a guided batch", methods=_CALLED),
    "loss_fn_config": Slot("diffusion losses", _MODULE),
    "sigma_sampler_config": Slot("samplers of noise levels", methods=_CALLED),
    "conditioner_config": Slot("conditioners", _MODULE),
    "emb_models": Slot("embedders", "sgm.modules.encoders.modules.AbstractEmbModel"),
    "network_config": Slot("networks", _MODULE),
    "pos_embed_config": _MIXIN,
    "patch_embed_config": _MIXIN,
    "adaln_layer_config": _MIXIN,
    "final_layer_config": _MIXIN,
    "lora_config": _MIXIN,
    "first_stage_config": Slot("autoencoders", _MODULE),
    "encoder_config": Slot("encoders", _MODULE),
    "decoder_config": Slot("decoders", _MODULE),
    "regularizer_config": Slot("regularizers", _MODULE),
    "loss_config": Slot("losses", _MODULE),
    "discriminator_config": Slot("discriminators", _MODULE),
    "optimizer_config": Slot("optimizers", "torch.optim.Optimizer"),
    "optimizer": Slot("optimizers", "torch.optim.Optimizer"),
    "scheduler_config": Slot("schedules", methods=_CALLED),
    "ckpt_engine": Slot("checkpoint loaders", methods=_CALLED),
    "network_wrapper": Slot("wrappers of the network", _MODULE),
    "data": Slot("datasets", methods=("create_dataset_function",)),
}


def why_not(kind: Any, name: str | None) -> str | None:
    """Return the reason why an object may not be the class for key `name`; None if it may.

    The object is not called. Anything but a class is refused for every key.
    """
    slot = SLOTS.get(name) if name is not None else None
    wanted = f"is not a class of {slot.what}" if slot else "is not a class"
    if not inspect.isclass(kind):
        return f"{wanted} but a {type(kind).__name__}"
    if slot is None:
        return None
    if slot.base is not None and not issubclass(kind, _imported(slot.base)):
        return f"{wanted}: it does not derive from {slot.base}"
    for method in slot.methods:
        if not any(method in vars(base) for base in kind.__mro__):
            return f"{wanted}: it has no {method}"
    if isinstance(kind, ABCMeta) and inspect.isabstract(kind):
        return f"{wanted}: it is abstract, without {', '.join(sorted(kind.__abstractmethods__))}"
    return None


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)

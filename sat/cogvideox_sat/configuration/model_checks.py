"""Build and try every object of the `model:` section without memory or weights.

So a value that a constructor refuses, or that fails only at a sampler's first step, costs seconds.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.configuration.model_values import SIZES, host_memory
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.shipped_configs import find_reference, targets
from sgm.config_places import Place, current_place, section, within
from sgm.config_values import problem_of_params
from sgm.errors import UserError, shown
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.util import class_of_config, error_at, instantiate_from_config, reporting

WEIGHTS = ("ckpt_path", "ckpt_engine")
TRIED = (1, 2, 4, 2, 2)  # (batch, frames, channels, height, width) of latents for trying samplers and losses


def check_model(settings: EngineSettings, parts: tuple[str, ...], steps: int | None = None) -> None:
    """Check that the parts of a model can be built from its configuration.

    The check loads no weights, keeps no memory and does not change the state of the random numbers.

    Args:
        parts: those of the engine that will be built: `conditioner`, `first_stage_model`, `model`.
        steps: sampling steps; None: the sampler's own number.

    Raises:
        UserError: the file and key of the first object that cannot be built or fails when it is tried.
    """
    config = settings.model_config
    with torch.random.fork_rng(devices=[]), section("model", config, settings.sources):
        check_schedules(config)
        check_steps(config, steps)
        if "conditioner" in parts:
            check_conditioner(config["conditioner_config"])
        if "first_stage_model" in parts:
            check_size(instantiate_on_meta(without_weights(config["first_stage_config"])), "first_stage_config")
        if "model" in parts:
            network = instantiate_on_meta(network_config(config["network_config"], settings.model_parallel_size))
            check_size(network, "network_config", allocated=not settings.load)


def check_schedules(config: Mapping[str, Any]) -> None:
    """Build the denoiser, and build and try the sampler and the loss, if they are described."""
    denoiser_config = config["denoiser_config"]
    denoiser = instantiate_from_config(denoiser_config)
    for name, tried in (("sampler_config", try_sampler), ("loss_fn_config", try_loss)):
        if not config.get(name):
            continue
        built = instantiate_from_config(config[name])
        if not all(target.startswith("sgm.") for part in (config[name], denoiser_config) for target in targets(part)):
            continue  # a class of the user's may need other inputs than those that are tried
        parent = _here()
        place = Place((*parent.key, name), config[name], parent.sources, building=True)
        with reporting(place, parent, partial(tried, denoiser=shipped_denoiser(denoiser_config))):
            tried(built, denoiser)


def check_steps(config: Mapping[str, Any], steps: int | None) -> None:
    """Check that the sampler can take this many steps.

    Args:
        steps: None: the sampler's own number.

    Raises:
        UserError: the sampler cannot take them.
    """
    if steps is not None and config.get("sampler_config"):
        check_sampler_steps(instantiate_from_config(config["sampler_config"]), steps)


def check_sampler_steps(sampler: Any, steps: int, name: str = "sampling_num_steps") -> None:
    """Check that a sampler can take this many steps.

    A sampler of the user's own that has no `schedule` can take any number.

    Args:
        name: the argument that gives the number.

    Raises:
        UserError: the sampler cannot take them.
    """
    _, most = SIZES["num_steps"]
    if steps > most:  # the table of the schedule would not fit into memory
        raise UserError(f"{name}: got {steps}; it can be up to {most}")
    try:
        if hasattr(sampler, "schedule"):
            sampler.schedule(steps)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def shipped_denoiser(config: Any) -> nn.Module | None:
    """Return a shipped file's denoiser of the same class; None for a class of the user's."""
    reference = find_reference("denoiser_config", config)
    with within(None):
        return None if reference is None else instantiate_from_config(reference)


def try_sampler(sampler: Any, denoiser: nn.Module) -> None:
    """Take two steps on small latents, with a network that predicts zeros.

    The sampler shows no progress bar afterwards.

    Raises:
        UserError: the latents are not finite.
    """
    cond = {"crossattn": torch.zeros(1, 1, 1)}
    steps = min(sampler.num_steps or 2, 2) if type(sampler.num_steps) in (int, type(None)) else sampler.num_steps
    hide_bar(sampler)

    def denoise(x: Tensor, level: Tensor, c: Mapping[str, Tensor], **model_inputs: Any) -> Tensor:
        return denoiser(_no_network, x, level, c, **model_inputs)

    if sampler.num_steps is not None and hasattr(sampler, "schedule"):
        sampler.schedule(sampler.num_steps)
    latents = sampler(denoise, torch.zeros(TRIED), cond, uc=cond, num_steps=steps)
    if not torch.isfinite(latents).all():
        raise UserError("two steps from zeros give values that are not finite; lower the sampler's numbers")


def try_loss(loss: nn.Module, denoiser: nn.Module) -> None:
    """Compute the loss of small latents, with a network that predicts zeros.

    Raises:
        UserError: the loss is not a tensor.
    """
    value = loss(_no_network, denoiser, lambda batch: {"crossattn": torch.zeros(1, 1, 1)}, torch.zeros(TRIED), {})
    if not isinstance(value, Tensor):
        raise UserError(f"the loss of a batch: got {shown(value)}; expected a tensor with one number per sample")


def _no_network(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(x)


def check_conditioner(config: Mapping[str, Any]) -> None:
    """Check the classes and parameters of a conditioner's embedders.

    The embedders are not built, since they would load their weights.
    """
    place = _here()
    kind = class_of_config(config)
    if problem := problem_of_params(kind, config.get("params") or {}, {}):
        raise error_at(place.below("conditioner_config", "params", *problem.key), problem.text)
    embedders = (config.get("params") or {}).get("emb_models")
    for index, embedder in enumerate(embedders if isinstance(embedders, list) else ()):
        at = place.below("conditioner_config", "params", "emb_models", index)
        kind = class_of_config(embedder, Place(at.key, embedder, at.sources))
        if problem := problem_of_params(kind, embedder.get("params") or {}, {"dtype": None}):
            raise error_at(at.below("params", *problem.key), problem.text)


def without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose object loads no weights when it is built."""
    params = config.get("params")
    if not isinstance(params, Mapping):
        return dict(config)
    return {**config, "params": {name: value for name, value in params.items() if name not in WEIGHTS}}


def network_config(config: Mapping[str, Any], size: int | None) -> Mapping[str, Any]:
    """Return the configuration of a network that `size` processes share.

    Args:
        size: None: as many as the configuration says.
    """
    params = config.get("params")
    if size is None or not isinstance(params, Mapping) or not isinstance(params.get("transformer_args"), Mapping):
        return config
    transformer = {**params["transformer_args"], "model_parallel_size": size}
    return {**config, "params": {**params, "transformer_args": transformer}}


def check_autoencoder_sizes(params: Mapping[str, Any]) -> None:
    """Check that the parts of an autoencoder fit into memory, before any of it is allocated.

    Args:
        params: those of the autoencoder, or of the engine that trains one.

    Raises:
        UserError: a part does not fit, or cannot be built.
    """
    loss = params.get("loss_config")
    loss = (loss.get("params") if isinstance(loss, Mapping) else None) or {}
    place = current_place()
    for config in (params.get("encoder_config"), params.get("decoder_config"), loss.get("discriminator_config")):
        if isinstance(config, Mapping) and str(config.get("target")).startswith(("sgm.", "vae_modules.")):
            key = place.find(config) if place else None
            check_size(instantiate_on_meta(config), *(key or ()))


def check_size(module: nn.Module, *key: str | int, allocated: bool = True) -> None:
    """Check that a module on the meta device would fit into memory, else raise UserError.

    Args:
        key: the key of its configuration, below the object that is being built.
        allocated: memory for the module is taken before its weights are read. If it is not, weights of other sizes are
            refused first.
    """
    tensors = [*module.parameters(), *module.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if allocated and size > host_memory():
        raise error_at(
            _here().below(*key, "params"),
            f"with these sizes it takes {size / 2**30:.0f} GiB, and the machine has {host_memory() / 2**30:.0f} GiB; "
            "lower the sizes",
        )


def _here() -> Place:
    """Return the place of the object that is being built, or an empty place if it has none."""
    return current_place() or Place((), None)

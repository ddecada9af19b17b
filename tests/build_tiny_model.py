"""Build tiny models with random weights, without downloads, from configurations.

  python tests/build_tiny_model.py --config tests/configs/5b.yaml --seed 1 --force

Each configuration names the targets: the network goes to `args.load`, the VAE to `ckpt_path` of `first_stage_config`,
the T5 encoder to `model_dir` of the conditioner. Configurations may share parts. An existing part that fits its
configuration and the seed is kept; a file of another origin is never changed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from sgm.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("build_tiny_model")

VERSION = 1  # raise it when equal configurations and seeds give other files
ITERATION = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        nargs="+",
        type=Path,
        required=True,
        metavar="YAML",
        help="model configurations; those without a model section are merged into the others",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and vocabulary (default: 0)")
    parser.add_argument("--force", action="store_true", help="rebuild existing parts")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    try:
        build(parts_of(read_models(options.config), options.seed), options.force)
    except UserError as error:
        logger.error("error: %s", error)
        return 1
    return 0


@dataclass(frozen=True)
class Part:
    """A file or folder of the model.

    Args:
        path: its target.
        settings: everything that its content depends on; parts of equal settings are equal.
        write: writes the part to a path.
    """

    path: Path
    settings: Mapping[str, Any]
    write: Callable[[Path], None]

    @property
    def marker(self) -> Path:
        """Return the file beside `path` with the fingerprint of the part."""
        return self.path.with_name(f".{self.path.name}.built")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, self.settings], sort_keys=True).encode()).hexdigest()

    def is_built(self) -> bool:
        return self.path.exists() and self.marker.is_file() and self.marker.read_text() == self.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def read_models(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Return the configuration of every model among the files.

    Files without a model are merged into each model's configuration.
    """
    models = [path for path in paths if "network_config" in (load_configs([path]).get("model") or {})]
    if not models:
        raise UserError(f"none of {', '.join(map(str, paths))} has a model.network_config")
    others = [path for path in paths if path not in models]
    return {path: load_configs([path, *others]) for path in models}


def parts_of(models: Mapping[Path, Mapping[str, Any]], seed: int) -> list[Part]:
    """Return the parts of all models, shared ones once."""
    parts: dict[Path, Part] = {}
    for source, config in models.items():
        for part in (text_encoder(config, source, seed), vae(config, source, seed), network(config, source, seed)):
            known = parts.setdefault(part.path.absolute(), part)
            if known.fingerprint != part.fingerprint:
                raise UserError(f"{source}: {part.path} is claimed by another configuration with other settings")
    return list(parts.values())


def text_encoder(config: Mapping[str, Any], source: Path, seed: int) -> Part:
    from cogvideox_sat.shapes.tiny_text_encoder import HEAD_DIM, build_text_encoder

    modules = lookup(config, source, "model.network_config.params.modules")
    hidden_size = lookup(modules, source, "patch_embed_config.params.text_hidden_size")
    if hidden_size % HEAD_DIM:
        raise UserError(f"{source}: text_hidden_size: got {hidden_size}; it must be a multiple of {HEAD_DIM}")
    embedders = lookup(config, source, "model.conditioner_config.params.emb_models")
    folder = Path(lookup(embedders[0], source, "params.model_dir"))
    settings = {"kind": "text encoder", "seed": seed, "hidden_size": hidden_size}
    return Part(folder, settings, lambda path: build_text_encoder(path, hidden_size, seed))


def vae(config: Mapping[str, Any], source: Path, seed: int) -> Part:
    path = Path(lookup(config, source, "model.first_stage_config.params.ckpt_path"))
    first_stage = lookup(config, source, "model.first_stage_config")
    first_stage = {**first_stage, "params": {**first_stage["params"], "ckpt_path": None}}

    def write(path: Path) -> None:
        import torch

        state = seeded_module(first_stage, seed).state_dict()
        # Random features have a mean, which would tint every video, and would saturate a third of its pixels.
        last = state["decoder.conv_out.conv.weight"]
        last -= last.mean(dim=(1, 2, 3, 4), keepdim=True)
        last /= 3
        torch.save({"state_dict": state}, path)

    return Part(path, {"kind": "vae", "seed": seed, "config": first_stage}, write)


def network(config: Mapping[str, Any], source: Path, seed: int) -> Part:
    folder = Path(lookup(config, source, "args.load"))
    network_config = lookup(config, source, "model.network_config")
    # The checkpoint is the base network of a LoRA.
    modules = {name: module for name, module in network_config["params"]["modules"].items() if name != "lora_config"}
    network_config = {**network_config, "params": {**network_config["params"], "modules": modules}}

    def write(path: Path) -> None:
        import torch

        state = seeded_module(network_config, seed).state_dict()
        (path / ITERATION).mkdir(parents=True)
        weights = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        torch.save({"module": weights}, path / ITERATION / "mp_rank_00_model_states.pt")
        (path / "latest").write_text(ITERATION)

    return Part(folder, {"kind": "network", "seed": seed, "config": network_config}, write)


def lookup(config: Mapping[str, Any], source: Path, key: str) -> Any:
    """Return the value at a dotted key.

    Raises:
        UserError: the value is missing or empty.
    """
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        raise UserError(f"{source}: '{key}' is missing")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def build(parts: Sequence[Part], force: bool) -> None:
    """Write missing parts, each atomically."""
    if not force and all(part.is_built() for part in parts):
        return
    with lock():
        for part in parts:
            if force or not part.is_built():
                place(part)


def place(part: Part) -> None:
    if part.path.exists() and not part.marker.is_file():
        raise UserError(f"{part.path} exists and was not built by this tool; move it or change the configuration")
    logger.info("building the tiny %s: %s", part.settings["kind"], part.path)
    try:
        part.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=part.path.parent, prefix=".building-") as temporary:
            new, old = Path(temporary) / part.path.name, Path(temporary) / "old"
            part.write(new)
            if part.path.exists():
                part.path.rename(old)
            # The marker comes first: without its part it is ignored, but a part without marker would not be replaced.
            part.marker.write_text(part.fingerprint)
            new.rename(part.path)
    except OSError as error:
        raise UserError(f"cannot write {part.path}: {error.strerror or error}") from error


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Let one process build at a time; others wait, and then find the parts."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def seeded_module(config: Mapping[str, Any], seed: int) -> "nn.Module":
    """Return the module of a configuration, in float32, with parameters drawn from `seed`.

    Matrices and kernels are N(0, 1/fan_in), which keeps the scale of activations between layers; norms are the
    identity, biases zero. Frozen parameters (tables) and buffers keep their values.
    """
    import torch

    from sgm.util import instantiate_from_config

    module = instantiate_from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


if __name__ == "__main__":
    sys.exit(main())

"""Small networks with LoRA of every family, as checkpoints in all forms of the tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, is_adapter
from cogvideox_sat.weights.loading import load_network
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference

FAMILIES = ("t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15")


@dataclass(frozen=True)
class AdaptedNetwork:
    """A network with an adapter, and its checkpoints below `folder`.

    `base` is the network without the adapter, `full` has both, `run` has only the adapter and the configuration of a
    run.
    """

    case: dict[str, Any]
    config: dict[str, Any]
    network: nn.Module
    folder: Path

    @property
    def params(self) -> dict[str, Any]:
        return self.case["network_config"]["params"]

    @property
    def adapter(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.network.state_dict().items() if is_adapter(name)}

    @torch.no_grad()
    def output(self, network: nn.Module | None = None) -> Tensor:
        """Return the output of a network, by default this one, for the family's inputs."""
        return (network or self.network)(*self.inputs(), ofs=self.ofs)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _, h, w = self.case["latent"]
        x = seeded_input("x", (b, t, self.params["in_channels"], h, w))
        return x, torch.tensor(self.case["timesteps"]), seeded_input("context", self.case["context"])

    @property
    def ofs(self) -> Tensor | None:
        return None if self.case["ofs"] is None else torch.tensor(self.case["ofs"])

    def loaded(self, load: Path, lora_load: Path | None = None) -> nn.Module:
        """Return the network from checkpoints, with an adapter if one is given."""
        network = instantiate_on_meta(self.config if lora_load else self.case["network_config"])
        load_network(network, load, lora_load=lora_load)
        return network.eval()


def adapted_network(
    folder: Path,
    name: str,
    rank: int = 4,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdaptedNetwork:
    """Return a network with an adapter.

    Args:
        alpha: None: the configuration has no alpha.
    """
    case = Reference(f"dit/{name}").case
    config = with_lora(case["network_config"], rank, alpha)
    network = instantiate_from_config(config).eval()
    seed_module_(network, skip=("freqs_", *(["pos_embedding"] if case["kind"] == "2b" else [])))
    adapted = {entry: tensor for entry, tensor in network.state_dict().items() if is_adapter(entry)}
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapted.values():  # large values, so that a missing or exchanged part is visible
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5)
    network.to(dtype)
    weights = network.state_dict()
    base = {entry.replace(".original.", "."): tensor for entry, tensor in weights.items() if not is_adapter(entry)}
    save(base, folder / "base", "1")
    save(weights, folder / "full", "7")
    save({entry: weights[entry] for entry in adapted}, folder / "run", "10")
    content = {"args": {"load": str(folder / "base")}, "model": {"network_config": config}}
    for run in ("full", "run"):
        (folder / run / "training_config.yaml").write_text(yaml.safe_dump(content))
    return AdaptedNetwork(case, config, network, folder)


def random_adapter(folder: Path, width: int, layers: int, rank: int) -> None:
    """Write an adapter with random matrices on all layers, without the network's weights."""
    generator, adapter = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        for module, parts in (("query_key_value", 3), ("dense", 1)):
            for part in range(parts):
                name = f"transformer.layers.{layer}.attention.{module}.matrix"
                adapter[f"{name}_A.{part}"] = torch.randn(rank, width, generator=generator)
                adapter[f"{name}_B.{part}"] = torch.randn(width, rank, generator=generator)
    save(adapter, folder, "1")


def with_lora(config: dict[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    params = {"r": rank} if alpha is None else {"r": rank, "lora_alpha": alpha}
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
    modules = {**config["params"]["modules"], "lora_config": lora}
    return {**config, "params": {**config["params"], "modules": modules}}


def save(weights: dict[str, Tensor], folder: Path, iteration: str) -> Path:
    """Write a checkpoint in SwissArmyTransformer's layout; return its file."""
    file = folder / iteration / "mp_rank_00_model_states.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {NETWORK_PREFIX + name: tensor.clone() for name, tensor in weights.items()}}, file)
    (folder / "latest").write_text(iteration)
    return file

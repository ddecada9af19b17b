"""A network split over two processes computes what one process does, and each holds its own share of the weights."""

import pytest
import torch

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.loading import load_network, shares_of_rank
from distributed import run_distributed
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference, assert_close

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def network_config(name: str, model_parallel_size: int) -> dict:
    config = Reference(f"dit/{name}").case["network_config"]
    config["params"]["transformer_args"]["model_parallel_size"] = model_parallel_size
    return config


def inputs(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        "x": seeded_input("x", (2, 2, network.in_channels, 8, 12)),
        "timesteps": torch.tensor([37, 811]),
        "context": seeded_input("context", (2, 16, 64)),
        "ofs": torch.tensor([2.0, 2.0]),
    }


def outputs_of_rank(checkpoints: dict[str, str]) -> dict[str, tuple[torch.Tensor, int]]:
    """Of every network: what this rank computes, and how many rows it holds of the first qkv weight."""
    outputs = {}
    for name, checkpoint in checkpoints.items():
        network = instantiate_on_meta(network_config(name, 2))
        load_network(network, checkpoint)
        with torch.no_grad():
            rows = network.transformer.layers[0].attention.query_key_value.weight.shape[0]
            outputs[name] = network(**inputs(network)), rows
    return outputs


def test_two_processes_equal_one(tmp_path):
    expected, checkpoints = {}, {}
    for name in ("t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15"):
        network = seed_module_(instantiate_from_config(network_config(name, 1)))
        weights = {f"model.diffusion_model.{key}": value for key, value in network.state_dict().items()}
        checkpoints[name] = str(tmp_path / f"{name}.pt")
        torch.save({"module": weights}, checkpoints[name])
        if name == "t2v_5b":  # also of four ranks, of which two processes take two each
            checkpoints[name] = str(tmp_path / name)
            (tmp_path / name).mkdir()
            for rank in range(4):
                share = shares_of_rank(network, network.state_dict(), rank, 4)
                torch.save({"module": share}, tmp_path / name / f"mp_rank_0{rank}_model_states.pt")
        with torch.no_grad():
            expected[name] = network(**inputs(network))
    for outputs in run_distributed(outputs_of_rank, 2, checkpoints):
        for name, (output, rows) in outputs.items():
            assert_close(output, expected[name], 1e-4)
            assert rows == 3 * 64 // 2

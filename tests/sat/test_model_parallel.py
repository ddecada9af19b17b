"""A network split over two processes computes what one process does, and each holds its own share of the weights."""

import torch

from distributed import run_distributed
from network_weights import allocate_on_meta, load_network
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference, assert_close


def network_config(name: str, model_parallel_size: int) -> dict:
    config = Reference(f"dit/{name}").case["network_config"]
    config["params"]["transformer_args"]["model_parallel_size"] = model_parallel_size
    return config


def inputs() -> dict[str, torch.Tensor]:
    return {
        "x": seeded_input("x", (2, 3, 16, 8, 12)),
        "timesteps": torch.tensor([37, 811]),
        "context": seeded_input("context", (2, 16, 64)),
    }


def output_of_rank(name: str, checkpoint: str) -> tuple[torch.Tensor, int]:
    with allocate_on_meta():
        network = instantiate_from_config(network_config(name, 2))
    load_network(network, checkpoint)
    qkv = network.transformer.layers[0].attention.query_key_value.weight
    with torch.no_grad():
        return network(**inputs()), qkv.shape[0]


def test_two_processes_equal_one(tmp_path):
    for name in ("t2v_2b", "t2v_5b"):
        network = seed_module_(instantiate_from_config(network_config(name, 1)))
        checkpoint = tmp_path / f"{name}.pt"
        torch.save({"module": {f"model.diffusion_model.{k}": v for k, v in network.state_dict().items()}}, checkpoint)
        with torch.no_grad():
            expected = network(**inputs())
        qkv = network.transformer.layers[0].attention.query_key_value.weight
        for output, rows in run_distributed(output_of_rank, 2, name, str(checkpoint)):
            assert_close(output, expected, 1e-4)
            assert rows == qkv.shape[0] // 2

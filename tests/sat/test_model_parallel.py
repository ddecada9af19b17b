"""A network on two processes computes the same as one, with half of the weights each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.sampling.requests import Latents, SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from cogvideox_sat.weights.checkpoint_files import is_adapter
from cogvideox_sat.weights.loading import load_network
from cogvideox_sat.weights.rank_shares import cuts_of, recut
from distributed import run_distributed
from lora_adapters import FAMILIES, adapted_network, random_adapter, save
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference, assert_close, relative_error

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


def outputs_of_rank(checkpoints: dict[str, str]) -> dict[str, tuple[torch.Tensor, int, list[torch.Size]]]:
    """Return this rank's outputs, its rows of the first qkv weight, and its sums."""
    outputs, summed = {}, []
    all_reduce = torch.distributed.all_reduce

    def counted(x: torch.Tensor, *args, **kwargs) -> None:
        summed.append(x.shape)
        all_reduce(x, *args, **kwargs)

    torch.distributed.all_reduce = counted
    for name, checkpoint in checkpoints.items():
        network = instantiate_on_meta(network_config(name, 2))
        load_network(network, checkpoint)
        with torch.no_grad():
            rows = network.transformer.layers[0].attention.query_key_value.weight.shape[0]
            summed.clear()
            outputs[name] = network(**inputs(network)), rows, list(summed)
    torch.distributed.all_reduce = all_reduce
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
                share = recut([network.state_dict()], cuts_of(network), rank, 4, "it")
                torch.save({"module": share}, tmp_path / name / f"mp_rank_0{rank}_model_states.pt")
        with torch.no_grad():
            expected[name] = network(**inputs(network))
    for outputs in run_distributed(outputs_of_rank, 2, checkpoints):
        for name, (output, rows, summed) in outputs.items():
            assert_close(output, expected[name], 1e-4)
            assert rows == 3 * 64 // 2
            layers = network_config(name, 1)["params"]["num_layers"]
            assert len(summed) == 2 * layers and {shape[-1] for shape in summed} == {64}  # all tokens, the full width


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def save_shares(network: torch.nn.Module, folder: Path, size: int) -> None:
    """Write an adapter as so many ranks do."""
    adapter = {name: tensor for name, tensor in network.state_dict().items() if is_adapter(name)}
    for rank in range(size):
        share = recut([adapter], cuts_of(network), rank, size, "it")
        save(share, folder, "1").rename(folder / "1" / f"mp_rank_0{rank}_model_states.pt.part")
    for part in folder.rglob("*.part"):
        part.rename(part.with_suffix(""))


def output_and_gradients(
    network: torch.nn.Module, called: tuple[tuple[Tensor, ...], Tensor | None]
) -> dict[str, Tensor]:
    """Return a network's output, and its adapter's gradients behind a dropout."""
    inputs, ofs = called
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for module in network.modules():
        if hasattr(module, "matrix_A"):
            module.lora_dropout = torch.nn.Dropout(0.2)
    torch.manual_seed(3)
    out = network.train()(*inputs, ofs=ofs)
    (out * seeded_input("weight", out.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if is_adapter(name)}
    return {"output": out.detach(), **gradients}


def adapted_of_rank(
    cases: dict[str, tuple[dict, str, str, Any]], asked: tuple[str, str, str]
) -> tuple[dict, dict, Tensor]:
    """Return output and gradients of this rank for every family, and a video's latents.

    The first family has a new adapter.
    """
    results = {}
    for name, (config, base, adapter, called) in cases.items():
        config["params"]["transformer_args"]["model_parallel_size"] = 2
        network = instantiate_on_meta(config)
        load_network(network, base, lora_load=adapter)
        results[name] = output_and_gradients(network, called)
    new = instantiate_on_meta(config)
    torch.manual_seed(0)
    load_network(new, base, new_adapter=True)
    drawn = {name: tensor for name, tensor in new.state_dict().items() if "matrix_A" in name}
    return results, drawn, latents(*asked, model_parallel_size=2)


def latents(config: str, adapter: str, scale: str, **changes: Any) -> Tensor:
    loaded = load_configs([config])
    settings = SessionSettings(
        loaded["model"],
        load=loaded["args"]["load"],
        lora_load=adapter,
        lora_scale=float(scale),
        sources=loaded.sources,
        **changes,
    )
    with SamplingSession(settings) as session:
        events = session.sample(SampleRequest("a boat", 7, (32, 48), 3, steps=2))
        return next(event.latents for event in events if isinstance(event, Latents))


def test_adapters_on_two_processes_equal_those_on_one(tmp_path, tiny):
    """Outputs, gradients, initial values and latents are equal for all adapter files.

    The files are of one, two or four ranks.
    """
    cases, expected, networks = {}, {}, {}
    for name, size in zip(FAMILIES, (1, 2, 4, 1, 4), strict=True):
        adapted = adapted_network(tmp_path / name, name, alpha=3)
        adapter = tmp_path / name / "run"
        if size > 1:
            save_shares(adapted.network, adapter := tmp_path / name / "shares", size)
        networks[name] = adapted.loaded(tmp_path / name / "base", adapter)
        cases[name] = adapted.config, str(tmp_path / name / "base"), str(adapter), (adapted.inputs(), adapted.ofs)
        expected[name] = output_and_gradients(networks[name], cases[name][3])
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}
    params = {"network_config": {"params": {"modules": {"lora_config": lora}}}}
    random_adapter(tmp_path / "adapter", 256, 2, 4)
    asked = str(tiny.variant("5b", tmp_path / "lora.yaml", model=params)), str(tmp_path / "adapter"), "0.02"
    new = instantiate_on_meta(cases["i2v_15"][0])
    torch.manual_seed(0)
    load_network(new, tmp_path / "i2v_15" / "base", new_adapter=True)
    for rank, (results, drawn, found) in enumerate(run_distributed(adapted_of_rank, 2, cases, asked)):
        for name, result in results.items():
            shares = recut([expected[name]], cuts_of(networks[name]), rank, 2, "it")
            assert_close(result["output"], shares["output"], 1e-5)
            for matrix, gradient in shares.items():
                assert relative_error(result[matrix], gradient) < 1e-4, (name, matrix)
        whole = {name: tensor for name, tensor in new.state_dict().items() if name in drawn}
        assert all(torch.equal(drawn[name], share) for name, share in recut([whole], cuts_of(new), rank, 2, "").items())
        assert relative_error(found, latents(*asked)) < 1e-4
    assert relative_error(latents(*asked[:2], "0"), latents(*asked)) > 1e-2

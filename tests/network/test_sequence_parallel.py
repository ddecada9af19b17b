"""Processes with a share of the tokens compute the same as one, with gradients."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideox_sat.memory.weightless import FirstOfGroup
from cogvideox_sat.network.sequence_parallel import TokenShare
from distributed import run_distributed
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm.attention_kernels import attend
from sgm.context_parallel import sum_over_ranks
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import Reference, assert_close, needs_compiler, relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ATTENTION = [(heads, tokens) for heads in (4, 5, 6, 30) for tokens in (17, 64)]
NETWORKS = ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15", "t2v_2b_lora", "i2v_5b_lora"]


# ---------------------------------------------------------------------------------------------------------------------
# Attention alone
# ---------------------------------------------------------------------------------------------------------------------


def projections(heads: int, tokens: int) -> list[Tensor]:
    """Return q, k, v and a cotangent, (2, heads, tokens, 8)."""
    return [seeded_input(f"{name}{heads}", (2, heads, tokens, 8)) for name in "qkvc"]


def attention_of_a_rank() -> list[dict[str, Tensor]]:
    results = []
    for heads, tokens in ATTENTION:
        share = TokenShare.of(tokens, 5, heads, dist.group.WORLD)
        *inputs, cotangent = (share.own_tokens(x.transpose(1, 2)).transpose(1, 2) for x in projections(heads, tokens))
        for x in inputs:
            x.requires_grad_(True)
        out = share.attend(attend)(*inputs)
        (out * cotangent).sum().backward()
        halved = [x.detach().bfloat16() for x in inputs]
        results.append(
            {"out": out.detach(), "bf16": share.attend(attend)(*halved).float()}
            | {name: x.grad for name, x in zip("qkv", inputs, strict=True)}
        )
    return results


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_attention_over_processes_is_that_of_one(processes):
    outcomes = run_distributed(attention_of_a_rank, processes)
    for number, (heads, tokens) in enumerate(ATTENTION):
        *inputs, cotangent = projections(heads, tokens)
        for x in inputs:
            x.requires_grad_(True)
        out = attend(*inputs)
        (out * cotangent).sum().backward()
        expected = {"out": out} | {name: x.grad for name, x in zip("qkv", inputs, strict=True)}
        joined = {name: torch.cat([each[number][name] for each in outcomes], dim=2) for name in outcomes[0][number]}
        for name, value in expected.items():
            assert_close(joined[name], value, 1e-6)
        assert_close(joined["bf16"], out, 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """Return a reference's network with six heads, which four processes cannot share evenly."""
    config = copy.deepcopy(Reference(f"dit/{name}").case["network_config"])
    params = config["params"]
    head_dim = params["hidden_size"] // params["num_attention_heads"]
    params |= {"num_attention_heads": 6, "hidden_size": 6 * head_dim}
    network = seed_module_(instantiate_from_config(config)).train()
    network.disable_untrainable_params()
    return network


def inputs(name: str, network: nn.Module) -> dict[str, Any]:
    """Return inputs of an odd number of tokens, so that one process has only text."""
    case = Reference(f"dit/{name}").case
    b, t, _, h, w = case["latent"]
    given = {
        "x": seeded_input("x", (b, t, network.in_channels, h, w)),
        "timesteps": torch.tensor(case["timesteps"]),
        "context": seeded_input("context", (b, t * (h // 2) * (w // 2) + 3, case["context"][2])),
    }
    return given if case["ofs"] is None else {**given, "ofs": torch.tensor(case["ofs"])}


def outputs(network: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the output without gradients and with, and all gradients of a loss."""
    with torch.no_grad():
        sampled = network(**given)
    out = network(**given)
    (out * seeded_input("cotangent", out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"sampled": sampled, "out": out.detach(), **gradients}


class Held:
    """Counts the tokens that layers see."""

    def __init__(self, network: nn.Module):
        self.tokens: set[int] = set()
        for layer in network.transformer.layers:
            layer.mlp.register_forward_pre_hook(lambda _, args: self.tokens.add(args[0].shape[1]))


def network_of_a_rank(names: list[str]) -> list[tuple[dict[str, Tensor], set[int]]]:
    results = []
    for name in names:
        network = build(name)
        network.share_tokens(dist.group.WORLD)
        held = Held(network)
        found = outputs(network, inputs(name, network))
        size = dist.get_world_size()
        found = {
            key: value if key in ("sampled", "out") else sum_over_ranks(value, dist.group.WORLD) / size
            for key, value in found.items()
        }
        results.append((found, held.tokens))
    return results


@pytest.mark.parametrize(
    ("processes", "names"),
    others_long((2, NETWORKS), (3, ["t2v_2b", "i2v_5b_lora"]), (4, ["t2v_5b", "i2v_15"])),
    ids=["2", "3", "4"],
)
def test_networks_over_processes_are_those_of_one(processes, names):
    outcomes = run_distributed(network_of_a_rank, processes, names)
    for number, name in enumerate(names):
        network = build(name)
        held = Held(network)
        expected = outputs(network, inputs(name, network))
        (tokens,) = held.tokens
        shares = [outcome[number][1] for outcome in outcomes]
        assert all(len(share) == 1 for share in shares)
        assert sum(map(sum, shares)) == tokens and max(map(max, shares)) == -(-tokens // processes)
        for found, _ in (outcome[number] for outcome in outcomes):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                if key in ("sampled", "out"):
                    assert_close(found[key], value, 1e-5)
                else:  # a bias of keys has no effect: its gradient is rounding
                    assert relative_error(found[key], value) <= 1e-4 or value.norm() <= 1e-6 * expected["out"].norm()
        first = outcomes[0][number][0]
        assert all(
            torch.equal(outcome[number][0][key], first[key]) for outcome in outcomes for key in ("sampled", "out")
        )


def compiled_on_a_rank(name: str) -> Tensor:
    network = build(name)
    network.share_tokens(dist.group.WORLD)
    assert network.compile_layers()
    with torch.no_grad():
        found = network(**inputs(name, network))
    assert network.compiles_layers
    return found


@needs_compiler
@pytest.mark.long
def test_compiled_layers_exchange_too():
    network = build("t2v_5b")
    with torch.no_grad():
        expected = network(**inputs("t2v_5b", network))
    for found in run_distributed(compiled_on_a_rank, 2, "t2v_5b"):
        assert_close(found, expected, 1e-5)


def test_more_processes_than_heads_is_one_line():
    with pytest.raises(UserError, match="4 processes cannot share 3 attention heads; use 3 at most"):
        TokenShare.of(9, 3, 3, FirstOfGroup(4))
    with pytest.raises(UserError, match="4 processes cannot share 2 tokens"):
        TokenShare.of(2, 1, 8, FirstOfGroup(4))

"""sgm.weights reads every kind of file without running code, and assigns weights."""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sgm.errors import UserError
from sgm.weights import assign_weights, module_weights, read_state_dict


class Tied(nn.Module):
    """Two linear layers that share a weight, with one persistent and one derived buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class Touch:
    """Unpickling this creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def filled(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(value) for name, value in module.state_dict().items()}


# ---------------------------------------------------------------- reading


def test_pickle_is_mapped_and_returned_whole(tmp_path):
    saved = {"module": {"a": torch.randn(4)}, "iteration": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "states.pt")
    content = read_state_dict(tmp_path / "states.pt")
    assert content["iteration"] == 3 and content["args"].lr == 0.1
    torch.testing.assert_close(module_weights(content, what="states.pt")["a"], saved["module"]["a"])


def test_legacy_pickle(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.pt")["a"].tolist() == [1, 1]


def test_rng_states_are_read(tmp_path):
    saved = {"numpy": np.random.RandomState(1).get_state(), "torch": torch.get_rng_state()}
    torch.save(saved, tmp_path / "rng.pt")
    state = np.random.RandomState(2)
    state.set_state(read_state_dict(tmp_path / "rng.pt")["numpy"])
    assert state.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_in_a_pickle_never_runs(tmp_path, write):
    write({"module": Touch(tmp_path / "touched")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt") as refusal:
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}", None])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "broken.pt"
    if content is None:  # a truncated zip archive
        torch.save({"a": torch.randn(1000)}, path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pt"):
        read_state_dict(path)
    path.rename(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        read_state_dict(tmp_path / "broken.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        read_state_dict(tmp_path / "nowhere.pt")


def test_safetensors_single_and_sharded(tmp_path):
    first, second = {"a": torch.randn(2)}, {"b": torch.randn(3)}
    save_file(first, tmp_path / "one.safetensors")
    assert read_state_dict(tmp_path / "one.safetensors")["a"].equal(first["a"])
    assert read_state_dict(tmp_path)["a"].equal(first["a"])
    save_file(second, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="2 safetensors"):
        read_state_dict(tmp_path)

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    for path in (index, tmp_path):
        weights = read_state_dict(path)
        assert weights["a"].equal(first["a"]) and weights["b"].equal(second["b"])
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors"):
        read_state_dict(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="weight_map"):
        read_state_dict(index)


def test_module_weights_picks_the_mapping():
    a = torch.ones(1)
    for content in ({"module": {"a": a}}, {"state_dict": {"a": a}}, {"a": a, "epoch": 2}):
        assert module_weights(content, what="file") == {"a": a}
    for content in ({"module": None, "epoch": 1}, [a], {}):
        with pytest.raises(UserError, match="file holds no weights"):
            module_weights(content, what="file")


# ---------------------------------------------------------------- assigning


def test_assignment_to_meta_shares_storage_and_keeps_ties():
    weights = filled(Tied())
    with torch.device("meta"):
        module = Tied()
    module.table = torch.arange(4.0)
    module.first.weight.requires_grad_(False)
    module.first.weight.model_parallel = True
    del weights["second.weight"]  # given by its twin
    assert assign_weights(module, weights, what="file") == ([], [])
    assert module.first.weight.data_ptr() == weights["first.weight"].data_ptr()
    assert module.second.weight is module.first.weight
    assert module.first.weight.model_parallel and not module.first.weight.requires_grad
    assert module.first.bias.requires_grad
    assert module.scale.equal(weights["scale"])
    assert module.table.tolist() == [0, 1, 2, 3]


def test_dtype_of_the_module_and_device_of_the_caller():
    module = Tied().to(torch.bfloat16)
    weights = filled(Tied())
    assign_weights(module, weights, what="file", device="meta")
    assert module.first.weight.is_meta and module.first.weight.dtype == torch.bfloat16
    assign_weights(module, weights, what="file", device="cpu")
    torch.testing.assert_close(module.first.bias, weights["first.bias"].bfloat16().requires_grad_())


def test_loading_hooks_of_the_class_are_not_involved():
    class Copies(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
            self.weight.data.copy_(state_dict[prefix + "weight"])

    with torch.device("meta"):
        module = nn.Sequential(Copies(2, 2))
    assign_weights(module, {"0.weight": torch.eye(2), "0.bias": torch.ones(2)}, what="file")
    assert module(torch.ones(1, 2)).tolist() == [[2, 2]]


def test_what_does_not_fit_is_named_and_nothing_changes():
    module = nn.Linear(2, 2)
    before = module.weight
    with pytest.raises(UserError, match=r"file does not fit Linear: it does not hold bias"):
        assign_weights(module, {"weight": torch.zeros(2, 2)}, what="file")
    with pytest.raises(UserError, match=r"holds e0, e1, e2 \.\.\. and 12 more"):
        assign_weights(module, {**filled(module), **{f"e{i}": torch.ones(1) for i in range(15)}}, what="file")
    with pytest.raises(UserError, match=r"weight \(3, 2\) instead of \(2, 2\)"):
        assign_weights(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, what="file")
    assert module.weight is before


def test_allowances():
    module = nn.Linear(2, 2)
    bias = module.bias
    given = {"weight": torch.zeros(2, 2), "loss.x": torch.zeros(1)}
    missing, unexpected = assign_weights(module, given, what="file", allow_missing=True, allow_unexpected=["loss."])
    assert (missing, unexpected) == (["bias"], ["loss.x"]) and module.bias is bias
    with pytest.raises(UserError, match=r"loss\.x"):
        assign_weights(module, given, what="file", allow_missing=["bias"], allow_unexpected=["other"])


@pytest.mark.parametrize(
    "elsewhere", ["../outside.safetensors", "{absolute}", "..", "", "a\0b", "a" * 5000, 3, None, ["a"]]
)
def test_an_index_names_files_beside_it_only(tmp_path, elsewhere):
    """It may come from anywhere, and what lies elsewhere on the machine is not its own."""
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, outside)
    index = folder / "model.safetensors.index.json"
    name = str(outside) if elsewhere == "{absolute}" else elsewhere
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"is not beside it|not a safetensors index"):
        read_state_dict(index)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({1: torch.ones(1)}, "not a name of a weight"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is a tensor sparse"),
        ({"a": torch.ones(1, device="meta")}, "'a' is a tensor without values"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "'a' is a tensor of complex numbers"),
    ],
)
def test_tensors_that_no_network_computes_with_are_named(weights, says):
    with pytest.raises(UserError, match=says):
        module_weights({"module": weights}, what="file")

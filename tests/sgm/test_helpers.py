"""The small functions that other projects import from `sgm.util`, and package names."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import ROOT
from sgm import context_parallel, util
from sgm.errors import UserError
from sgm.helpers import (
    append_zero,
    autocast,
    count_params,
    default,
    disabled_train,
    expand_dims_like,
    get_nested_attribute,
    get_string_from_tuple,
    is_power_of_two,
    isheatmap,
    isimage,
    ismap,
    isneighbors,
    load_model_from_config,
    load_partial_from_config,
    log_txt_as_img,
    make_path_absolute,
    mean_flat,
    partialclass,
)


@pytest.mark.slow
@pytest.mark.long
def test_sgm_util_offers_them_without_importing_pytorch_itself():
    code = (
        "import sys, sgm, sgm.util, sgm.models\n"
        "print(any(name in sys.modules for name in ('torch', 'pytorch_lightning')))\n"
        "from sgm.util import default, exists, get_nested_attribute, append_dims, initialize_context_parallel\n"
        "print(default(None, 3), exists(0))\n"
        "from sgm.models import AutoencodingEngine\n"
        "from sgm import AutoencodingEngine as same, instantiate_from_config, get_configs_path\n"
        "print(same is AutoencodingEngine, AutoencodingEngine.__module__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:3] == ["False", "3 True", "True sgm.models.autoencoding_engine"]
    assert util.get_context_parallel_rank is context_parallel.get_context_parallel_rank
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = util.nothing
    with pytest.raises(ImportError):
        from sgm.models import Nothing  # noqa: F401


def test_values():
    assert default(None, list) is list  # a class is a value; only functions are called
    assert default(None, lambda: 3) == 3 and default(False, 3) is False
    assert [n for n in range(-2, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]
    assert get_string_from_tuple("('a', 'b')") == "a" and get_string_from_tuple("plain") == "plain"


def test_nested_attributes():
    model = SimpleNamespace(layers=[SimpleNamespace(weight=5), SimpleNamespace(weight=7)])
    assert get_nested_attribute(model, "layers.1.weight") == 7
    assert get_nested_attribute(model, "layers.1.weight", depth=2) is model.layers[1]
    assert get_nested_attribute(model, "layers.1", return_key=True) == (model.layers[1], 1)
    assert get_nested_attribute(model, "layers.0.weight", return_key=True) == (5, "weight")
    with pytest.raises(AttributeError):
        get_nested_attribute(model, "layers.1.bias")
    with pytest.raises(IndexError):
        get_nested_attribute(model, "layers.2")


def test_tensors():
    x = torch.randn(2, 3, 4)
    assert torch.equal(mean_flat(x), torch.stack([x[0].mean(), x[1].mean()]))
    assert append_zero(torch.tensor([2.0, 1.0])).tolist() == [2.0, 1.0, 0.0]
    assert expand_dims_like(torch.zeros(2), x).shape == (2, 1, 1)
    kinds = {(1, 5, 4, 4): ismap, (1, 3, 4, 4): isimage, (4, 4): isheatmap, (1, 6, 1, 4, 4): isneighbors}
    for shape in kinds:
        for other, function in kinds.items():
            assert function(torch.zeros(shape)) is (shape == other)
        assert not kinds[shape]("no tensor")


def test_pictures_of_text():
    blank, short, long = log_txt_as_img((96, 64), ["", "a", "a red ball rolls over the table " * 3])
    assert blank.shape == (3, 64, 96) and (blank == 1).all()
    assert (short < 0).sum() > 0 and (long < 0).sum() > 10 * (short < 0).sum()
    assert (long[:, 30:] < 0).any()  # broken into lines
    assert short.min() >= -1


def test_modules_and_configurations(tmp_path, monkeypatch):
    layer = nn.Linear(3, 2)
    assert count_params(layer) == 8
    layer.eval()
    layer.train = disabled_train.__get__(layer)
    layer.train()
    assert not layer.training
    narrow = partialclass(nn.Linear, 3, bias=False)
    assert isinstance(narrow(5), nn.Linear) and narrow(5).out_features == 5 and narrow(5).bias is None
    make = load_partial_from_config({"target": "torch.nn.Linear", "params": {"in_features": 4}})
    assert make(out_features=2).weight.shape == (2, 4)
    assert autocast(lambda x: x + 1)(1) == 2
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    assert make_path_absolute("$SOMEWHERE/a") == str(tmp_path / "a")


def test_a_model_with_the_weights_of_a_file(tmp_path, caplog):
    config = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}}}
    torch.save({"state_dict": {"weight": torch.ones(2, 3), "other": torch.ones(1)}}, tmp_path / "a.ckpt")
    model = load_model_from_config(config, tmp_path / "a.ckpt")
    assert (model.weight == 1).all() and not model.training and not model.weight.requires_grad
    assert "not exist in the file: bias" in caplog.text and "not exist in the model: other" in caplog.text
    torch.save({"other": torch.ones(1)}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"no entry of .* fits Linear"):
        load_model_from_config(config, tmp_path / "b.ckpt")

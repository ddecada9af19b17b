"""The T5 encoder equals transformers', from any form of its files, mapped if possible."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.encoders.t5_loading import load_t5

TINY_T5 = Path(__file__).parents[2] / "assets" / "tiny" / "t5"
INDEX = "model.safetensors.index.json"


def by_transformers(folder: Path, dtype: torch.dtype | str) -> Tensor:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return model(input_ids=torch.arange(7, 15)[None]).last_hidden_state


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_as_transformers_load_it(dtype):
    model = load_t5(str(TINY_T5), dtype=dtype).model
    assert not model.training
    assert torch.equal(
        model(input_ids=torch.arange(7, 15)[None]).last_hidden_state, by_transformers(TINY_T5, dtype or "auto")
    )
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == ({torch.float16, torch.float32} if dtype == torch.float16 else {dtype or torch.float32})


def in_shards(folder: Path, weights: dict[str, Tensor]) -> None:
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_pickles(folder: Path, weights: dict[str, Tensor]) -> None:
    names = sorted(weights)
    torch.save({name: weights[name] for name in names[::2]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({name: weights[name] for name in names[1::2]}, folder / "pytorch_model-00002-of-00002.bin")


def with_a_decoder(folder: Path, weights: dict[str, Tensor]) -> None:
    """Return weights as a whole T5 has them; the embedding has its other name."""
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file({**weights, "decoder.final_layer_norm.weight": torch.ones(128)}, folder / "model.safetensors")


def beside_another(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.fp16.safetensors")
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [in_shards, as_pickles, with_a_decoder, beside_another])
def test_forms_of_files(tmp_path, write):
    folder = shutil.copytree(TINY_T5, tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    write(folder, load_file(TINY_T5 / "model.safetensors"))
    expected = load_t5(str(TINY_T5)).model.state_dict()
    found = load_t5(str(folder)).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_blocks_stay_as_they_are_stored():
    loaded = load_t5(str(TINY_T5), dtype="float16", blocks_as_stored=True)
    for block, dtypes in zip(loaded.model.encoder.block, loaded.block_dtypes, strict=True):
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
        for (name, _), dtype in zip(block.named_parameters(), dtypes, strict=True):
            assert dtype == (torch.float32 if ".wo." in name else torch.float16)
    assert loaded.model.shared.weight.dtype == torch.float16
    assert loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight


def test_nothing_is_printed(capfd, caplog):
    with caplog.at_level(logging.INFO):
        FrozenT5Embedder(str(TINY_T5))
    assert "Loading weights" not in capfd.readouterr().err

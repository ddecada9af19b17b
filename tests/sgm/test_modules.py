"""Text embeddings equal the reference numbers; the conditioner follows its rules."""

import logging
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sgm.modules.encoders.modules as encoders
from sgm.errors import UserError
from sgm.modules import UNCONDITIONAL_CONFIG, GeneralConditioner
from sgm.modules.encoders.modules import AbstractEmbModel, FrozenT5Embedder
from sgm.randomness import per_sample
from sgm.util import instantiate_from_config
from support import REFERENCE, Reference, assert_close

TINY_T5 = str(REFERENCE / "tiny_t5")


def t5_conditioner(case):
    config = case["model"]["conditioner_config"]
    config["params"]["emb_models"][0]["params"]["model_dir"] = TINY_T5
    return instantiate_from_config(config)


@pytest.mark.parametrize("name", ["engine/t2v_2b", "engine/i2v_5b"])
def test_text_embeddings_are_the_reference_numbers(name):
    reference = Reference(name)
    conditioner = t5_conditioner(reference.case)
    texts = reference.case["texts"]
    cond, uncond = conditioner.get_unconditional_conditioning({"txt": texts}, force_uc_zero_embeddings=["txt"])
    assert_close(cond["crossattn"], reference["crossattn"], 1e-5)
    assert torch.equal(uncond["crossattn"], reference["uncond"])


IDENTITY = {"target": "sgm.modules.encoders.modules.IdentityEncoder"}


@pytest.mark.parametrize("seeded", [False, True])
def test_embeddings_that_samples_lose_together(seeded):
    """Each combination has its probability; an embedder outside of it has its own rate."""
    count = 4000
    configs = [{**IDENTITY, "input_key": key, "ucg_rate": 0.5} for key in ("a", "b", "c")]
    conditioner = GeneralConditioner(configs, [2, 0], [0.1, 0.2, 0.0, 0.7])
    batch = {key: torch.ones(count, 1) for key in ("a", "b", "c")}
    torch.manual_seed(0)
    with per_sample(range(count)) if seeded else nullcontext():
        a, b, c = conditioner(batch)["vector"].unbind(1)
    shares = [((c == bit0) & (a == bit1)).float().mean().item() for bit1 in (0, 1) for bit0 in (0, 1)]
    assert shares == pytest.approx([0.1, 0.2, 0.0, 0.7], abs=0.03) and shares[2] == 0
    assert 0.45 < b.mean() < 0.55
    assert conditioner(batch, drop=False)["vector"].all()
    for embedders, probabilities, message in (
        ([0, 3], [0.25] * 4, "cor_embs: .* are not places of different embedders; give each of 0 to 2"),
        ([0, 0], [0.25] * 4, "cor_embs"),
        ([0, 1], [0.5, 0.5], "cor_p: .* 2 embedders need 4 probabilities"),
        ([0], [0.5, 0.6], "cor_p"),
    ):
        with pytest.raises(UserError, match=message):
            GeneralConditioner(configs, embedders, probabilities)


def test_a_condition_that_needs_no_encoder():
    config = {"target": "sgm.modules.encoders.modules.IdentityEncoder", "input_key": "vector"}
    conditioner = GeneralConditioner([config])
    vector = torch.randn(2, 5)
    assert torch.equal(conditioner({"vector": vector})["vector"], vector)
    assert conditioner.embedders[0].input_key == "vector" and conditioner.embedders[0].encode(vector) is vector
    assert instantiate_from_config(UNCONDITIONAL_CONFIG)({"vector": vector}) == {}


class Scaled(AbstractEmbModel):
    """Multiplies its input by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 2.0))

    def forward(self, x):
        return x * self.weight


class Lengths(AbstractEmbModel):
    """The lengths of texts, as a vector."""

    def forward(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])


def conditioner_of(*configs, monkeypatch):
    monkeypatch.setattr(encoders, "Scaled", Scaled, raising=False)
    monkeypatch.setattr(encoders, "Lengths", Lengths, raising=False)
    path = "sgm.modules.encoders.modules"
    return GeneralConditioner([{**config, "target": f"{path}.{config['target']}"} for config in configs])


def test_dropout_zeroes_whole_samples(monkeypatch):
    """A dropped sample's embedding is zero, by bernoulli(1 − rate) per sample, in any mode."""
    config = {"target": "Scaled", "input_key": "x", "ucg_rate": 0.3}
    conditioner = conditioner_of(config, monkeypatch=monkeypatch).eval()
    x = torch.randn(2000, 3, 2)
    torch.manual_seed(5)
    embedding = conditioner({"x": x})["crossattn"]
    torch.manual_seed(5)
    kept = torch.bernoulli(0.7 * torch.ones(2000))
    assert torch.equal(embedding, 2 * x * kept[:, None, None])
    assert 0.65 < kept.mean() < 0.75


def test_sampling_drops_nothing_and_draws_nothing(monkeypatch):
    conditioner = conditioner_of({"target": "Scaled", "input_key": "x", "ucg_rate": 1.0}, monkeypatch=monkeypatch)
    state, x = torch.get_rng_state(), torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    cond, uncond = conditioner.get_unconditional_conditioning({"x": x}, {"x": -x})
    assert torch.equal(cond["crossattn"], 2 * x) and torch.equal(uncond["crossattn"], -2 * x)
    assert torch.equal(torch.get_rng_state(), state)
    cond, uncond = conditioner.get_unconditional_conditioning({"x": x}, force_uc_zero_embeddings=["x"])
    assert torch.equal(cond["crossattn"], 2 * x) and not uncond["crossattn"].any()


def test_legacy_value_replaces_the_input(monkeypatch):
    config = {"target": "Lengths", "input_key": "txt", "ucg_rate": 0.5, "legacy_ucg_value": ""}
    batch = {"txt": ["four"] * 1000}
    lengths = conditioner_of(config, monkeypatch=monkeypatch)(batch)["vector"]
    assert set(lengths.flatten().tolist()) == {0.0, 4.0} and 1.7 < lengths.mean() < 2.3
    assert batch["txt"] == ["four"] * 1000


def test_precomputed_embeddings_are_dropped_as_texts_are():
    """A conditioner that takes the embeddings of T5 gives what one that takes the texts gives."""
    reference = Reference("engine/t2v_2b")
    conditioner, texts = t5_conditioner(reference.case), [f"a circle, number {i}" for i in range(8)]
    precomputed = {"input_key": "txt_embedding", "ucg_rate": conditioner.embedders[0].ucg_rate}
    target = "sgm.modules.encoders.modules.PrecomputedEmbedder"
    light = GeneralConditioner([{**precomputed, "target": target}])
    batch = {"txt": texts, "txt_embedding": conditioner({"txt": texts}, drop=False)["crossattn"]}
    assert torch.equal(light(batch, drop=False)["crossattn"], batch["txt_embedding"])
    kept = set()
    for seed in range(4):
        with per_sample(range(8 * seed, 8 * seed + 8)):
            expected = conditioner(batch)["crossattn"]
        with per_sample(range(8 * seed, 8 * seed + 8)):
            embedding = light(batch)["crossattn"]
        assert torch.equal(embedding, expected)
        kept.update(embedding.any(dim=2).any(dim=1).tolist())
    assert kept == {True, False}


def test_kinds_follow_rank_or_output_key(monkeypatch):
    """Embeddings of one kind are concatenated on features, or on channels for images."""
    conditioner = conditioner_of(
        {"target": "Scaled", "input_key": "vector"},
        {"target": "Scaled", "input_key": "tokens"},
        {"target": "Scaled", "input_key": "tokens"},
        {"target": "Scaled", "input_key": "video"},
        {"target": "Scaled", "input_keys": ["video"]},
        {"target": "Scaled", "input_key": "tokens", "output_key": "extra"},
        monkeypatch=monkeypatch,
    )
    batch = {"vector": torch.ones(2, 5), "tokens": torch.ones(2, 7, 8), "video": torch.ones(2, 3, 4, 6, 6)}
    shapes = {kind: tuple(tensor.shape) for kind, tensor in conditioner(batch).items()}
    assert shapes == {"vector": (2, 5), "crossattn": (2, 7, 16), "concat": (2, 3, 8, 6, 6), "extra": (2, 7, 8)}


def test_only_trainable_embedders_learn(monkeypatch):
    frozen, trained = (
        conditioner_of({"target": "Scaled", "input_key": "x", "is_trainable": t}, monkeypatch=monkeypatch).train()
        for t in (False, True)
    )
    assert not frozen({"x": torch.ones(1, 2)})["vector"].requires_grad and not frozen.embedders[0].training
    assert trained({"x": torch.ones(1, 2)})["vector"].requires_grad and trained.embedders[0].training


def test_conditioner_mistakes(monkeypatch):
    conditioner = conditioner_of({"target": "Scaled", "input_key": "txt"}, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=r"the batch has no entry 'txt', only \['mp4'\]"):
        conditioner({"mp4": 1})
    with pytest.raises(UserError, match="neither 'input_key' nor 'input_keys'"):
        conditioner_of({"target": "Scaled"}, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="not an AbstractEmbModel"):
        GeneralConditioner([{"target": "torch.nn.Identity", "input_key": "x"}])


@pytest.fixture(scope="module")
def t5():
    return FrozenT5Embedder(TINY_T5, max_length=8)


def test_t5_is_frozen_and_in_the_asked_dtype(t5):
    assert not t5.training and not any(p.requires_grad for p in t5.parameters())
    embedding = FrozenT5Embedder(TINY_T5, max_length=5, dtype="bfloat16")("a circle")
    assert embedding.shape == (1, 5, 64) and embedding.dtype == torch.bfloat16
    assert t5(["a", "b"]).dtype == torch.float32


def test_long_text_is_cut_with_a_warning(t5, caplog):
    long_text = "a red circle moving left " * 10
    tokens = len(t5.tokenizer(long_text)["input_ids"])
    with caplog.at_level(logging.WARNING):
        embedding = t5(["a", long_text])
    assert embedding.shape == (2, 8, 64)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "sgm.modules.encoders.modules"]
    assert f"the last {tokens - 8} are lost: 'a red circle moving" in message

    caplog.clear()
    exact = next(text for n in range(1, 9) if len(t5.tokenizer(text := "a" * n)["input_ids"]) == 8)
    t5([exact])
    assert not caplog.records


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "spiece.model"])
def test_incomplete_t5_folder_is_named(tmp_path, missing):
    folder = shutil.copytree(TINY_T5, tmp_path / "t5")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"model_dir: '{re.escape(str(folder))}' has no .*should have config\.json"):
        FrozenT5Embedder(str(folder))


def test_unreadable_t5_is_named(tmp_path):
    with pytest.raises(UserError, match="model_dir: '/no/such/folder' is not a folder"):
        FrozenT5Embedder("/no/such/folder")
    folder = shutil.copytree(TINY_T5, tmp_path / "t5")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=re.escape(f"cannot load the T5 encoder from '{folder}'")) as error:
        FrozenT5Embedder(str(folder))
    assert "\n" not in str(error.value)


def test_t5_without_all_its_weights_is_refused(tmp_path):
    folder = shutil.copytree(TINY_T5, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete; 'encoder\.final_layer_norm\.weight' does not exist"):
        FrozenT5Embedder(str(folder))


def test_a_t5_folder_with_more_layers_than_can_be_built(tmp_path):
    for name in ("config.json", "model.safetensors", "spiece.model"):
        (tmp_path / name).write_text('{"num_layers": 1000000000}')
    with pytest.raises(UserError, match=r"config\.json: num_layers: got 1000000000; an encoder has up to 1000"):
        FrozenT5Embedder(str(tmp_path))

"""LoRA files of diffusers and peft become adapters; unsupported files are refused."""

import errno
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from arguments import get_args
from cogvideox_sat.conversion.lora_names import LORA_FILE
from cogvideox_sat.weights.checkpoint_files import checkpoint_file, network_weights
from diffusers_network import build_diffusers_network, diffusers_rotary, map_weights
from lora_adapters import AdaptedNetwork, adapted_network
from support import assert_close
from tool_runs import error_of
from tools.export_sat_lora_weight import main as export
from tools.import_hf_lora import main
from training_runs import assert_same


def run_import(path: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Return the imported adapter."""
    assert main(["--lora_path", str(path), "--output", str(output), *flags]) == 0
    file = checkpoint_file(output)
    return network_weights(file)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> AdaptedNetwork:
    return adapted_network(tmp_path_factory.mktemp("adapted"), "t2v_5b", alpha=3)


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    assert export(["--sat_pt_path", str(adapted.folder / "run"), "--lora_save_directory", str(folder)]) == 0
    return folder / LORA_FILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_undoes_export(tmp_path, dtype):
    adapted = adapted_network(tmp_path, "i2v_15", alpha=3, dtype=dtype)
    for flags in ((), ("--fold_scale",)):
        command = ["--sat_pt_path", tmp_path / "run", "--lora_save_directory", tmp_path / "exported", "--overwrite"]
        assert export([*map(str, command), *flags]) == 0
        adapter = run_import(tmp_path / "exported", tmp_path / "again", "--lora_alpha", "3", "--overwrite")
        assert all(tensor.dtype == dtype for tensor in adapter.values())
        # Folding multiplies and divides by 3/4, which rounds.
        assert_same(adapter, adapted.adapter, 0.02 * bool(flags))


def test_another_alpha_gives_the_same_strength(adapted, exported, tmp_path):
    """The folder's own configuration runs it; so does export, which finds its alpha there."""
    for alpha in ("1", "8"):
        run_import(exported, tmp_path / alpha, "--lora_alpha", alpha)
        params = yaml.safe_load((tmp_path / alpha / "lora.yaml").read_text())["model"]["network_config"]["params"]
        assert params["modules"]["lora_config"]["params"] == {"r": 4, "lora_alpha": float(alpha), "layer_range": [0, 1]}
        config = {**adapted.config, "params": {**adapted.config["params"]}}
        config["params"]["modules"] = {**config["params"]["modules"], **params["modules"]}
        other = AdaptedNetwork(adapted.case, config, adapted.network, adapted.folder)
        assert_close(adapted.output(other.loaded(adapted.folder / "base", tmp_path / alpha)), adapted.output(), 1e-5)
        command = ["--sat_pt_path", tmp_path / alpha, "--lora_save_directory", tmp_path / f"again{alpha}"]
        assert export(list(map(str, command))) == 0
        again = run_import(tmp_path / f"again{alpha}", tmp_path / f"adapter{alpha}", "--lora_alpha", "3")
        assert_same(again, adapted.adapter, 1e-5)


def test_the_written_configuration_completes_a_models_own(tiny, adapted, exported, tmp_path, monkeypatch):
    """The adapter is found from any working directory."""
    monkeypatch.chdir(tmp_path)
    run_import(exported.resolve(), Path("lora"))
    monkeypatch.undo()
    extra = ["--input_type", "cli", "--load", str(tmp_path)]
    args = get_args(["--base", str(tiny.config("5b")), str(tmp_path / "lora" / "lora.yaml"), *extra])
    assert args.lora_load == str(tmp_path / "lora")
    assert args.model_config["network_config"]["params"]["modules"]["lora_config"]["params"]["r"] == 4


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 2, "transformer_blocks.1.attn1.to_v": 7}}]
)
@torch.no_grad()
def test_an_adapter_that_peft_made(tmp_path, settings):
    """Alpha may be global, per module, or rank-stabilized: results equal diffusers'."""
    adapted = adapted_network(tmp_path, "t2v_5b")
    twin = build_diffusers_network(adapted.params)
    twin.load_state_dict(map_weights(adapted.loaded(tmp_path / "base").state_dict()))
    modules = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    twin.add_adapter(LoraConfig(r=6, lora_alpha=5, target_modules=modules, init_lora_weights=False, **settings))
    x, timesteps, context = adapted.inputs()
    rotary = diffusers_rotary(adapted.params, adapted.network.patch_grid(x))
    expected = twin(x, context, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
    twin.save_lora_adapter(tmp_path / "lora")
    run_import(tmp_path / "lora", tmp_path / "sat")
    ours = adapted_network(tmp_path / "six", "t2v_5b", rank=6)
    assert_close(ours.output(ours.loaded(tmp_path / "base", tmp_path / "sat")), expected, 1e-4)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("transformer."),
        lambda name: "base_model.model." + name.removeprefix("transformer."),
        lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["models", "peft", "older", "named"],
)
def test_other_spellings(adapted, exported, tmp_path, rename, caplog):
    """Without a header alpha is what --file_alpha says, else the rank, as in diffusers."""
    save_file({rename(name): tensor for name, tensor in load_file(exported).items()}, tmp_path / "a.safetensors")
    given = run_import(tmp_path / "a.safetensors", tmp_path / "given", "--file_alpha", "3", "--lora_alpha", "3")
    assert_same(given, adapted.adapter)
    assert "does not hold alpha" not in caplog.text
    assert_same(run_import(tmp_path, tmp_path / "default", "--lora_alpha", "4"), adapted.adapter)
    assert "does not hold alpha; it is assumed to be the rank, 4" in caplog.text


def test_alpha_beside_the_tensors_and_in_pefts_own_file(adapted, exported, tmp_path):
    tensors = load_file(exported)
    alphas = {name.replace(".lora_A.weight", ".alpha"): torch.tensor(3.0) for name in tensors if "lora_A" in name}
    save_file({**tensors, **alphas}, tmp_path / "alphas.safetensors")
    assert_same(run_import(tmp_path / "alphas.safetensors", tmp_path / "1", "--lora_alpha", "3"), adapted.adapter)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 3, "use_dora": False}))
    assert_same(run_import(folder, tmp_path / "2", "--lora_alpha", "3"), adapted.adapter)


def test_projections_that_are_left_out_get_zeros(adapted, exported, tmp_path, caplog):
    caplog.set_level("INFO")
    some = {name: tensor for name, tensor in load_file(exported).items() if "to_q" in name}
    save_file(some, tmp_path / "q.safetensors")
    adapter = run_import(tmp_path / "q.safetensors", tmp_path / "q")
    assert adapter.keys() == adapted.adapter.keys()
    assert sum(bool(tensor.any()) for tensor in adapter.values()) == 4
    assert "does not adapt layer 0 to_k, layer 0 to_v" in caplog.text
    run_import(tmp_path / "q.safetensors", tmp_path / "q", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.safetensors"]


def test_a_dry_run_writes_nothing(exported, tmp_path, caplog):
    caplog.set_level("INFO")
    assert main(["--lora_path", str(exported), "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    line = (
        "transformer_blocks.0.attn1.to_out.0.lora_A.weight -> transformer.layers.0.attention.dense.matrix_A.0 [4, 64]"
    )
    assert line in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_here_is_named(exported, tmp_path, caplog):
    tensors = load_file(exported)
    block = "transformer.transformer_blocks.0."

    def message(metadata: dict | None = None, **extra: torch.Tensor) -> str:
        header = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
        content = {**tensors, **{block + name: tensor for name, tensor in extra.items()}}
        save_file(content, tmp_path / "a.safetensors", header)
        text = error_of(main, caplog, "--lora_path", tmp_path / "a.safetensors", "--output", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
        return text

    some = torch.ones(4, 64)
    text = message(**{"ff.net.0.proj.lora_A.weight": some, "norm1.linear.lora_B.weight": some.clone()})
    assert "it adapts ff.net.0.proj, norm1.linear; adapters here hold only plain LoRA on attn1.to_q," in text
    assert "text_embed" in message(**{"text_embed.lora_A.weight": some})
    assert "it is a DoRA" in message(**{"attn1.to_q.lora_magnitude_vector.weight": torch.ones(64)})
    assert "it has biases" in message(**{"attn1.to_q.lora_B.bias": torch.ones(64)})
    assert "use_dora is on" in message({"transformer.use_dora": True})
    assert "alpha of layer" in message({"transformer.lora_alpha": "much"})
    assert "(a|b)" in message({"transformer.alpha_pattern": {"(a|b)+": 2}})
    assert "not a JSON object" in message([])
    larger = {"attn1.to_q.lora_A.weight": torch.ones(8, 64), "attn1.to_q.lora_B.weight": torch.ones(64, 8)}
    assert "the rank differs between layers: 4 (layer 0 to_k), 8 (layer 0 to_q)" in message(**larger)


def refused(*_: object, **__: object) -> str:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_bad_files(exported, tmp_path, caplog, monkeypatch):
    def message(path: Path | str, *flags: str) -> str:
        text = error_of(main, caplog, "--lora_path", path, "--output", tmp_path / "new" / "out", *flags)
        assert not (tmp_path / "new").exists()
        return text

    (tmp_path / "truncated.safetensors").write_bytes(exported.read_bytes()[:-1000])
    assert "not a readable safetensors file" in message(tmp_path / "truncated.safetensors")
    (tmp_path / "empty").mkdir()
    assert "holds 0 safetensors files" in message(tmp_path / "empty")
    assert "nowhere.safetensors does not exist" in message(tmp_path / "nowhere.safetensors")
    torch.save({"a": torch.save}, tmp_path / "code.bin")
    assert "code in a weight file is never run" in message(tmp_path / "code.bin")
    torch.save({0: torch.ones(2, 2)}, tmp_path / "numbers.bin")
    assert "it holds more than named tensors; name a LoRA file" in message(tmp_path / "numbers.bin")
    save_file({name: tensor[:0] for name, tensor in load_file(exported).items()}, tmp_path / "no_rank.safetensors")
    text = message(tmp_path / "no_rank.safetensors", "--file_alpha", "1")
    assert "matrix A is torch.float32 [0, 64]; expected floating-point numbers (rank, width)" in text
    (tmp_path / "peft").mkdir()
    save_file(load_file(exported), tmp_path / "peft" / "adapter_model.safetensors")  # without a header
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refused)
        assert (
            "adapter_config.json, which holds the adapter's alpha: Permission denied; change the permissions"
            in message(tmp_path / "peft")
        )
    big = {name: tensor.half() * 3000 if "lora_B" in name else tensor for name, tensor in load_file(exported).items()}
    save_file(big, tmp_path / "big.safetensors")
    assert "out of the range of torch.float16" in message(tmp_path / "big.safetensors", "--file_alpha", "900")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub did not give pytorch_lora_weights.safetensors" in message("someone/no-such-lora-here")
    (tmp_path / "there").mkdir()
    text = error_of(main, caplog, "--lora_path", exported, "--output", tmp_path / "there")
    assert "exists; give --overwrite" in text
    text = error_of(main, caplog, "--lora_path", exported, "--output", exported.parent, "--overwrite")
    assert "is read from and cannot be written to" in text and exported.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"alpha_pattern": value}, "alpha_pattern: got") for value in ("to_k", 5, [1], ["to_k"])),
        *(({"lora_alpha": value}, "expected a positive number") for value in (10**400, "4", [4], True, -1)),
    ],
)
def test_settings_that_do_not_fit_are_one_line(adapted, exported, tmp_path, settings, message, caplog):
    save_file(load_file(exported), tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
    assert main(["--lora_path", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "imported")]) == 2
    assert message in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "imported").exists()

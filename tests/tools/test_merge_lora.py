"""A merged checkpoint runs without LoRA and computes what base and adapters together do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, checkpoint_file, is_adapter, network_weights
from cogvideox_sat.weights.rank_shares import cuts_of, recut
from lora_adapters import FAMILIES, AdaptedNetwork, adapted_network, save
from support import assert_close, relative_error
from tool_runs import error_of, error_on_a_full_disk
from tools.export_sat_lora_weight import main as export
from tools.export_weights import main as export_weights
from tools.merge_lora import main
from training_clips import write_dataset
from training_runs import assert_same, train, write_config

ROOT = Path(__file__).parents[2]


def merge(load: Path, output: Path, *arguments: str | Path) -> dict[str, torch.Tensor]:
    """Return the merged weights."""
    assert main(["--load", str(load), "--output", str(output), *map(str, arguments)]) == 0
    return weights_in(output)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return network_weights(checkpoint_file(folder))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> AdaptedNetwork:
    return adapted_network(tmp_path_factory.mktemp("adapted"), "t2v_5b", alpha=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_equal_base_and_adapter(tmp_path, name):
    adapted = adapted_network(tmp_path, name, alpha=3)
    merge(tmp_path / "base", tmp_path / "merged", "--lora", tmp_path / "run")
    assert relative_error(adapted.output(adapted.loaded(tmp_path / "base")), adapted.output()) > 0.01
    assert_close(adapted.output(adapted.loaded(tmp_path / "merged")), adapted.output(), 1e-4)


@pytest.mark.slow
def test_tools_for_adapters_do_not_import_the_engine(adapted, tmp_path):
    """DeepSpeed and SwissArmyTransformer would take seconds and 300 MB."""
    base, run, exported, imported, merged = (
        str(path) for path in (adapted.folder / "base", adapted.folder / "run", *(tmp_path / name for name in "abc"))
    )
    code = f"""
import sys
from tools import export_sat_lora_weight, import_hf_lora, merge_lora
assert export_sat_lora_weight.main(["--sat_pt_path", {run!r}, "--lora_save_directory", {exported!r}]) == 0
assert import_hf_lora.main(["--lora_path", {exported!r}, "--output", {imported!r}]) == 0
assert merge_lora.main(["--load", {base!r}, "--lora", {run!r}, "--output", {merged!r}]) == 0
assert not {{"deepspeed", "sat.mpu", "transformers"}} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'sat'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_every_form_of_base_and_adapter_gives_the_same(adapted, tmp_path):
    """The forms: diffusers' adapter, one beside the base's weights, and a run."""
    folder = adapted.folder
    expected = merge(folder / "base", tmp_path / "merged", "--lora", folder / "run")
    command = ["--sat_pt_path", folder / "run", "--lora_save_directory", tmp_path / "exported"]
    assert export(list(map(str, command))) == 0
    assert_same(merge(folder / "base", tmp_path / "a", "--lora", tmp_path / "exported"), expected)
    file = tmp_path / "exported" / "pytorch_lora_weights.safetensors"
    assert_same(merge(folder / "base", tmp_path / "b", "--lora", f"{file}:1"), expected)
    assert_same(merge(folder / "full", tmp_path / "c"), expected)
    assert_same(merge(folder / "run", tmp_path / "d"), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_what_model_parallel_ranks_wrote_gives_the_same(adapted, tmp_path, size):
    """Each of their files alone, too, stands for all of them."""
    folder, cuts = adapted.folder, cuts_of(adapted.network)
    for kind in ("full", "run"):
        whole = weights_in(folder / kind)
        shutil.copytree(folder / kind, tmp_path / kind)
        (file,) = (tmp_path / kind).rglob("*.pt")
        for rank in range(size):
            share = {NETWORK_PREFIX + name: value for name, value in recut([whole], cuts, rank, size, "it").items()}
            torch.save({"module": share}, file.with_name(f"mp_rank_0{rank}_model_states.pt"))
    expected = merge(folder / "base", tmp_path / "merged", "--lora", folder / "run")
    assert_same(merge(tmp_path / "full", tmp_path / "a"), expected)
    assert_same(merge(tmp_path / "run", tmp_path / "b"), expected)
    exported = []
    for run in (folder / "run", tmp_path / "run", next((tmp_path / "run").rglob("*01_model_states.pt"))):
        command = ["--sat_pt_path", run, "--lora_save_directory", tmp_path / "exported", "--overwrite"]
        assert export(list(map(str, command))) == 0
        with safe_open(tmp_path / "exported" / "pytorch_lora_weights.safetensors", "pt") as file:
            exported.append((file.metadata(), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    for metadata, matrices in exported[1:]:
        assert metadata == exported[0][0]
        assert_same(matrices, exported[0][1])
    assert export_weights(["--input", str(tmp_path / "full"), "--output", str(tmp_path / "w.safetensors")]) == 0
    assert_same(load_file(tmp_path / "w.safetensors"), weights_in(folder / "full"))


def test_several_adapters_with_weights(adapted, tmp_path):
    """Adapters of any dtype are summed in float32 before rounding to the base's dtype."""
    adapted_network(tmp_path / "other", "t2v_5b", rank=2, alpha=1, seed=1)
    adapted_network(tmp_path / "half", "t2v_5b", dtype=torch.bfloat16)
    base = weights_in(tmp_path / "half" / "base")
    chosen = ("--lora", f"{adapted.folder / 'run'}:0.5", f"{tmp_path / 'other' / 'run'}:-2", "--lora")
    merged = merge(tmp_path / "half" / "base", tmp_path / "merged", *chosen, f"{tmp_path / 'half' / 'run'}:0")
    other = weights_in(tmp_path / "other" / "run")
    name = "transformer.layers.1.attention.query_key_value"
    added = []
    for i in range(3):
        first, second = (
            weights[f"{name}.matrix_B.{i}"].double() @ weights[f"{name}.matrix_A.{i}"].double()
            for weights in (adapted.adapter, other)
        )
        added.append(0.5 * 3 / 4 * first - 2 * 1 / 2 * second)
    expected = base[f"{name}.weight"].double() + torch.cat(added)
    difference = (merged[f"{name}.weight"].double() - expected).abs()
    assert (difference <= expected.abs() * 2**-8).all()  # the half unit of bfloat16's last place
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    unchanged = [key for key in base if torch.equal(base[key], merged[key])]
    assert len(base) - len(unchanged) == 2 * 2
    assert merged.keys() == base.keys()


def test_the_checkpoint_is_read_by_plain_pytorch(adapted, tmp_path):
    """Mapped or not, aligned for mapping, and with the checksums that an archive has."""
    import zipfile

    merged = merge(adapted.folder / "base", tmp_path / "merged", "--lora", adapted.folder / "run")
    file = checkpoint_file(tmp_path / "merged")
    assert zipfile.ZipFile(file).testzip() is None
    for mmap in (False, True):
        module = torch.load(file, weights_only=True, mmap=mmap)["module"]
        assert all(name.startswith("model.diffusion_model.") for name in module)
        assert_same({name.removeprefix("model.diffusion_model."): value for name, value in module.items()}, merged)
    assert {value.data_ptr() % 64 for value in module.values()} == {0}


@pytest.mark.slow
def test_a_run_of_the_trainer(tiny, tmp_path):
    """Its adapter, and the average of it, merged into the base that it names."""
    clips = write_dataset(tmp_path / "data", clips=2, frames=9, sizes=[(64, 96)])
    run = train(write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=2))
    base = weights_in(tiny.folder / "5b")
    for i, folder in enumerate((run, run / "2-ema")):
        merged = merge(folder, tmp_path / str(i))
        assert merged.keys() == base.keys()
        adapter = weights_in(folder)
        assert all(map(is_adapter, adapter))
        name = "transformer.layers.0.attention.dense"
        added = adapter[f"{name}.matrix_B.0"].float() @ adapter[f"{name}.matrix_A.0"].float() / 4
        assert_close(merged[f"{name}.weight"] - base[f"{name}.weight"], added, 1e-2)  # of small differences


def test_a_dry_run_says_what_is_merged(adapted, tmp_path, caplog):
    caplog.set_level("INFO")
    command = ["--load", adapted.folder / "base", "--lora", adapted.folder / "run", "--output", tmp_path / "out"]
    assert main([*map(str, command), "--dry_run"]) == 0
    assert "transformer.layers.0.attention.dense.weight [64, 64] float32: merged" in caplog.text
    assert "transformer.layers.0.mlp.dense_h_to_4h.weight [256, 64] float32: unchanged" in caplog.text
    assert not list(tmp_path.iterdir())


def test_bad_input(adapted, tmp_path, caplog):
    folder, out = adapted.folder, tmp_path / "new" / "out"

    def message(load: Path, *arguments: str | Path) -> str:
        text = error_of(main, caplog, "--load", load, "--output", out, *arguments)
        assert not out.parent.exists()
        return text

    assert "name at least one with --lora" in message(folder / "base")
    assert f"--lora: {tmp_path / 'nowhere'} does not exist" in message(folder / "base", "--lora", tmp_path / "nowhere")
    assert "'strong' is not a number" in message(folder / "base", "--lora", f"{folder / 'run'}:strong")
    assert "'nan' is not a number" in message(folder / "base", "--lora", f"{folder / 'run'}:nan")
    assert "holds no adapter" in message(folder / "base", "--lora", folder / "base")
    alone = save(adapted.adapter, tmp_path / "alone", "1")
    assert "holds only an adapter" in message(alone, "--lora", folder / "run")
    deeper = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in adapted.adapter.items()}
    text = message(folder / "base", "--lora", save(deeper, tmp_path / "deeper", "1"))
    assert "does not fit: it adapts layer 9, and the base has no" in text
    wide = {name: torch.zeros([4 if side == 4 else 32 for side in tensor.shape]) for name, tensor in deeper.items()}
    wide = {name.replace("layers.9.", "layers.1."): tensor for name, tensor in wide.items()}
    assert "its adapter needs [" in message(folder / "base", "--lora", save(wide, tmp_path / "wide", "1"))
    half = {name: tensor.half() for name, tensor in weights_in(folder / "base").items()}
    text = message(save(half, tmp_path / "half", "1"), "--lora", f"{folder / 'run'}:1e6")
    assert "is not finite after merging in torch.float16; lower the strength" in text
    half["transformer.layers.0.attention.dense.weight"].fill_(float("nan"))
    text = message(save(half, tmp_path / "nan", "1"), "--lora", folder / "run")
    assert "is not finite after merging in torch.float16; name another base" in text
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((folder / "base" / "1" / "mp_rank_00_model_states.pt").read_bytes()[:5000])
    assert "damaged" in message(damaged, "--lora", folder / "run")


def test_what_exists_is_replaced_only_when_told_and_never_what_is_read(adapted, tmp_path, caplog):
    base, run = adapted.folder / "base", adapted.folder / "run"
    first = merge(base, tmp_path / "out", "--lora", run)
    assert "exists; give --overwrite" in error_of(
        main, caplog, "--load", base, "--lora", run, "--output", tmp_path / "out"
    )
    second = merge(base, tmp_path / "out", "--lora", f"{run}:2", "--overwrite")
    name = "transformer.layers.0.attention.dense.weight"
    assert not torch.equal(first[name], second[name])
    text = error_of(main, caplog, "--load", base, "--lora", run, "--output", base, "--overwrite")
    assert "is read from and cannot be written to" in text
    text = error_of(main, caplog, "--load", base / "1", "--lora", run, "--output", base, "--overwrite")
    assert "is read from and cannot be written to" in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(adapted, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = ("--load", adapted.folder / "base", "--lora", adapted.folder / "run", "--output", out)
    assert error_on_a_full_disk("merge_lora.py", 2**16, *arguments) == f"error: cannot write {out}: File too large"
    assert not list(tmp_path.iterdir())

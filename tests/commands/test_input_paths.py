"""Test that inputs are looked for in the working directory, then in the repository's root."""

import logging
from pathlib import Path

import pytest
import yaml

from arguments import get_args
from cogvideox_sat.commands import input_paths
from cogvideox_sat.commands.input_paths import find_input, located, named_place, not_found, required_input, tell_places
from cogvideox_sat.configuration.training_arguments import get_training_args
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a repository's root, with the current working directory in its folder sat/."""
    root = tmp_path / "root"
    (root / "sat").mkdir(parents=True)
    monkeypatch.setattr(input_paths, "ROOT", root)
    monkeypatch.setattr(input_paths, "_notes", [])
    monkeypatch.chdir(root / "sat")
    return root


def logged(caplog) -> str:
    with caplog.at_level(logging.INFO):
        tell_places()
    return caplog.text


def test_the_root_comes_second_and_the_log_says_so(root, caplog):
    (root / "a.pt").touch()
    assert find_input("a.pt", "load") == root / "a.pt"
    assert f"load: a.pt is taken from {root}" in logged(caplog)
    caplog.clear()
    Path("a.pt").touch()
    assert find_input("a.pt", "load") == Path("a.pt")
    assert "load: a.pt is taken from the current working directory" in logged(caplog)


def test_the_first_process_speaks_for_all(root, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (root / "a.pt").touch()
    find_input("a.pt", "load")
    assert logged(caplog) == ""


def test_in_the_root_nothing_is_said(root, caplog, monkeypatch):
    (root / "a.pt").touch()
    monkeypatch.chdir(root)
    assert find_input("a.pt", "load") == Path("a.pt")
    assert find_input(str(root / "a.pt"), "load") == root / "a.pt"
    assert find_input("gone", "load") is None
    assert logged(caplog) == ""


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(root, path):
    assert find_input(path, "load") is None


def test_messages_name_both_places(root, monkeypatch):
    assert not_found("load", "a.pt") == f"load: a.pt does not exist, neither in {root / 'sat'} nor in {root}"
    assert not_found("load", "/a.pt") == "load: /a.pt does not exist"
    monkeypatch.chdir(root)
    assert not_found("load", "a.pt") == "load: a.pt does not exist"


def test_outputs_beside_an_input_stay_here(root):
    (root / "a.pt").touch()
    for given in ("a.pt", str(root / "a.pt")):
        assert named_place(Path(given), find_input(given, "PATH")) == Path(given)
    Path("b.pt").touch()
    assert named_place(Path("b.pt"), find_input("b.pt", "PATH")) == Path("b.pt")


def test_a_home_is_one_place(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    (root / "a.pt").touch()
    assert named_place(Path("~/a.pt"), required_input("~/a.pt", "PATH")) == root / "a.pt"
    with pytest.raises(UserError, match=r"^PATH: ~/gone\.pt does not exist$"):
        required_input("~/gone.pt", "PATH")
    assert located("~/shards/{000..001}.tar", "PATH") == str(root / "shards/{000..001}.tar")


def test_patterns_lists_weighted_entries_and_urls(root):
    (root / "shards").mkdir()
    (root / "shards" / "000.tar").touch()
    (root / "clips").mkdir()
    here, there = "shards/{000..001}.tar", str(root / "shards/{000..001}.tar")
    given = [here, "shards/*.tar", "none/**.tar", "https://a.b/c.tar", {"path": "clips", "weight": 2}, 7]
    there = [str(root / here), str(root / "shards/*.tar"), "none/**.tar", "https://a.b/c.tar"]
    assert located(given, "train_data") == [*there, {"path": str(root / "clips"), "weight": 2}, 7]


def test_a_configuration_and_all_that_it_names(root, tmp_path, monkeypatch):
    """All paths are found as after `cd sat`, for the shipped files."""
    monkeypatch.setattr(input_paths, "ROOT", ROOT)
    monkeypatch.chdir(tmp_path)
    configs = ["configs/tiny/cogvideox_tiny.yaml", "configs/tiny/inference.yaml"]
    args = get_args(["--base", *configs])
    assert args.load == str(ROOT / "assets/tiny/text_to_video.safetensors")
    assert Path(args.input_file).is_absolute() and Path(args.input_file).is_file()
    assert args.output_dir == "outputs/tiny"  # outputs go to the current working directory
    first_stage = args.model_config["first_stage_config"]["params"]
    assert first_stage["ckpt_path"] == str(ROOT / "assets/tiny/vae.safetensors")
    (embedder,) = args.model_config["conditioner_config"]["params"]["emb_models"]
    assert embedder["params"]["model_dir"] == str(ROOT / "assets/tiny/t5")
    monkeypatch.chdir(ROOT)
    assert get_args(["--base", *configs]).load == "assets/tiny/text_to_video.safetensors"


def test_data_and_what_a_run_records_of_it(root, tmp_path, monkeypatch):
    monkeypatch.setattr(input_paths, "ROOT", ROOT)
    monkeypatch.chdir(tmp_path)
    configs = ["configs/tiny/cogvideox_tiny_lora.yaml", "configs/tiny/sft.yaml"]
    args = get_training_args(["--base", *configs, "--train_data", "assets/tiny"])
    assert args.train_data == [str(ROOT / "assets/tiny")]
    assert args.merged_config["args"]["train_data"] == args.train_data  # from anywhere


def test_a_name_on_a_hub_is_no_path(root):
    from cogvideox_sat.configuration.files import with_located_paths

    (root / "google").mkdir()
    hub = {"model_dir": "google", "cache_dir": "x"}
    assert with_located_paths({"a": [hub]}) == {"a": [hub]}
    assert with_located_paths({"a": [{"model_dir": "google"}]}) == {"a": [{"model_dir": str(root / "google")}]}


def test_included_files_stay_beside_the_one_that_includes_them(root):
    (root / "configs").mkdir()
    (root / "configs" / "b.yaml").write_text(yaml.safe_dump({"args": {"seed": 3}}))
    (root / "configs" / "a.yaml").write_text(yaml.safe_dump({"include": "b.yaml"}))
    from cogvideox_sat.configuration.files import load_configs

    assert load_configs(["configs/a.yaml"])["args"] == {"seed": 3}
    with pytest.raises(
        UserError, match=f"configuration gone.yaml: No such file.*neither in {root / 'sat'} nor in {root}"
    ):
        load_configs(["gone.yaml"])

"""Exported weights equal the checkpoint's, in one file that loads in its place."""

import pytest
import torch
from safetensors.torch import load_file

from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, network_weights
from tools.export_weights import main


@pytest.fixture
def checkpoint(tmp_path):
    """Return a run with an averaged iteration beside the last."""
    for name, value in (("7", 1.0), ("7-ema", 2.0)):
        (tmp_path / "run" / name).mkdir(parents=True)
        weights = {
            f"{NETWORK_PREFIX}layer.weight": torch.full((2, 3), value),
            f"{NETWORK_PREFIX}count": torch.arange(3),
        }
        torch.save({"module": weights}, tmp_path / "run" / name / "mp_rank_00_model_states.pt")
    (tmp_path / "run" / "latest").write_text("7")
    return tmp_path / "run"


@pytest.mark.parametrize(("iteration", "value"), [("", 1.0), ("7-ema", 2.0)])
def test_a_run_or_an_iteration_becomes_one_file(checkpoint, tmp_path, iteration, value):
    output = tmp_path / "new" / "a.safetensors"
    assert main(["--input", str(checkpoint / iteration), "--output", str(output), "--dtype", "float16"]) == 0
    weights = load_file(output)
    assert torch.equal(weights["layer.weight"], torch.full((2, 3), value, dtype=torch.float16))
    assert torch.equal(weights["count"], torch.arange(3))  # not a floating point number
    assert network_weights(output).keys() == weights.keys()
    assert oct(output.stat().st_mode & 0o444) == "0o444"


def test_a_vae_keeps_its_dtype_without_another(tmp_path):
    torch.save({"state_dict": {"encoder.conv.weight": torch.ones(2, dtype=torch.bfloat16)}}, tmp_path / "3d-vae.pt")
    assert main(["--input", str(tmp_path / "3d-vae.pt"), "--output", str(tmp_path / "vae.safetensors")]) == 0
    assert load_file(tmp_path / "vae.safetensors")["encoder.conv.weight"].dtype == torch.bfloat16


def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, caplog):
    (tmp_path / "there.safetensors").touch()
    torch.save({"module": {"layer.weight": torch.tensor([1e6])}}, tmp_path / "large.pt")
    torch.save({"module": {"layer.weight": torch.tensor([float("nan")])}}, tmp_path / "nan.pt")
    before = sorted(tmp_path.rglob("*"))
    for given, output, says in (
        (checkpoint, "a.pt", "end with .safetensors"),
        (checkpoint, "there.safetensors", "exists; give --overwrite"),
        (tmp_path / "gone", "a.safetensors", "gone does not exist"),
        (tmp_path / "nan.pt", "a.safetensors", "nan.pt: layer.weight is not finite; name another checkpoint"),
        (tmp_path / "large.pt", "a.safetensors", "layer.weight is too large for float16; choose another --dtype"),
    ):
        caplog.clear()
        assert main(["--input", str(given), "--output", str(tmp_path / output), "--dtype", "float16"]) == 2
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert says in line
        assert "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_writes_nothing(checkpoint, tmp_path):
    assert main(["--input", str(checkpoint), "--output", str(tmp_path / "a.safetensors"), "--dry_run"]) == 0
    assert not (tmp_path / "a.safetensors").exists()


def test_tied_and_eight_bit_tensors_are_written(tmp_path):
    """safetensors refuses tensors that share memory, and PyTorch does not test 8-bit floats."""
    small, tied = torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn), torch.arange(6.0).view(2, 3)
    torch.save({"module": {"a": tied, "b": tied, "small": small}}, tmp_path / "tied.pt")
    assert main(["--input", str(tmp_path / "tied.pt"), "--output", str(tmp_path / "a.safetensors")]) == 0
    weights = load_file(tmp_path / "a.safetensors")
    assert torch.equal(weights["a"], tied) and torch.equal(weights["b"], tied)
    assert weights["small"].dtype == torch.float8_e4m3fn and weights["small"].tolist() == [0.5, -2.0]

"""Test that texts name scripts, or `cogvideox` if that was started."""

import sys
from pathlib import Path

import pytest

from cogvideox_sat.commands.program_names import SCRIPTS, TOOLS, as_started

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python sat/sample_video.py --base a.yaml", "cogvideox sample --base a.yaml"),
        ("bash inference.sh --base a.yaml", "cogvideox sample --base a.yaml"),
        ("run tools/precompute_latents.py again", "run cogvideox convert precompute_latents again"),
        ("python tools/estimate_memory.py --base a", "cogvideox memory --base a"),
        (
            "torchrun --standalone --nproc_per_node=8 sat/train_vae.py ...",
            "torchrun --standalone --nproc_per_node=8 -m cogvideox_sat.command_line train-vae ...",
        ),
        ("python tools/make_shapes_dataset.py", "python tools/make_shapes_dataset.py"),
        ("see outputs/sat/sample.py", "see outputs/sat/sample.py"),
    ],
)
def test_scripts_become_the_command_where_that_runs(monkeypatch, text, expected):
    monkeypatch.setattr(sys, "argv", ["sat/sample_video.py", "--base"])
    assert as_started(text) == text
    monkeypatch.setattr(sys, "argv", ["cogvideox sample", "--base"])
    assert as_started(text) == expected


def test_a_command_to_copy_runs_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sat/sample_video.py"])
    monkeypatch.chdir(tmp_path)
    assert as_started("python tools/decode_latents.py a") == "python tools/decode_latents.py a"
    assert as_started("python tools/decode_latents.py a", runnable=True) == f"python {ROOT}/tools/decode_latents.py a"
    assert as_started("see sat/train_vae.py", runnable=True) == f"see {ROOT}/sat/train_vae.py"
    monkeypatch.chdir(ROOT)
    assert as_started("python tools/decode_latents.py a", runnable=True) == "python tools/decode_latents.py a"
    monkeypatch.setattr(sys, "argv", ["cogvideox sample"])
    monkeypatch.chdir(tmp_path)
    command = as_started("python tools/decode_latents.py a", runnable=True)
    assert command == "cogvideox convert decode_latents a"


def test_all_of_them_are_scripts():
    assert all((ROOT / script).is_file() for script in SCRIPTS)
    assert all((ROOT / "tools" / f"{tool}.py").is_file() for tool in TOOLS)

"""Test adapters in the forms of the command line and of programs.

Their effect is tested in tests/sampling/test_adapters.py.
"""

from pathlib import Path

import pytest

from cogvideox_sat.configuration.adapter_lists import adapter_texts, path_and_weight
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_section import without_adapter
from cogvideox_sat.files.shipped import CONFIGS
from sgm.errors import UserError


def test_a_program_names_them_as_it_likes():
    assert adapter_texts({"a": 0.8, Path("b"): 1}) == ["a:0.8", "b:1"]
    assert adapter_texts("a") == adapter_texts(["a"]) == adapter_texts(Path("a")) == ["a:1.0"]
    assert adapter_texts({}) == adapter_texts([]) == []
    for text, weight in (("a:1e-05", 1e-5), ("x:y:-0.5", -0.5)):
        assert path_and_weight(text)[1] == weight
    with pytest.raises(UserError, match="--lora a:b: 'b' is not a number"):
        path_and_weight("a:b")


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    (tmp_path / "a:2").touch()
    assert path_and_weight("x/y") == (Path("x/y"), 1.0)
    assert path_and_weight("x:y:-0.5") == (Path("x:y"), -0.5)
    assert path_and_weight(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)


def test_a_model_without_the_place_for_one():
    tiny, twin = (
        load_configs([CONFIGS / "tiny" / f"cogvideox_{name}.yaml"])["model"] for name in ("tiny", "tiny_lora")
    )
    assert without_adapter(twin) == tiny and without_adapter(tiny) == tiny
    assert "lora_config" in twin["network_config"]["params"]["modules"]

"""The page knows what a model takes before its weights are read."""

import subprocess
import sys

import pytest

import cogvideox_sat as cv
from cogvideox_sat.web.models import offered_models
from sgm.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny_i2v"])
def test_fields_are_those_of_the_loaded_model(name):
    (offered,) = offered_models([[name]], {"device": "cpu"}).values()
    with cv.load(name, device="cpu", offload="stage") as pipe:
        assert offered.fields == pipe.fields
    assert offered.image_to_video == (name == "tiny_i2v")


def test_no_weights_are_read_for_that():
    program = (
        "import sys\nsys.path[:0] = ['.', 'sat']\nfrom cogvideox_sat.web.models import offered_models\n"
        "offered_models([['tiny']], {})\nassert 'torch' not in sys.modules and 'gradio' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_models_are_named_by_their_first_file():
    found = offered_models([["configs/tiny/cogvideox_tiny.yaml", "configs/tiny/inference.yaml"], ["tiny_i2v"]], {})
    assert list(found) == ["cogvideox_tiny", "tiny_i2v"]
    assert found["cogvideox_tiny"].source == ("configs/tiny/cogvideox_tiny.yaml", "configs/tiny/inference.yaml")


def test_two_of_one_name_are_refused():
    with pytest.raises(UserError, match="model: two are called tiny; name each once"):
        offered_models([["tiny"], ["tiny"]], {})


def test_a_model_that_does_not_exist_is_told():
    with pytest.raises(UserError, match="did you mean tiny"):
        offered_models([["tinny"]], {})

"""Test that import paths are checked by reading source files."""

import subprocess
import sys

import pytest

from cogvideox_sat.configuration.static_signatures import static_parameters
from cogvideox_sat.configuration.targets import find_source, is_trusted, why_target_fails
from training_runs import ROOT


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("sgm.util.os.system", "module 'sgm.util.os' does not exist"),
        ("sgm.errors.os", "module 'sgm.errors' has no 'os'"),
        ("subprocess.getoutput", "'getoutput' is a function"),
        ("timeit.timeit", "'timeit' is a function"),
        (".", "not an import path"),
        ("a..b", "not an import path"),
        ("os.system; import os", "not an import path"),
        ("sgm.modules.class", "not an import path"),
        ("a." * 200 + "b", "an import path of 401 characters"),
    ],
)
def test_what_no_file_may_name(target, says):
    assert says in why_target_fails(target)


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.Popen", "builtins.exec", "sgm.util.importlib", "vae_modules.autoencoder.Path"),
        *(
            "torch.nn.modules.module.OrderedDict",
            "torch.utils.data.DataLoader",
            "torch.load",
            "dit_video_concat.partial",
        ),
        *("cogvideox_sat.network.adaptive_layer.partial", "cogvideox_sat.files.folders.Path"),
        *("dit_video_concat.nn", "sat.helpers.print_rank0", "torch.optim.optimizer.OrderedDict", "my_module.Mine"),
        *("numpy.load", "dit_video_concat.partial"),
    ],
)
def test_what_a_file_from_elsewhere_may_not_name(target):
    assert why_target_fails(target, trusted=False)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.nn.Identity", "torch.optim.Adam", "sgm.modules.GeneralConditioner", "ema_adam.EmaAdam"),
        *("dit_video_concat.AdaLNMixin", "dit_video_concat.Rotary3DPositionEmbeddingMixin"),
        *("dit_video_concat.DiffusionTransformer", "sat.model.finetune.lora2.LoraMixin", "data_video.SFTDataset"),
        *("vae_modules.regularizers.DiagonalGaussianRegularizer", "vae_modules.autoencoder.VideoAutoencodingEngine"),
    ],
)
def test_what_any_file_may_name(target):
    assert why_target_fails(target, trusted=False) is None


def test_a_module_that_is_not_python(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("class A(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "is not valid Python" in why_target_fails("half_written.A")


def test_nothing_is_imported():
    code = (
        "import sys\nfrom cogvideox_sat.configuration.targets import why_target_fails\n"
        "assert why_target_fails('torch.nn.Identity') is None\nassert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'sat'}", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_sources_and_what_they_take():
    assert is_trusted("data_video") and not is_trusted("os") and not is_trusted("sgmx")
    assert find_source("sgm.util") == ROOT / "sgm" / "util.py" and find_source("sgm.util.os") is None
    taken = static_parameters("sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler")
    assert taken.closed and {"num_steps", "guider_config", "fixed_frames"} <= taken.hints.keys()
    assert static_parameters("torch.nn.Identity") is None

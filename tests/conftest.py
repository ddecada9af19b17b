"""What several test files share: the tiny models, and a single thread."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class TinyModels:
    """Model configurations, one a family, whose weights, VAE and T5 encoder lie beside them in `folder`."""

    folder: Path

    def config(self, family: str) -> Path:
        return self.folder / f"{family}.yaml"

    def variant(self, family: str, path: Path, **changes: Any) -> Path:
        """Write to `path` a file that includes the family's own; `changes` are its sections."""
        path.write_text(yaml.safe_dump({"include": str(self.config(family)), **changes}))
        return path


@pytest.fixture(scope="module")
def one_thread():
    """Tensors as small as most tests' gain nothing from more threads, and lose much on a busy machine; and the order of
    sums is then that of a process of torchrun."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    """The five families: `2b`, `5b`, `5b_i2v`, `1.5` and `1.5_i2v`."""
    from tools.build_tiny_model import main

    models = TinyModels(tmp_path_factory.mktemp("tiny"))
    for family, name in FAMILY_FILES.items():
        config = tiny_config(models.folder, family, name)
        models.config(family).write_text(yaml.safe_dump(config))
    assert main(["--config", *(str(models.config(family)) for family in FAMILY_FILES)]) == 0
    return models


FAMILY_FILES = {
    "2b": "cogvideox_tiny",
    "5b": "cogvideox_tiny",
    "5b_i2v": "cogvideox_tiny_i2v",
    "1.5": "cogvideox1.5_tiny",
    "1.5_i2v": "cogvideox1.5_tiny_i2v",
}
# A smaller one of the released shape, whatever configs/tiny trains: diffusers has no other.
VAE = {"ch": 32, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 1}


def tiny_config(folder: Path, family: str, name: str) -> dict[str, Any]:
    """`configs/tiny/{name}.yaml`, its parts in `folder`; for `2b` with the classes and numbers of CogVideoX-2B."""
    from config_files import load_configs

    config = load_configs([ROOT / "configs" / "tiny" / f"{name}.yaml"])
    config["args"] = {"load": str(folder / family), "image2video": family.endswith("i2v")}
    model = config["model"]
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "t5")
    model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae.pt")
    model["network_config"]["params"]["num_layers"] = 2
    for coder in ("encoder_config", "decoder_config"):
        params = model["first_stage_config"]["params"][coder]["params"]
        params |= VAE
        params.pop("norm_groups", None)
    if family == "2b":
        model["scale_factor"] = 1.15258426
        model["network_config"]["params"]["modules"]["pos_embed_config"] = {
            "target": "dit_video_concat.Basic3DPositionEmbeddingMixin",
            "params": {"text_length": 64, "height_interpolation": 1.875, "width_interpolation": 1.875},
        }
        for part in ("denoiser_config", "sampler_config"):
            model[part]["params"]["discretization_config"]["params"]["shift_scale"] = 3.0
    return config

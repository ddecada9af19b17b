"""Find the model that a program names.

A model is a shipped one, configuration files, the folder of a run, or a pipeline of diffusers. PyTorch is imported only
for a pipeline of diffusers, whose tensors tell which model it is.
"""

import difflib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cogvideox_sat.commands.input_paths import find_input, places
from cogvideox_sat.configuration.files import MergedConfig, load_configs
from cogvideox_sat.configuration.model_section import has_adapter, plain_model_section
from cogvideox_sat.files.shipped import CONFIGS
from sgm.errors import UserError, shown

RUN_FILE = "training_config.yaml"
PIPELINE_FILE = "model_index.json"  # same as in `sgm.weights`, which imports PyTorch
YAML = (".yaml", ".yml")
# Arguments of a training run that describe the training and have another meaning for sampling.
OF_TRAINING = ("lora_load", "resume", "seed", "device", "mode", "vae_tile_size", "vae_frames_at_once")

ModelName: TypeAlias = str | Path | Sequence[str | Path]
"""Name of a shipped model, path of a folder, or one or more configuration files."""


@dataclass
class ModelPlace:
    """The location and settings of a model.

    Args:
        base: configuration files.
        config: a configuration in place of files.
        values: arguments of the model, such as its checkpoint.
        lora: adapters of the model with their strengths.
        kept: resources that must exist as long as the model is used, such as a temporary folder.
    """

    base: Sequence[str | Path] = ()
    config: MergedConfig | None = None
    values: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, float] = field(default_factory=dict)
    kept: ExitStack = field(default_factory=ExitStack)


def shipped_models() -> dict[str, Path]:
    """Return the configurations of the shipped models, by the names that `load` takes."""
    released = {path.stem: path for path in sorted(CONFIGS.glob("cogvideox*.yaml")) if not path.stem.endswith("_lora")}
    tiny = {f"tiny{kind}": CONFIGS / "tiny" / f"cogvideox_tiny{kind}.yaml" for kind in ("", "_i2v", "_continue")}
    return {**tiny, **released}


def find_model(model: ModelName) -> ModelPlace:
    """Return the location of a model.

    Args:
        model: the name of a shipped model; one or more configuration files; the folder of a training run or of one of
            its checkpoints; or the folder of a pipeline of diffusers.

    Raises:
        UserError: `model` is none of these.
    """
    if isinstance(model, str) and (found := shipped_models().get(model.replace("-", "_").lower())):
        return ModelPlace(base=[found])
    if not isinstance(model, str | Path):
        if not isinstance(model, list | tuple) or not model or not all(isinstance(name, str | Path) for name in model):
            raise UserError(f"model: got {shown(model)}; give a name, a folder, or configuration files")
        return ModelPlace(base=list(model))
    if str(model).lower().endswith(YAML):
        return ModelPlace(base=[model])
    found = find_input(str(model), "model") if str(model) else None
    if found is None:
        near = difflib.get_close_matches(str(model), shipped_models(), n=1)
        advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(shipped_models())}"
        raise UserError(f"model: {str(model) or repr(model)} does not exist{places(model)}; {advice}")
    if (found / PIPELINE_FILE).is_file():
        return pipeline(found)
    for folder in (found, found.parent):
        if found.is_dir() and (folder / RUN_FILE).is_file():
            return training_run(found, folder / RUN_FILE)
    raise UserError(f"model: {model} holds neither {RUN_FILE} nor {PIPELINE_FILE}; give configuration files (.yaml)")


def training_run(checkpoint: Path, file: Path) -> ModelPlace:
    """Return the model of a training run, with its adapter or with all its weights.

    Args:
        checkpoint: the folder of the run, or of one of its checkpoints.
        file: the configuration of the run, which may name only our own classes.

    Raises:
        UserError: the configuration cannot be read or does not describe a model.
    """
    config = load_configs([file], used=("model",), trusted=False)
    section = plain_model_section(config.get("model") or {})
    config["args"] = {name: value for name, value in (config.get("args") or {}).items() if name not in OF_TRAINING}
    if has_adapter(section):
        return ModelPlace(config=config, lora={str(checkpoint): 1.0})
    return ModelPlace(config=config, values={"load": str(checkpoint)})


def pipeline(folder: Path) -> ModelPlace:
    """Return the model of a pipeline of diffusers, whose weights are read in place.

    The configuration, and a folder of links to the files of the text encoder and tokenizer, are temporary.

    Raises:
        UserError: the folder is not a pipeline of CogVideoX, or its text encoder is missing.
    """
    from cogvideox_sat.conversion.config_writing import model_config, write_yaml
    from cogvideox_sat.conversion.pipeline_reading import read_pipeline

    folder = folder.resolve()
    found = read_pipeline(folder, None, with_text=True)
    if found.text_files is None:
        raise UserError(f"model: {folder} has no text_encoder; add the folders text_encoder and tokenizer")
    kept = ExitStack()
    temporary = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="cogvideox-")))
    try:
        text = temporary / "text_encoder"
        text.mkdir()
        for file in (*found.text_files[0], *found.text_files[1]):
            (text / file.name).symlink_to(file)
        content = model_config(
            found.family,
            found.sizes,
            found.autoencoder,
            load=folder / "transformer",
            vae=folder / "vae",
            text_encoder=text,
            **found.precision,
        )
        write_yaml(temporary / "model.yaml", content, found.family, "of a pipeline of diffusers")
    except BaseException:
        kept.close()
        raise
    return ModelPlace(base=[temporary / "model.yaml"], kept=kept)

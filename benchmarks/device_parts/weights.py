"""Make random weights in the layout of the released ones, and clips to train on."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from device_parts.models import CONFIGS, config_file, randomised
from device_parts.recording import Recorder

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.engine.precision import DTYPES
from cogvideox_sat.media.video_output import VideoWriter

TOKENIZER = CONFIGS.parent / "assets" / "tiny" / "t5" / "spiece.model"
# google/t5-v1_1-xxl, whose encoder the released models use.
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
T5_TOY = {"d_model": 128, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 512}
T5_COMMON = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
ITERATION = "1"
CLIPS, CLIP_SECONDS_MORE = 2, 7  # clips are longer than training needs, which leaves both ends out


def weights_of(recorder: Recorder, model: str) -> Path:
    """Return a configuration with the weights of a model, made here or by an earlier unit.

    The configuration follows the model's own, and also has its `load`.
    """
    folder = recorder.work / "checkpoints"
    config = load_configs([config_file(model)])
    transformer = folder / config_file(model).stem / "transformer"
    vae, text_encoder = folder / "vae" / "3d-vae.pt", folder / "t5-v1_1-xxl"
    made = ((transformer, write_network), (vae, write_vae), (text_encoder, write_text_encoder))
    for path, write in made:
        complete = path.with_name(f"{path.name}.complete")
        if not complete.exists():  # an interrupted unit may have written a part of it
            path.parent.mkdir(parents=True, exist_ok=True)
            write(recorder, config, path)
            complete.touch()
            recorder.free()
    embedders = copy.deepcopy(config["model"]["conditioner_config"]["params"]["emb_models"])
    embedders[0]["params"]["model_dir"] = str(text_encoder)
    places: dict[str, Any] = {
        "args": {"load": str(transformer)},
        "model": {
            "first_stage_config": {"params": {"ckpt_path": str(vae)}},
            "conditioner_config": {"params": {"emb_models": embedders}},
        },
    }
    file = folder / f"{config_file(model).stem}.yaml"
    file.write_text(yaml.safe_dump(places))
    return file


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    return next((kind for name, kind in DTYPES.items() if config["args"].get(name)), torch.float32)


def write_network(recorder: Recorder, config: dict[str, Any], path: Path) -> None:
    """Write `{path}/1/mp_rank_00_model_states.pt` and `{path}/latest`."""
    network = instantiate_on_meta(config["model"]["network_config"]).to(dtype_of(config))
    state = randomised(network, recorder.device).state_dict()
    (path / ITERATION).mkdir(parents=True, exist_ok=True)
    weights = {f"model.diffusion_model.{name}": tensor.cpu() for name, tensor in state.items()}
    torch.save({"module": weights}, path / ITERATION / "mp_rank_00_model_states.pt")
    (path / "latest").write_text(ITERATION)


def write_vae(recorder: Recorder, config: dict[str, Any], path: Path) -> None:
    """Write the file of the VAE, in float32."""
    first_stage = config["model"]["first_stage_config"]
    vae = instantiate_on_meta({**first_stage, "params": {**first_stage["params"], "ckpt_path": None}})
    state = randomised(vae, recorder.device).state_dict()
    torch.save({"state_dict": {name: tensor.cpu() for name, tensor in state.items()}}, path)


def write_text_encoder(recorder: Recorder, config: dict[str, Any], path: Path) -> None:
    """Write the folder of a T5 encoder, with the smaller tokenizer of the tiny model."""
    from transformers import T5Config, T5EncoderModel

    sizes = T5_TOY if recorder.toy else T5_XXL
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**sizes, **T5_COMMON))
    encoder = encoder.to(torch.float32 if recorder.toy else torch.bfloat16).to_empty(device=recorder.device)
    encoder.set_input_embeddings(encoder.get_input_embeddings())  # one tensor under two names again
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    encoder.save_pretrained(path, max_shard_size="5GB")
    shutil.copy(TOKENIZER, path)


def write_clips(folder: Path, frames: int, fps: int, size: tuple[int, int]) -> Path:
    """Write a folder of clips with captions, each a gradient moving right; return it."""
    height, width = size
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    columns = torch.arange(width)
    for number in range(CLIPS):
        with VideoWriter(folder / "videos" / f"{number}.mp4", fps, height, width) as video:
            for frame in range(frames + CLIP_SECONDS_MORE * fps):
                row = ((columns + 4 * frame) % width) / (width - 1) * 2.0 - 1
                video.write(row.expand(1, 3, height, -1))
        (folder / "labels" / f"{number}.txt").write_text("a gradient moves to the right\n")
    return folder

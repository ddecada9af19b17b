"""Engines of tiny models before the first step of a training."""

from argparse import Namespace
from pathlib import Path

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.latent_geometry import Bucket
from diffusion_video import SATVideoDiffusionEngine

LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "train_micro_batch_size_per_gpu": 2}
CLIP = Bucket(17, 96, 144)


def engine_of(
    config: Path, lora: bool = False, recompute: bool = False, parts=("model",), **args
) -> SATVideoDiffusionEngine:
    model = load_configs([config])["model"]
    network = model["network_config"]["params"]
    network["transformer_args"]["checkpoint_activations"] = recompute
    if lora:
        network["modules"]["lora_config"] = LORA
    engine = SATVideoDiffusionEngine(Namespace(model_config=model, **args), parts)
    engine.disable_untrainable_params()
    engine.model.train()
    return engine

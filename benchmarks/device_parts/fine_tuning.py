"""Measure steps of LoRA fine-tuning with activations recomputed and kept.

`benchmarks/training.py` sets the steps up.
"""

import gc
from typing import Any

import torch
from device_parts.models import TOY, TOY_LAYERS, Model, compiler_off
from device_parts.recording import Recorder
from device_parts.timing import measure as timed
from device_parts.units import CONFIGURATIONS
from measuring import training_step
from measuring.training_arguments import arguments

from cogvideox_sat.commands.startup import quiet_libraries
from sgm.compilation import compile_network

STEPS = 3
MODES = {  # of `checkpoint_activations`
    True: "all layers recomputed",
    "attention": "all recomputed but attention",
    False: "nothing recomputed",
}
TOY_CLIP = ("2", "4", "4")


def measure_all(recorder: Recorder, model: str) -> None:
    compiler_off(recorder)
    measure(recorder, model, compiled=False)
    measure(recorder, model, compiled=True)


def measure(recorder: Recorder, model: str, compiled: bool) -> None:
    """Write a row for each mode of recomputing activations, all with one network."""
    quiet_libraries()
    args = arguments("", command_line(recorder, model))
    engine = training_step.build_engine(args)
    network = training_step.build_network(args)
    network.use_attention(Model(model).attention(recorder, gradients=True))
    if compiled:
        compile_network(network)
    batch: dict[str, Any] = training_step.cached_batch(args, engine)
    contender = training_step.our_step(args, engine, network, batch, seeds=[0])
    for mode, description in MODES.items():
        row = f"{model}, LoRA, {description}{', compiled' if compiled else ''}"
        with recorder.attempt(row, may_not_fit=mode is not True):
            network.transformer.checkpoint_activations = mode
            gc.collect()
            result = timed(lambda _: contender.step(), recorder.device, STEPS)
            recorder.row(row, {"s a step": result.seconds, "peak GiB": result.gib, "first step s": result.first})
            if recorder.device.type == "cuda":
                torch.cuda.empty_cache()


def command_line(recorder: Recorder, model: str) -> list[str]:
    """Return the arguments of `benchmarks/training.py` for a model."""
    words = ["--model", CONFIGURATIONS.get(model, TOY), "--lora", "--device", recorder.device.type]
    words += ["--dtype", str(recorder.dtype).removeprefix("torch.")]
    if recorder.toy:
        words += ["--layers", str(TOY_LAYERS), "--clip", *TOY_CLIP]
    return words

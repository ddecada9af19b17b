"""Measure one step of a whole network with guidance, ours and diffusers'."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from device_parts.models import Model, compiler_off
from device_parts.recording import Recorder
from device_parts.timing import measure as timed
from torch import Tensor, nn

from sgm.compilation import compile_network
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

REPEATS = {True: 1, False: 3}  # for long and for short sequences
LONG = 30_000  # tokens


def measure_all(recorder: Recorder, model: str) -> None:
    compiler_off(recorder)
    measure(recorder, model)
    measure_diffusers(recorder, model)


def measure(recorder: Recorder, model: str) -> None:
    """Write the rows of our network, eager and compiled as by `compile_model: true`."""
    described = Model(model)
    with recorder.attempt(f"{model}, ours"):
        network = described.network(recorder)
        run = ours(recorder, described, network)
        write(recorder, described, f"{model}, ours", run)
        with recorder.attempt(f"{model}, ours compiled"):
            compile_network(network)
            write(recorder, described, f"{model}, ours compiled", run)


def measure_diffusers(recorder: Recorder, model: str) -> None:
    """Write the rows of diffusers, eager and with each layer compiled."""
    if importlib.util.find_spec("diffusers") is None:
        recorder.note("diffusers is not installed: its rows are missing")
        return
    described = Model(model)
    with recorder.attempt(f"{model}, diffusers"):
        twin, run = theirs(recorder, described)
        write(recorder, described, f"{model}, diffusers", run)
        with recorder.attempt(f"{model}, diffusers compiled"):
            for block in twin.transformer_blocks:
                block.compile()
            write(recorder, described, f"{model}, diffusers compiled", run)


def write(recorder: Recorder, model: Model, row: str, run: Callable[[object], Tensor]) -> None:
    with torch.no_grad():
        result = timed(run, recorder.device, REPEATS[model.work.tokens > LONG])
    values: dict[str, Any] = {
        "s a step": result.seconds,
        "TFLOP/s": model.work.flops / result.seconds / 1e12,
        "peak GiB": result.gib,
        "first call s": result.first,
    }
    if not recorder.toy:
        values["floor s"] = model.work.floor
    recorder.row(row, values)


def ours(recorder: Recorder, model: Model, network: nn.Module) -> Callable[[object], Tensor]:
    wrapper = OpenAIWrapper(network, dtype=recorder.dtype)
    x, timesteps, text = model.inputs(recorder)
    return lambda _: wrapper(x, timesteps, {"crossattn": text})


def theirs(recorder: Recorder, model: Model) -> tuple[nn.Module, Callable[[object], Tensor]]:
    from diffusers_network import build_diffusers_network, diffusers_rotary

    twin = build_diffusers_network(model.params, recorder.device, recorder.dtype)
    rotary = diffusers_rotary(model.params, model.grid)
    tables = rotary and tuple(table.to(recorder.device) for table in rotary)
    x, timesteps, text = model.inputs(recorder)
    return twin, lambda _: twin(x, text, timesteps, image_rotary_emb=tables, return_dict=False)[0]

"""Measure encoding and decoding of one clip by the VAEs of `benchmarks/vae.py`."""

import argparse
import importlib.util
from collections.abc import Callable

import torch
from device_parts.recording import Recorder
from device_parts.timing import measure as timed
from measuring.autoencoders import AT_ONCE, build
from measuring.vae_arguments import CLIPS, DEFAULTS, OURS, WHOLE
from vae import CONTENDERS

TOY_CLIP = (9, 32, 32)


def measure(recorder: Recorder) -> None:
    """Write a row for each task and contender."""
    size, prefix = ("tiny", "toy, ") if recorder.toy else ("full", "")
    frames, height, width = TOY_CLIP if recorder.toy else CLIPS["full", "cuda"]
    args = argparse.Namespace(size=size, frames=frames, height=height, width=width)
    args.device, args.dtype = recorder.device, str(recorder.dtype).removeprefix("torch.")
    contenders = [(OURS,)]
    if importlib.util.find_spec("diffusers") is None:
        recorder.note("diffusers is not installed: its rows are missing")
    else:
        contenders.append((DEFAULTS, WHOLE))
    for names in contenders:
        with recorder.attempt(f"building {names[0]}"), torch.no_grad():
            built = build(args, *names)
            for task, contending in CONTENDERS.items():
                for name in names:
                    if name in contending:
                        measure_task(recorder, f"{prefix}{task}, {name}", built[name][task])
            if OURS in names:
                measure_task(recorder, f"{prefix}{AT_ONCE}, {OURS}", built[OURS][AT_ONCE])
            del built


def measure_task(recorder: Recorder, row: str, run: Callable[[], object]) -> None:
    with recorder.attempt(row):
        result = timed(lambda _: run(), recorder.device, repeats=2)
        recorder.row(row, {"s": result.seconds, "peak GiB": result.gib})

"""Measure the memory of the commands, from prompts to videos and clips to checkpoints.

A command runs as a function of this process, in which PyTorch reports the memory. Sampling takes few steps, since all
steps take the same memory, and `networks` measures their time.
"""

import contextlib
import io
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from device_parts.models import CONFIGS, config_file
from device_parts.recording import Recorder
from device_parts.weights import weights_of, write_clips
from harness import peak_memory

import sample_video
import train_video
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.tool_commands import estimate_memory

OFFLOADS = ("none", "stage", "sequential")
SAMPLING_STEPS, TRAINING_STEPS = 4, 4
PROMPT = "A red kite rises over a field of barley while clouds drift to the left.\n"
TOY_SIZE = ["--sampling_image_size", "32", "32", "--sampling_num_frames", "3"]
TOY_TRAINING = {"video_size": [32, 32], "max_num_frames": 5}


def measure_all(recorder: Recorder, model: str) -> None:
    sample(recorder, model, OFFLOADS)
    train(recorder, model)


def sample(recorder: Recorder, model: str, offloads: Sequence[str]) -> None:
    """Write a row of the sampling command for each way of offloading."""
    files = [str(config_file(model)), str(CONFIGS / "inference.yaml"), str(weights_of(recorder, model))]
    prompts = recorder.work / "prompts.txt"
    prompts.write_text(PROMPT)
    for offload in offloads:
        row = f"{model}, sample_video.py --offload {offload}"
        outputs = recorder.work / f"videos, {model}, {offload}"
        arguments = ["--base", *files, "--input_file", str(prompts), "--output_dir", str(outputs)]
        arguments += ["--offload", offload, "--sampling_num_steps", str(SAMPLING_STEPS)]
        arguments += ["--device", recorder.device.type, *(TOY_SIZE if recorder.toy else [])]
        with recorder.attempt(row):
            expected = estimates(recorder, ["--base", *files]).get(offload)
            run(recorder, row, lambda given=arguments: sample_video.main(given), expected, outputs, "*.mp4")


def train(recorder: Recorder, model: str) -> None:
    """Write the row of the training command, LoRA from clips."""
    weights, clips, runs = weights_of(recorder, model), recorder.work / "clips", recorder.work / "runs"
    files = [str(config_file(model, "_lora")), str(training_file(recorder)), str(weights)]
    data = load_configs(files)["data"]["params"]
    row = f"{model}, train_video.py, LoRA from clips"
    arguments = ["--base", *files, "--save", str(runs), "--train_iters", str(TRAINING_STEPS), "--log_interval", "1"]
    arguments += ["--train_data", str(clips), "--device", recorder.device.type]
    with recorder.attempt(row):
        write_clips(clips, data["max_num_frames"], data["fps"], tuple(data["video_size"]))
        expected = estimates(recorder, ["--base", *files]).get("training")
        run(recorder, row, lambda: train_video.main(arguments), expected, runs, "*_model_states.pt")


def training_file(recorder: Recorder) -> Path:
    """Return the configuration of the data and the optimizer."""
    if not recorder.toy:
        return CONFIGS / "sft.yaml"
    file = recorder.work / "sft.yaml"
    lines = [f"include: {CONFIGS / 'sft.yaml'}", "args: {num_workers: 1}", f"data: {{params: {TOY_TRAINING}}}"]
    file.write_text("\n".join(lines).replace("'", "") + "\n")
    return file


def run(
    recorder: Recorder,
    row: str,
    command: Callable[[], int],
    expected: float | None,
    outputs: Path,
    pattern: str,
) -> None:
    """Write the row of a command, which must write files of `pattern` below `outputs`.

    Args:
        expected: GiB of memory.

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    codes: list[int] = []
    with logged_errors() as errors:
        gib = peak_memory(lambda: codes.append(command()), recorder.device)
    seconds = time.perf_counter() - start
    if codes != [0]:
        raise RuntimeError(f"exit code {codes[0]}: {errors[-1] if errors else 'log.txt says why'}")
    if not any(outputs.rglob(pattern)):
        raise RuntimeError(f"the command wrote no {pattern}")
    values = {"s": seconds, "peak GiB": gib}
    if recorder.device.type == "cuda":
        values["reserved GiB"] = torch.cuda.max_memory_reserved(recorder.device) / 2**30
    recorder.row(row, values, expected={"peak GiB": (expected, "C")} if expected is not None else None)


@contextlib.contextmanager
def logged_errors() -> Iterator[list[str]]:
    """Yield a list that collects the errors logged within the block."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield errors
    finally:
        logging.getLogger().removeHandler(handler)


def estimates(recorder: Recorder, arguments: Sequence[str]) -> dict[str, float]:
    """Return the estimates of `tools/estimate_memory.py`, in GiB.

    For sampling they are by way of offloading, for training by the kind of run.
    """
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = estimate_memory.main(list(arguments))
    if code != 0:
        recorder.note("the memory estimate failed; log.txt says why")
    return read_estimates(told.getvalue())


# Matches a row for each way of offloading, with the GiB of each stage, 1 of them for CUDA itself.
STAGES = re.compile(r"^--offload (\w+)((?: +[\d.]+)+)$", re.MULTILINE)
TRAINING = re.compile(r"^on clips: expected memory.*?: ([\d.]+) GiB", re.MULTILINE)
OF_CUDA = 1.0


def read_estimates(text: str) -> dict[str, float]:
    """Return the sizes in GiB in an estimate's text, by name, without CUDA's own memory."""
    found = {way: max(map(float, sizes.split())) - OF_CUDA for way, sizes in STAGES.findall(text)}
    if training := TRAINING.search(text):
        found["training"] = float(training[1])
    return found

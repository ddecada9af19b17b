"""The device of a run: its choice, its line in the log, and its precision."""

import logging
import os
import platform
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogvideox_sat.configuration.deepspeed import with_precision
from sgm.errors import UserError

logger = logging.getLogger(__name__)

NVIDIA_SMI = ("nvidia-smi", "-L")
NVIDIA_SMI_SECONDS = 5.0  # with a broken driver, nvidia-smi hangs for ever
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES with which a user or SLURM hides all GPUs


def choose_device(name: str | None) -> torch.device:
    """Return the chosen device, and log it.

    If `nvidia-smi` lists a GPU that PyTorch does not see, a warning is logged.

    Args:
        name: cpu, cuda (the GPU of LOCAL_RANK) or cuda:N; None: a GPU if PyTorch sees one.

    Raises:
        UserError: the device does not exist.
    """
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logger.info("%s", device_line(device))
    if os.environ.get("LOCAL_RANK", "0") == "0" and name != "cpu":
        warn_of_unseen_gpus(seen_gpus())
    return device


def find_device(name: str | None) -> torch.device:
    """Return the device that `choose_device` would choose, without changing anything.

    Raises:
        UserError: the device does not exist.
    """
    count = seen_gpus()
    device = torch.device(name or ("cuda" if count else "cpu"))
    if device.type == "cuda":
        if not count:
            raise UserError(f"device: {device} is not available: {why_no_gpu()}; use --device cpu")
        if device.index is not None and device.index >= count:
            raise UserError(f"device: {device} does not exist; PyTorch sees GPUs 0 to {count - 1}")
        own = int(os.environ.get("LOCAL_RANK", "0")) % count
        device = torch.device("cuda", own if device.index is None else device.index)
    return device


def seen_gpus() -> int:
    """Return how many GPUs PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def processes_here() -> int:
    """Return how many processes of this run are on this machine.

    If the launcher does not say, all processes are assumed to be on this machine.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1")


def device_line(device: torch.device) -> str:
    """Return the log line about `device`: its name, memory or threads, and PyTorch's version."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    else:
        threads = torch.get_num_threads()
        described = f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    of = f" of process {os.environ.get('RANK', '0')}" if processes > 1 else ""
    return f"device{of}: {device} ({described}), PyTorch {torch.__version__}"


def processor_name() -> str:
    """Return the model name of the processor, or its architecture if the system hides it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- GPUs that PyTorch does not see


def warn_of_unseen_gpus(seen: int) -> None:
    """Warn in one line if `nvidia-smi` lists more GPUs than PyTorch sees.

    GPUs that the user hides do not count.

    Args:
        seen: number of GPUs that PyTorch sees.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in HIDDEN or (visible is not None and seen):
        return
    try:
        listed = listed_gpus()
    except TimeoutError:
        if not seen:
            logger.warning(
                "device: nvidia-smi does not answer within %g s, and PyTorch sees no GPU: the CPU is used; check the "
                "driver if this machine has a GPU",
                NVIDIA_SMI_SECONDS,
            )
        return
    if len(listed) <= seen:
        return
    names = ", ".join(sorted(set(listed)))
    if seen:
        logger.warning("device: nvidia-smi lists %d GPUs (%s), PyTorch sees %d of them", len(listed), names, seen)
    else:
        logger.warning(
            "device: nvidia-smi lists %d GPU%s (%s), but PyTorch does not see any: %s; the CPU is used, which is slow",
            *(len(listed), "s" * (len(listed) > 1), names, why_no_gpu()),
        )


def listed_gpus() -> list[str]:
    """Return the names of the GPUs that `nvidia-smi` lists; empty if it is missing or fails.

    Raises:
        TimeoutError: `nvidia-smi` does not answer.
    """
    try:
        process = subprocess.Popen(
            NVIDIA_SMI, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    except OSError:
        return []
    try:
        output, _ = process.communicate(timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        # Do not wait for the killed process: one that hangs inside the driver does not end.
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError("nvidia-smi does not answer") from None
    # PyTorch sees one part of a GPU divided by MIG, however many parts exist.
    if process.returncode or "MIG " in output:
        return []
    names = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", output, flags=re.MULTILINE)
    return names or [line.strip() for line in output.splitlines() if "NVIDIA" in line and "NVIDIA-SMI" not in line]


def why_no_gpu() -> str:
    """Return why PyTorch sees no GPU, and what the user can do, without a full stop."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA, install a build with CUDA"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r} and hides all others, correct or unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    else:
        reason = "PyTorch finds no GPU"
    needs = torch.version.cuda or torch.version.hip
    return f"{reason} (this PyTorch needs a driver for CUDA {needs}: update the driver or install an older build)"


# ---------------------------------------------------------------- precision


def settle_precision(args: Any, device: torch.device) -> Any:
    """Return the arguments with a precision that `device` computes fast; log a change.

    A CPU without float16 arithmetic emulates it: there, the full-size VAE takes more than 8 minutes for one clip of 9
    frames of 96x144, and 15 s in bfloat16. On such a CPU, `fp16` becomes `bf16`, or float32 if the CPU has no bfloat16
    arithmetic either. bfloat16 takes as much memory as float16.
    """
    if not args.fp16 or computes_fast(torch.float16, device):
        return args
    bf16 = computes_fast(torch.bfloat16, device)
    logger.info(
        "fp16: this CPU computes float16 slowly, so the arithmetic is %s",
        "bfloat16, as with --bf16" if bf16 else "float32",
    )
    changes: dict[str, Any] = {"fp16": False, "bf16": bf16}
    if hasattr(args, "deepspeed_config"):
        changes["deepspeed_config"] = with_precision(args.deepspeed_config, changes)
    return replace(args, **changes)


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return `dtype`, or the replacement of float16 on `device`; see `settle_precision`."""
    if dtype != torch.float16 or computes_fast(dtype, device):
        return dtype
    chosen = torch.bfloat16 if computes_fast(torch.bfloat16, device) else torch.float32
    logger.info("float16 is slow on this CPU, so the arithmetic is %s here", str(chosen).removeprefix("torch."))
    return chosen


def computes_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `device` has its own kernels for a half-precision `dtype`.

    All GPUs have them; not all CPUs do.
    """
    if device.type != "cpu":
        return True
    asks = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}[dtype]
    try:
        return bool(getattr(torch.ops.mkldnn, asks)())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False

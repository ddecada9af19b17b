"""Shared parts of the benchmarks: fair timing in one process, peak memory, tables.

PyTorch is imported on first use, so that `--help` is fast.
"""

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def config_name(text: str) -> str:
    """Return an argument that names a configuration in configs/."""
    if not (ROOT / "configs" / f"{text}.yaml").is_file():
        raise argparse.ArgumentTypeError(f"configs/{text}.yaml does not exist; give a name such as cogvideox_5b")
    return text


def device_name(text: str) -> str:
    """Return an argument that names a device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a device; use cpu, cuda or cuda:N")
    return text


def alternating_medians(
    contenders: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the seconds of each contender: the median of `repeats` runs after a warm-up.

    Contenders take turns, and every other round is in reverse order, so that other work on the machine affects all
    alike. With `time.process_time` as the clock, only the time of this process counts.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for round_number in range(repeats + 1):
        for name in order:
            synchronize()
            start = clock()
            contenders[name]()
            synchronize()
            if round_number:
                times[name].append(clock() - start)
        order.reverse()
    return {name: statistics.median(each) for name, each in times.items()}


def synchronize() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object], device: "torch.device") -> float:
    """Return the peak memory of this process during `run`, in GiB.

    The memory is the GPU's, or on a CPU the resident memory. Resident memory includes everything from before, so
    measure each contender in its own process (`peak_memories`). Linux only.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage, whose peak a process inherits from its parent and cannot reset.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20


def peak_memories(contenders: Iterable[str], device: "torch.device", *task: str) -> dict[str, float]:
    """Return the peak memory of each contender, in GiB, by its name.

    This script runs again for each, with `--memory-of TASK CONTENDER`, and prints the number last. On a GPU all run at
    the same time, since each process only measures its own memory, and loading takes most of their time.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()  # frees memory for these processes
    names = list(contenders)
    with ThreadPoolExecutor(len(names) if device.type == "cuda" else 1) as pool:
        return dict(zip(names, pool.map(lambda name: _in_own_process("--memory-of", *task, name), names), strict=True))


def speeds(seconds: Mapping[str, float], memory: Mapping[str, float], flops: float) -> dict[str, list[object]]:
    """Return each contender's cells: seconds, TFLOP/s, GiB, and the time ratio to diffusers."""
    return {
        name: [
            each,
            flops / each / 1e12,
            f"{memory[name]:.2f}",
            f"{each / seconds['diffusers']:.3f}",
        ]
        for name, each in seconds.items()
    }


def layer_flops(tokens: int, width: int) -> tuple[int, int]:
    """Return the floating-point operations of one layer's forward pass on one clip.

    The operations counted are products with weight matrices (projections of the attention and the MLP, 24·n·d²) and
    the attention (4·n²·d).
    """
    return 24 * tokens * width**2, 4 * tokens**2 * width


def machine(device: "torch.device") -> str:
    """Return one line about the machine of a measurement."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, threads: {torch.get_num_threads()}"
    return f"{name}; PyTorch {torch.__version__}; Python {platform.python_version()}; {date.today()}"


def counted_with() -> str:
    """Return one line about numbers that are the same on every machine."""
    import torch

    return f"Computed, not measured; PyTorch {torch.__version__}; {date.today()}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def tell(section: str, text: str, write: bool) -> None:
    """Print a result; with `write`, put it into RESULTS.md too, see `write_results`."""
    print(text, flush=True)  # noqa: T201
    if write:
        write_results(section, text)


def write_results(section: str, text: str) -> None:
    """Write `text` and the command under the heading `section` of RESULTS.md.

    Earlier text under this heading is replaced.
    """
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    text = f"`{shlex.join(['python', str(script), *sys.argv[1:]])}`\n\n{text}"
    content = RESULTS.read_text() if RESULTS.exists() else "# Benchmark results\n"
    block = f"## {section}\n\n{text}\n"
    pattern = re.compile(rf"^## {re.escape(section)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(content):
        content = pattern.sub(lambda _: block + "\n", content)
    else:
        content = f"{content.rstrip()}\n\n{block}"
    RESULTS.write_text(content.rstrip() + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _in_own_process(*arguments: str) -> float:
    done = subprocess.run([sys.executable, *sys.argv, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])

"""The device check runs at its toy size on a CPU, survives failures, and can be resumed."""

import gzip
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "device_check.py"
ATTENTION_ROWS = {"toy, auto", "toy, PyTorch's choice", "toy, flash", "toy, math"}
PLANTED = """
import os
from pathlib import Path

def count(folder, name):
    with Path(folder, name).open("a") as file:
        file.write("x")

def good(recorder, folder):
    count(folder, "good")
    recorder.row("good row", {"s": 0.5})

def raises(recorder, folder):
    count(folder, "raises")
    recorder.row("before it", {"s": 1.5})
    raise ValueError("planted | error")

def dies(recorder, folder):
    count(folder, "dies")
    if not Path(folder, "mended").exists():
        os.kill(os.getpid(), 9)

def rows(recorder, folder):
    with recorder.attempt("a row that fails"):
        raise RuntimeError("in a row")
    with recorder.attempt("too large", may_not_fit=True):
        raise MemoryError
    recorder.row("a row after it", {"s": 2.5})
"""


@pytest.fixture
def part(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the benchmarks by its name; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=ROOT)


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the rows of each table by title and first cell."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in text.split("### ")[1:]:
        lines = [line for line in block.splitlines() if line.startswith("| ")][2:]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        found[block.partition("\n")[0]] = {row[0]: row[1:] for row in cells}
    return found


# ---------------------------------------------------------------- the whole


@pytest.mark.slow
@pytest.mark.long
def test_toy_on_a_cpu(tmp_path):
    """The same code as on a GPU measures all parts, and leaves only the results."""
    temporary, output = tmp_path / "temporary", tmp_path / "output"
    temporary.mkdir()
    results = (BENCHMARKS / "RESULTS.md").read_bytes()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ("--device", "cpu", "--size", "toy", "--budget", "3000", "--output", str(output))
    done = run(*arguments, TMPDIR=str(temporary))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr + (output / "log.txt").read_text()
    assert (BENCHMARKS / "RESULTS.md").read_bytes() == results, "--write was not given"
    assert after.ru_utime - before.ru_utime < 240, "seconds of processor time; 80 on two cores of a server"

    found = tables(done.stdout)
    rows = [set(table) for table in found.values()]
    offloads = [f"toy, sample_video.py --offload {way}" for way in ("none", "stage", "sequential")]
    modes = ("all layers recomputed", "all recomputed but attention", "nothing recomputed")
    assert rows == [
        ATTENTION_ROWS,
        {"toy, eager", "toy, compiled"},
        set(found["Operations and kernels of one layer"]),
        {"toy, ours", "toy, ours compiled", "toy, diffusers", "toy, diffusers compiled"},
        {
            *(f"toy, encode, {name}" for name in ("ours", "diffusers", "diffusers, slices off")),
            *(f"toy, decode, {name}" for name in ("ours", "diffusers")),
            "toy, decode all chunks at once, ours",
        },
        {f"toy, LoRA, {mode}{compiled}" for mode in modes for compiled in ("", ", compiled")},
        {*offloads, "toy, train_video.py, LoRA from clips"},
    ]
    assert all(float(row[0].partition(" ")[0]) > 0 for table in found.values() for row in table.values())
    commands = found["The commands"]
    assert [name for name, row in commands.items() if "[C]" not in row[1]] == offloads[1:], "estimates of memory"
    operations, fused = (
        [name for name in found["Operations and kernels of one layer"] if name.startswith(how)]
        for how in ("eager: ", "compiled: ")
    )
    assert "eager: addmm" in operations and all("fused" in name for name in fused)
    assert 0 < len(fused) < len(operations)

    assert not list(temporary.glob("device_check-*")), "weights are removed"
    files = {path.name for path in output.iterdir()}
    assert files == {"results.jsonl", "tables.md", "log.txt", "layer_eager.json.gz", "layer_compiled.json.gz"}
    assert json.loads(gzip.decompress((output / "layer_eager.json.gz").read_bytes()))["traceEvents"]
    assert (output / "tables.md").read_text() == done.stdout
    again = run("--tables", "--output", str(output))
    assert again.returncode == 0 and again.stdout == done.stdout


def test_help_is_quick_and_needs_no_torch():
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run("--help")
    assert done.returncode == 0 and "--resume" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 2
    light = "import device_check, sys; assert not {'torch', 'deepspeed', 'av', 'decord'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True, cwd=BENCHMARKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "video"), "error: --parts: 'video' is unknown; choose from attention, layer, networks"),
        (("--parts", ","), "error: --parts: no part is given; choose from"),
        (("--budget", "0"), "error: --budget: 0.0 is not a number of seconds; give one above 0"),
        (("--device", "cpu"), "error: --size: full needs a GPU; give --size toy"),
        (("--device", "cpu", "--size", "toy", "--output", "{file}"), "error: --output: {file} cannot be written to"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    file = tmp_path / "file"
    file.write_text("")
    done = run(*(word.format(file=file) for word in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith(message.format(file=file)) and done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.slow
def test_no_gpu(tmp_path):
    done = run("--output", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: --device: PyTorch finds no GPU; choose --device cpu --size toy, or repair the driver\n"
    )


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def planted(part, tmp_path, monkeypatch) -> Callable[..., int]:
    """Return the check with planted units, a function of arguments that returns the exit code."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check, units = part("device_check"), part("device_parts.units")
    options = {"folder": str(tmp_path)}
    names = (("raises", "vae"), ("dies", "vae"), ("rows", "vae"), ("good", "commands"))
    made = [units.Unit(name, kind, f"planted.{name}", 1, options) for name, kind in names]
    monkeypatch.setattr(check, "units_of", lambda size: made)
    arguments = ["--device", "cpu", "--size", "toy", "--budget", "3000", "--output", str(tmp_path / "output")]
    return lambda *more: check.main([*arguments, *more])


@pytest.mark.slow
@pytest.mark.long
def test_a_unit_that_crashes(planted, tmp_path, capfd):
    """A crashed unit has a row, the others are measured, and --resume runs only that unit."""
    assert planted() == 1
    text = capfd.readouterr().out
    found = tables(text)
    assert found["VAE"]["before it"][0] == "1.5", "what a unit measured before it failed stays"
    assert found["VAE"]["a row that fails"][0] == "failed: RuntimeError: in a row"
    assert found["VAE"]["too large"][0] == "failed: host memory is full"
    assert found["VAE"]["a row after it"][0] == "2.5"
    assert found["The commands"]["good row"][0] == "0.5"
    assert "* raises: failed: ValueError: planted \\| error" in text
    assert "* dies: failed: ended by SIGKILL after" in text

    (tmp_path / "mended").write_text("")
    assert planted("--resume", "--parts", "commands") == 0, "of what was asked for, nothing failed"
    assert "dies: failed" in capfd.readouterr().out, "that of other parts is still told"
    assert planted("--resume") == 1
    text = capfd.readouterr().out
    assert "dies: failed" not in text and tables(text)["The commands"]["good row"][0] == "0.5"
    runs = {name: len((tmp_path / name).read_text()) for name in ("good", "raises", "dies")}
    assert runs == {"good": 1, "raises": 2, "dies": 2}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_ended_keeps_what_it_measured(tmp_path):
    arguments = ["--device", "cpu", "--size", "toy", "--budget", "3000", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        results = tmp_path / "results.jsonl"
        deadline = time.monotonic() + 200
        while not (results.exists() and '"layer", "row"' in results.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.terminate()
        text = process.communicate()[0]
    assert process.returncode == 130
    assert set(tables(text)["Attention alone"]) == ATTENTION_ROWS
    assert "toy, eager" in tables(text)["One layer"]


def test_tables_need_results(tmp_path):
    done = run("--tables", "--output", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"error: --tables: {tmp_path} holds no results; name the --output of an earlier run\n"


def test_results_of_another_size_are_not_resumed(part, tmp_path, caplog):
    check, results = part("device_check"), part("device_parts.results")
    results.Results(tmp_path).append({"settings": {"device": "cuda", "size": "full"}})
    assert check.main(["--device", "cpu", "--size", "toy", "--resume", "--output", str(tmp_path)]) == 2
    assert f"--resume: {tmp_path} holds results of --device cuda, --size full; choose another --output" in caplog.text


@pytest.fixture
def runner(part, tmp_path) -> Callable[..., object]:
    """Return a function that makes a runner for which so many seconds are left."""
    running, results = part("device_parts.running"), part("device_parts.results")
    settings = {"device": "cpu", "size": "full", "work": str(tmp_path)}

    def make(left: float) -> object:
        deadline = {"vae": time.monotonic() + left}
        return running.UnitRunner(results.Results(tmp_path), settings, deadline, tmp_path / "log.txt")

    return make


@pytest.mark.slow
@pytest.mark.long
def test_a_unit_that_hangs(part, runner, tmp_path, monkeypatch):
    """It is ended with all that it started."""
    pids = tmp_path / "pids"
    (tmp_path / "child.py").write_text(
        "import os, subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{inner.pid}}')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(part("device_parts.running"), "CHILD", tmp_path / "child.py")
    unit = part("device_parts.units").Unit("slow", "vae", "none.needed", 1)
    assert runner(left=10).run(unit) == "failed"
    assert "did not end within 10 s" in (tmp_path / "results.jsonl").read_text()
    deadline = time.monotonic() + 60  # a busy machine takes its time to end a process
    while any(is_running(pid) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_unit_that_does_not_fit_is_skipped(part, runner, tmp_path):
    unit = part("device_parts.units").Unit("long", "vae", "none.needed", 40)
    assert runner(left=30.2).run(unit) == "skipped"
    (record,) = part("device_parts.results").Results(tmp_path).read()
    assert record["why"] == "takes about 40 s, 30 s are left for its part"
    assert not part("device_parts.tables").failures([record])


def test_each_part_has_its_turn(part, tmp_path, monkeypatch):
    """A unit may take the time of its part, the first one also that of later parts.

    No unit takes more than the whole budget.
    """
    running, units = part("device_parts.running"), part("device_parts.units")
    results, now = part("device_parts.results").Results(tmp_path), [0.0]
    limits = {}

    def take_time(self, unit, limit):
        limits[unit.name] = limit
        now[0] += unit.cost
        return 0

    monkeypatch.setattr(running.UnitRunner, "start_and_wait", take_time)
    deadlines = {"vae": 20.0, "training": 40.0, "commands": 100.0}
    runner = running.UnitRunner(results, {"size": "full"}, deadlines, tmp_path / "log.txt", clock=lambda: now[0])
    costs = {"vae": (25, 5), "training": (10, 5, 10), "commands": (61, 40)}
    ends = [
        runner.run(units.Unit(f"{name} {number}", name, "x.y", cost))
        for name, all_costs in costs.items()
        for number, cost in enumerate(all_costs)
    ]
    assert ends == ["done", "skipped", "done", "done", "skipped", "skipped", "done"]
    assert limits == {"vae 0": 100.0, "training 0": 60.0, "training 1": 5.0, "commands 1": 60.0}


def test_a_line_that_was_cut_off(part, tmp_path):
    results = part("device_parts.results").Results(tmp_path)
    results.append({"unit": "a", "state": "done"})
    with results.file.open("a") as file:
        file.write('{"unit": "b", "sta')
    assert results.done() == {"a"}


# ---------------------------------------------------------------- parts


def test_budget_is_shared_by_the_parts_that_are_chosen(part):
    running, units = part("device_parts.running"), part("device_parts.units")
    whole = running.deadlines(list(units.PARTS), 460, now=100)
    assert whole["attention"] == 125 and whole["commands"] == pytest.approx(560)
    assert running.deadlines(["training", "vae"], 230, now=0) == {"vae": 70, "training": 230}


@pytest.mark.slow
def test_units_name_functions(part, monkeypatch):
    """Each unit of the full size, which no CPU runs, names a function and its arguments."""
    import inspect

    for folder in ("tests", "tests/sat"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    units = part("device_parts.units")
    for unit in [*units.units_of("full"), *units.units_of("toy")]:
        module, _, function = unit.target.rpartition(".")
        signature = inspect.signature(getattr(part(f"device_parts.{module}"), function))
        signature.bind("recorder", **unit.options)
        assert unit.part in units.PARTS
    names = [unit.name for unit in units.units_of("full")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("layers", "width", "tokens", "products", "attention", "floor"),
    [
        (30, 1920, 17776, 94, 146, 0.43),
        (42, 3072, 17776, 338, 326, 1.14),
        (42, 3072, 45104, 858, 2100, 5.5),
        (42, 3072, 85904, 1634, 7617, 17.8),
    ],
)
def test_floor(part, layers, width, tokens, products, attention, floor):
    """Counts of one step with guidance, in TFLOP, as worked out by hand."""
    work = part("device_parts.floating_point").Work(layers, width, tokens)
    assert work.products / 1e12 == pytest.approx(products, rel=0.005)
    assert work.attention / 1e12 == pytest.approx(attention, rel=0.005)
    assert work.floor == pytest.approx(floor, rel=0.02)
    heads = width // 64
    assert part("device_parts.floating_point").attention_flops(2, heads, tokens, 64) * layers == work.attention


def test_full_sizes(part, monkeypatch):
    """The models that are measured have the tokens of the released ones."""
    for folder in ("tests", "tests/sat"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    models, units = part("device_parts.models"), part("device_parts.units")
    work = [models.Model(name).work for name in (units.TWO_B, units.FIVE_B, units.ONE_FIVE)]
    assert [(each.layers, each.width, each.tokens) for each in work] == [
        (30, 1920, 17776),
        (42, 3072, 17776),
        (42, 3072, 45104),
    ]


def test_tables(part):
    tables_module, units = part("device_parts.tables"), part("device_parts.units")
    known = [units.Unit("a", "networks", "x.y", 1), units.Unit("b", "commands", "x.y", 1)]
    records = [
        {"settings": {}},
        {"unit": "a", "row": "5B, ours", "values": {"s a step": 1.7, "TFLOP/s": 390.4, "peak GiB": 12.0}},
        {"unit": "a", "row": "5B, ours compiled", "failed": "no | luck"},
        {"unit": "a", "note": "said once"},
        {"unit": "a", "note": "said once"},
        {"unit": "a", "state": "done", "why": "", "seconds": 3},
        {"unit": "b", "row": "sample", "values": {"s": 12345.6}, "expected": {"peak GiB": [9.5, "C"]}},
        {"unit": "b", "state": "skipped", "why": "no time", "seconds": 0},
    ]
    assert tables_module.report(records, known).splitlines() == [
        "### Networks, one step with guidance",
        "",
        "|  | s a step | floor s | TFLOP/s | peak GiB | first call s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 5B, ours | 1.7 (1.68 [M]) | - | 390 (395 [M]) | 12 (12.5 [M]) | - |",
        "| 5B, ours compiled | failed: no \\| luck |  |  |  |  |",
        "",
        "* said once",
        "",
        "### The commands",
        "",
        "|  | s | peak GiB | reserved GiB |",
        "| --- | --- | --- | --- |",
        "| sample | 12346 | - (9.5 [C]) | - |",
        "",
        "* b: skipped: no time",
    ]
    assert tables_module.failures(records) == ["5B, ours compiled"]


def test_predictions_are_of_rows_that_exist(part):
    """Every prediction stands in a column of its table."""
    predictions, tables_module = part("device_parts.predictions"), part("device_parts.tables")
    for kind, rows in predictions.PREDICTIONS.items():
        for columns in rows.values():
            assert set(columns) <= set(tables_module.COLUMNS[kind])
    assert predictions.predicted("networks", "5B, ours", "s a step") == (1.68, "M")
    assert predictions.predicted("networks", "toy, ours", "s a step") is None


def test_kernels_of_a_gpu(part):
    """A fused kernel is told what it reads and writes by its caller; other kernels are not."""
    import torch

    timing = part("device_parts.timing")
    shapes = {"Input Dims": [[1000, 1000], [1000], []], "Input type": ["c10::BFloat16", "float", "Scalar"]}
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "triton_poi_fused_add_0", "dur": 9, "args": {"External id": 7, **shapes}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 9, "args": {"External id": 8, **shapes}},
        {"ph": "X", "cat": "kernel", "name": "triton_poi_fused_add_0", "dur": 2.0, "args": {"External id": 7}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "dur": 5.0, "args": {"External id": 8}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 1.0, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 1.0, "args": {"External id": 7}},
        {"ph": "i", "name": "Record Window End"},
    ]
    assert timing.kernels_of({"traceEvents": events}, torch.device("cuda")) == [
        timing.Kernel("triton_poi_fused_add_0", 2.0, (2_000_000 + 4000) / 1e9),
        timing.Kernel("gemm", 5.0, None),
        timing.Kernel("Memcpy DtoD", 1.0, None),
    ]

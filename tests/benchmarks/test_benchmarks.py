"""Every benchmark runs to its end at its smallest size, and prints a table of numbers.

Memory is measured in this process here; the benchmarks do so in a process for each contender.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvideox_sat.parallel import process_groups

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
NETWORK = ("--model", "tiny/cogvideox_tiny", "--layers", "1", "--clip", "1", "4", "4", "--repeats", "1")
AUTOENCODER = ("--size", "tiny", "--height", "16", "--width", "16", "--threads", "1", "--repeats", "1")
ELSEWHERE = {
    "data_loading": "tests/benchmarks/test_data_loading.py",
    "device_check": "tests/benchmarks/test_device_check.py",
    "harness": "what the benchmarks share",
}


@pytest.fixture
def run(monkeypatch, capsys, one_thread) -> Callable[..., str]:
    """Run a benchmark by its name with arguments, and returns what it prints."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    known = set(sys.modules)

    def run(name: str, *arguments: str) -> str:
        module, harness = (importlib.import_module(each) for each in (name, "harness"))
        assert Path(module.__file__).parent == BENCHMARKS
        command = [str(BENCHMARKS / f"{name}.py"), *arguments]

        def memory(contenders, device, *task: str) -> dict[str, float]:
            measured = {}
            for contender in contenders:
                monkeypatch.setattr(sys, "argv", [*command, "--memory-of", *task, contender])
                before = capsys.readouterr().out
                module.main()
                measured[contender] = json.loads(capsys.readouterr().out.splitlines()[-1])
                assert not before, "nothing is printed before the table"
            return measured

        for user in (module, harness):  # later imports read it from there
            monkeypatch.setattr(user, "peak_memories", memory, raising=False)
        monkeypatch.setattr(sys, "argv", command)
        results = (BENCHMARKS / "RESULTS.md").read_bytes()
        module.main()
        assert (BENCHMARKS / "RESULTS.md").read_bytes() == results, "--write was not given"
        return capsys.readouterr().out

    yield run
    process_groups.destroy_process_groups()
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def table(output: str) -> dict[str, list[str]]:
    """Return the cells of the table in what a benchmark prints, by the first of their row."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}


def number(cell: str) -> float:
    return float(re.match(r"[-\d.e+]+", cell)[0])


def test_every_benchmark_is_tested():
    source = Path(__file__).read_text()
    tested = set(re.findall(r'(?:run|def test_\w+)\(\s*"(\w+)"', source)) | ELSEWHERE.keys()
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == tested


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "harness"))
def test_help_answers_before_pytorch_is_loaded(name):
    """Only processor seconds count, so that other work on the machine does not."""
    script = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({str(BENCHMARKS / name) + '.py'!r}, "
    script += "run_name='__main__')"
    watched = f"import atexit, sys; atexit.register(lambda: print('loaded', 'torch' in sys.modules)); {script}"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert done.stdout.endswith("loaded False\n")
    assert seconds < 2, f"{seconds:.1f} s"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("network", ("--model", "nothing"), "configs/nothing.yaml does not exist"),
        ("training", ("--device", "gpu"), "'gpu' is not a device; use cpu, cuda or cuda:N"),
        ("checkpoint_stall", ("--folder", "gone"), "--folder: gone does not exist"),
        ("checkpoint_stall", ("--layers", "0"), "--layers and --repeats must be at least 1"),
        ("loading", ("--folder", "gone"), "--folder: gone does not exist"),
        ("loading", ("--t5-width", "100"), "--t5-layers must be at least 1, and --t5-width a multiple of 64"),
        ("conversion", ("--config", "gone.yaml"), "--config: gone.yaml does not exist"),
        ("conversion", ("--folder", "gone"), "--folder: gone does not exist"),
    ],
)
def test_mistakes_end_with_2(name, arguments, message, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_network(run):
    rows = table(run("network", *NETWORK))
    assert set(rows) == {"diffusers", "diffusers, equal settings", "ours"}
    assert all(number(cell) > 0 for row in rows.values() for cell in row)


@pytest.mark.long
def test_autoencoder_counted(run):
    """Twice the pixels are twice the bytes; fewer frames at once take less memory."""
    size = ("--size", "tiny", "--frames", "17", "--width", "64")
    one, two = (table(run("vae", "--count", *size, "--height", height)) for height in ("64", "128"))
    for task in ("encode", "decode"):
        assert number(two[task][0]) == pytest.approx(2 * number(one[task][0]), rel=0.2, abs=0.11)


@pytest.mark.slow
@pytest.mark.long
def test_autoencoder(run):
    """17 frames are two slices of diffusers."""
    rows = table(run("vae", *AUTOENCODER, "--frames", "17"))
    names = ("encode: diffusers", "encode: diffusers, slices off", "encode: ours", "decode: diffusers", "decode: ours")
    assert tuple(rows) == names
    sliced, whole, decoded = (number(rows[name][-1]) for name in (names[0], names[1], names[3]))
    assert max(whole, decoded) < 1e-5 < 1e-2 < sliced
    assert rows[names[0]][2:4] == rows[names[3]][2:4] == ["1.000"] * 2, "ratios are to diffusers at its defaults"


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "rows_of_diffusers"), [(9, 1), (17, 2)])
@pytest.mark.long
def test_autoencoder_training(run, frames, rows_of_diffusers):
    output = run("vae_training", *AUTOENCODER, "--frames", str(frames))
    rows = table(output)
    assert [name for name in rows if name.startswith("ours")] == ["ours", "ours, recomputing levels 0, 1"]
    assert len(rows) == 2 + rows_of_diffusers and rows["diffusers"][1] == "1.00×"
    assert number(output.partition("of the gradients: ")[2]) < 1e-4


@pytest.mark.parametrize("kind", ["--lora", "--full"])
def test_training(run, kind):
    output = run("training", *NETWORK, kind, "--equal")
    rows = table(output)
    assert set(rows) == {"diffusers", "diffusers, equal settings", "ours"}
    assert number(rows["ours"][-1]) == pytest.approx(number(rows["diffusers"][-1]), rel=1e-4), "the losses"
    assert number(rows["diffusers, equal settings"][-1]) == pytest.approx(number(rows["ours"][-1]), rel=1e-4)


@pytest.mark.slow
def test_overhead_of_training(run):
    rows = table(run("training", *NETWORK, "--overhead"))
    shares = {name: number(cells[1]) for name, cells in rows.items()}
    assert shares.pop("step") == 100
    assert set(shares) == {"forward", "backward", "optimizer", "waiting for data", "everything else"}
    assert 50 < sum(shares.values()) < 150 and min(shares.values()) >= 0


def test_stalls_of_checkpoints(run):
    network = [word for word in NETWORK if word != "--repeats"][:-1]
    rows = table(run("checkpoint_stall", *network, "--repeats", "2"))
    names = [f"{where} the steps, {which}" for where in ("between", "behind") for which in ("the first", "later ones")]
    assert list(rows) == names
    for name in names[:2]:
        stall, call, after, _, written = map(number, rows[name])
        assert stall == call == written > after == 0
    for name in names[2:]:
        _, call, _, _, written = map(number, rows[name])
        assert 0 < call <= written


def test_cells_of_training(run, monkeypatch):
    """The table of what other processes measure, each of which is asked for one step."""
    commands = []

    def measured(command, **_):
        commands.append(command)
        found = {"seconds": {"ours": 2.0, "diffusers": 4.0}, "memory": {"ours": 3.3, "diffusers": 3.0}}
        return subprocess.CompletedProcess(command, 0, stdout=f"a line\n{json.dumps(found)}\n")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", measured)
        rows = table(run("training", "--cells", "lora-514", "full-2000", "--repeats", "3"))
    assert rows == {name: ["2", "4", "3.3", "3", "0.500", "1.100"] for name in ("lora-514", "full-2000")}
    parsed = [importlib.import_module("measuring.training_arguments").arguments("", each[2:]) for each in commands]
    assert [(each.kind, each.batch, each.layers, each.row) for each in parsed] == [
        ("lora", 2, 6, True),
        ("full", 1, 6, True),
    ]


@pytest.mark.slow
def test_a_cell_of_training(run):
    found = json.loads(run("training", *NETWORK, "--row").splitlines()[-1])
    assert found["seconds"]["ours"] > 0 and found["memory"]["diffusers"] > 0


@pytest.mark.slow
def test_memory_of_training(run):
    rows = table(run("training_memory", "--models", "cogvideox_2b"))
    adapter, offloaded, divided = rows["cogvideox_2b, 49×480×720"]
    assert number(adapter) < number(offloaded) < number(divided)
    assert offloaded.endswith(" on the host") and "host" not in adapter + divided


@pytest.mark.slow
@pytest.mark.long
def test_loading(run, tmp_path):
    sizes = ["--model", "tiny/cogvideox_tiny", "--t5-layers", "1", "--t5-width", "64"]
    rows = table(run("loading", *sizes, "--folder", str(tmp_path), "--forms", "t5 float32"))
    size, held, anonymous, _, seconds = map(number, rows.pop("text encoder, 6 layers: as float32"))
    assert 0 < size < held < 0.1 < anonymous < 1 < seconds
    assert not rows and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_memory_of_training_is_what_a_step_takes(run):
    """For each way to recompute; it ends by itself where one of them is more than 15 % off."""
    output = run("training_memory", "--counted", "--models", "cogvideox_2b", "--layers", "4")
    modes = [line.split("|")[3].strip() for line in output.splitlines() if line.startswith("| cogvideox_2b")]
    assert modes == ["true", "attention", "false"] * 2


@pytest.mark.slow
def test_memory_of_sampling(run, monkeypatch):
    import measuring.fake_memory

    # Whose counts are compared with the estimate in tests/memory/test_sampling_peaks.py.
    counted = {"text encoder": 2**30, "network": 2**31, "VAE": 2**32}
    monkeypatch.setattr(measuring.fake_memory, "stage_peaks", lambda *_, **__: counted)
    rows = table(run("sampling_memory", "--models", "tiny/cogvideox_tiny"))
    assert len(rows) == 2
    for cells in rows.values():
        assert cells[:4] == ["1.00", "2.00", "4.00", "4.00"] and 0 < number(cells[4]) < 1


@pytest.mark.slow
def test_shared_videos(run):
    """Each layer exchanges twice and the network gathers once.

    A share of the tokens takes a share of their memory.
    """
    output = run("shared_videos", "--models", "cogvideox_5b", "--layers", "2", "--processes", "1", "4")
    (_, alone, shared) = [
        row.split("|")[2:-1] for row in output.splitlines() if row.count("|") == 8 and "---" not in row
    ]
    assert [cell.strip() for cell in alone[3:]] == ["0", "0", "0"]
    assert [cell.strip() for cell in shared[3:5]] == ["4", "1"] and float(shared[5]) > 0
    assert all(float(part) < 0.6 * float(whole) for whole, part in zip(alone[1:3], shared[1:3], strict=True))


@pytest.mark.slow
@pytest.mark.long
def test_conversion(run, tmp_path):
    config = str(ROOT / "tests" / "configs" / "2b.yaml")
    output = run("conversion", "--config", config, "--folder", str(tmp_path), "--threads", "1")
    rows = table(output)
    assert list(rows) == ["to diffusers", "back", "merge LoRA", "export LoRA", "import LoRA"]
    assert all(number(cell) > 0 for row in rows.values() for cell in row)
    assert output.strip().endswith("What came back is what went out, to the bit.")
    assert not list(tmp_path.iterdir())

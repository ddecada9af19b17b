"""Fixtures of several test files: the tiny models, and a single thread."""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import distributed

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class TinyModels:
    """Model configurations, one per family; weights, VAE and T5 encoder are in `folder`."""

    folder: Path

    def config(self, family: str) -> Path:
        return self.folder / f"{family}.yaml"

    def variant(self, family: str, path: Path, **changes: Any) -> Path:
        """Write a file to `path` that includes the family's configuration.

        Args:
            changes: sections of the new file.
        """
        path.write_text(yaml.safe_dump({"include": str(self.config(family)), **changes}))
        return path


@pytest.fixture(scope="module")
def one_thread():
    """Use one thread in all tests.

    The tensors of most tests are too small for more threads, which are slow on a busy machine; sums then also have the
    order of a torchrun process.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FAMILIES = ["2b", "5b", "5b_i2v", "1.5", "1.5_i2v"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    """Build the five families, each from `tests/configs/FAMILY.yaml`."""
    from build_tiny_model import main
    from cogvideox_sat.configuration.files import load_configs

    models = TinyModels(tmp_path_factory.mktemp("tiny"))
    for family in FAMILIES:
        config = load_configs([ROOT / "tests" / "configs" / f"{family}.yaml"])
        config["args"] = {"load": str(models.folder / family), "image2video": family.endswith("i2v")}
        place_parts(config["model"], models.folder)
        models.config(family).write_text(yaml.safe_dump(config))
    assert main(["--config", *(str(models.config(family)) for family in FAMILIES)]) == 0
    return models


def place_parts(model: dict[str, Any], folder: Path) -> None:
    """Set the paths of the model's text encoder and VAE to `folder`."""
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "t5")
    model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae.pt")


gc.disable()  # until all test files are imported, which creates many objects and no garbage


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz_cases", type=int, default=60, help="changed configurations to try (default: 60)")
    parser.addoption(
        "--soak_kills", type=int, default=0, help="kills of each kind of run, see test_kill_soak.py (default: 0)"
    )
    parser.addoption("--fuzz_start", type=int, default=0, help="number of the first of these cases (default: 0)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fuzz_case" in metafunc.fixturenames:
        start = metafunc.config.getoption("fuzz_start")
        metafunc.parametrize("fuzz_case", range(start, start + metafunc.config.getoption("fuzz_cases")))


@pytest.fixture
def soak_kills(request: pytest.FixtureRequest) -> int:
    kills = request.config.getoption("soak_kills")
    if not kills:
        pytest.skip("takes long; run it by --soak_kills 20, or bash tests/run.sh --all")
    return kills


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests for a GPU without one; forbid several processes in unmarked tests."""
    distributed.Running.is_marked = item.get_closest_marker("distributed") is not None
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


def pytest_runtest_logfinish() -> None:
    """Exclude the imports of a finished test from garbage collection.

    The imported objects are so many that each `gc.collect()` of the tested code would take a second.
    """
    if len(sys.modules) > Imported.frozen + 100:
        freeze_imports()


class Imported:
    frozen = 0  # number of modules at the last exclusion from garbage collection


def freeze_imports() -> None:
    gc.collect()  # garbage would otherwise stay forever
    gc.freeze()
    Imported.frozen = len(sys.modules)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files such that several workers end together: the longest files first."""
    if hasattr(config, "workerinput"):
        seconds: dict[Path, int] = {}
        for item in items:
            marks = {mark.name for mark in item.iter_markers()}
            seconds[item.path] = seconds.get(item.path, 0) + 3 * ("slow" in marks) + 5 * ("distributed" in marks)
        items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    freeze_imports()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report how many tests for a GPU ran, since they are skipped without one."""
    counts = {
        outcome: sum(isinstance(report, pytest.TestReport) and "gpu" in report.keywords for report in reports)
        for outcome, reports in terminalreporter.stats.items()
        if outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()) if count)
        terminalreporter.write_line(f"tests of the GPU: {told}")

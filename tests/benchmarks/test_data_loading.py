"""The benchmark of reading and probing clips runs at its smallest size."""

import re
from pathlib import Path

import pytest

import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_it_runs():
    options = ["--sources", "64x96", "--frames", "5", "--clips", "2", "--repeats", "1", "--files", "6"]
    command = [ROOT / "benchmarks" / "data_loading.py", *options, "--height", "32", "--width", "48"]
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reading, probing = (line for line in done.stdout.splitlines() if re.match(r"\| (64x96|6) ", line))
    rates = [float(cell.strip(" ×")) for cell in reading.split("|")[2:-1]]
    assert len(rates) == 8
    assert min(rates) > 0
    assert probing.count("|") == 5
    assert "seconds of processor time" in done.stdout

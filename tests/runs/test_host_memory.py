"""The free memory of the machine and of the containers around the process."""

import pytest

from cogvideox_sat.runs import host_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a machine with 8 GiB that are free, and no containers."""
    for name, path in (("MEMINFO", "meminfo"), ("CGROUPS", "cgroup"), ("OWN_CGROUPS", "own")):
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {8 * 2**20} kB\n")
    return tmp_path


def container(folder, limit, usage, cache, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\nfile 7\n")


def test_this_machine_says():
    assert 0 < host_memory.free_host_memory() < 2**50


def test_the_machine_alone(machine):
    assert host_memory.free_host_memory() == 8 * GIB


def test_the_narrowest_container_around_the_process_counts(machine):
    (machine / "own").write_text("0::/outer/inner\n")
    container(machine / "cgroup" / "outer" / "inner", "max", 3 * GIB, 0)
    container(machine / "cgroup" / "outer" / "other", 1, 1, 0)
    assert host_memory.free_host_memory() == 8 * GIB
    (machine / "cgroup" / "outer" / "memory.max").write_text(str(6 * GIB))
    (machine / "cgroup" / "outer" / "memory.current").write_text(str(5 * GIB))
    (machine / "cgroup" / "outer" / "memory.stat").write_text(f"inactive_file {2 * GIB}\n")
    assert host_memory.free_host_memory() == 3 * GIB


def test_the_older_kind_of_container(machine):
    container(machine / "cgroup" / "memory", 4 * GIB, 3 * GIB, GIB, version=1)
    assert host_memory.free_host_memory() == 2 * GIB


def test_a_full_container_has_nothing_left(machine):
    container(machine / "cgroup", 4 * GIB, 5 * GIB, 0)
    assert host_memory.free_host_memory() == 0


def test_a_system_that_does_not_say(machine):
    (machine / "meminfo").unlink()
    assert host_memory.free_host_memory() is None

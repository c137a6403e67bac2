"""How many threads by default: physical cores, big ones, within affinity and quota, on machines made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgert.devices import cores
from edgert.devices.cores import choose_threads, default_threads

GROUP = "sys/fs/cgroup"


class Machine:
    """Folders like those of a Linux machine."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch

    def write(self, path: str, text: str | int) -> None:
        """A file with one line."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def cpus(
        self, speeds: list[int], file: str = "cpu_capacity", siblings: int = 1, allowed: set[int] | None = None
    ) -> None:
        """CPUs of these speeds, `siblings` hardware threads to a core, of which the process may use `allowed`."""
        everywhere = set(range(len(speeds)))
        self.write("sys/devices/system/cpu/online", f"0-{len(speeds) - 1}")
        self.monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: everywhere if allowed is None else allowed)
        for cpu, speed in enumerate(speeds):
            folder = f"sys/devices/system/cpu/cpu{cpu}"
            first = cpu - cpu % siblings
            listed = f"{first}-{first + siblings - 1}" if siblings > 1 else str(cpu)
            self.write(f"{folder}/topology/core_cpus_list", listed)
            if speed:
                self.write(f"{folder}/{file}", speed)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_this_machine_has_an_answer() -> None:
    found = choose_threads()
    assert 1 <= found.n_threads == default_threads() <= len(found.cpus) <= (os.cpu_count() or 1)
    assert "physical core" in found.reason


@pytest.mark.parametrize(
    ("speeds", "file", "big"),
    [
        ([1024] * 4, "cpu_capacity", 4),  # Raspberry Pi 5
        ([397] * 4 + [1024] * 4, "cpu_capacity", 4),  # a board with four big and four small cores
        ([290] * 4 + [871] * 3 + [1024], "cpu_capacity", 4),  # a phone: one prime core, three nearly as fast
        (
            [280] * 3 + [640] * 4 + [1024],
            "cpu_capacity",
            5,
        ),  # a prime core alone would be slower than five of two thirds
        ([500] * 4 + [1024] * 4, "cpu_capacity", 4),
        ([1800000] * 4 + [2400000] * 4, "cpufreq/cpuinfo_max_freq", 4),
        ([1800000] * 4 + [2420000] * 3 + [2840000], "cpufreq/cpuinfo_max_freq", 4),
        ([5000000] * 6 + [5400000] * 2, "cpufreq/cpuinfo_max_freq", 8),  # favoured cores are no kind of their own
        ([0] * 4, "cpu_capacity", 4),  # nothing is known
        ([1024, 0, 0, 0], "cpu_capacity", 4),
    ],
)
def test_big_cores(machine: Machine, speeds: list[int], file: str, big: int) -> None:
    machine.cpus(speeds, file)
    found = choose_threads(machine.root)
    assert found.n_threads == big == len(found.cpus)
    assert found.pinned == (big < len(speeds))
    assert all(speeds[cpu] >= sorted(speeds)[-big] for cpu in found.cpus)
    if found.pinned:
        assert f"{big} big (" in found.reason and str(speeds[0]) in found.reason


def test_capacity_counts_more_than_clock(machine: Machine) -> None:
    machine.cpus([2000000, 2000000, 2000000, 1000000], "cpufreq/cpuinfo_max_freq")
    machine.cpus([1024, 1024, 400, 1024])
    assert choose_threads(machine.root).cpus == (0, 1, 3)


def test_small_cores_are_all_there_is_if_affinity_says_so(machine: Machine) -> None:
    machine.cpus([400] * 4 + [1024] * 4, allowed={1, 2, 3})
    found = choose_threads(machine.root)
    assert (found.n_threads, found.cpus, found.pinned) == (3, (1, 2, 3), False)
    assert found.reason.startswith("3 CPUs usable of 8 by affinity")


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hardware_threads_of_one_core_count_once(machine: Machine, name: str) -> None:
    machine.cpus([1024] * 8, siblings=2)
    for cpu in range(8):
        folder = machine.root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        (folder / "core_cpus_list").rename(folder / name)
    found = choose_threads(machine.root)
    assert (found.n_threads, len(found.cpus), found.pinned) == (4, 8, False)
    assert "4 physical cores with 8 hardware threads" in found.reason
    machine.monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2, 4})
    assert choose_threads(machine.root).n_threads == 3


def test_without_topology_the_system_is_asked(machine: Machine) -> None:
    machine.monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for physical, expected in ((2, 2), (16, 4), (None, 4)):
        machine.monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical, physical=physical: physical)
        assert choose_threads(machine.root).n_threads == expected


def test_without_affinity_all_cpus_count(machine: Machine) -> None:
    machine.monkeypatch.delattr(cores.os, "sched_getaffinity")
    machine.monkeypatch.setattr(cores.os, "cpu_count", lambda: 6)
    machine.monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: None)
    assert choose_threads(machine.root).n_threads == 6


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "350000 100000"}, 3),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"unified/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "max 100000", "cpu.max": "700000 100000"}, 3),
        ("0::/a/b", {"other/cpu.max": "100000 100000"}, 8),
        ("0::/host/path", {"cpu.max": "400000 100000"}, 4),  # a container that sees the host's path
        ("0::/../x", {"x/cpu.max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/a\n0::/",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": 250000, "cpu,cpuacct/a/cpu.cfs_period_us": 50000},
            5,
        ),
        ("3:cpu:/a", {"cpu/cpu.cfs_quota_us": 200000, "cpu/cpu.cfs_period_us": 100000}, 2),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}, 8),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": 100000}, 8),
        ("3:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": 100000, "cpuset/a/cpu.cfs_period_us": 100000}, 8),
        ("0::/", {"cpu.max": "nonsense 0"}, 8),
        ("0::/", {"cpu.max": "100000 0"}, 8),
        ("nonsense", {"cpu.max": ""}, 8),
    ],
)
def test_quotas(machine: Machine, membership: str, files: dict[str, str | int], expected: int) -> None:
    machine.cpus([1024] * 8)
    machine.write("proc/self/cgroup", membership)
    for name, text in files.items():
        machine.write(f"{GROUP}/{name}", text)
    found = choose_threads(machine.root)
    assert found.n_threads == expected
    assert ("cgroup" in found.reason) == (expected < 8)
    assert len(found.cpus) == 8 and not found.pinned

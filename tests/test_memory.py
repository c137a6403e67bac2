"""The memory plan: sizes read, limits held, refusals that name the numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from edgert import memory
from edgert.errors import MemoryLimitError, OptionError
from edgert.memory import MemoryPlan, parse_size

MIB = 1 << 20
PLAN = MemoryPlan(
    process=200 * MIB,
    hot=100 * MIB,
    cold=50 * MIB,
    kv=30 * MIB,
    work=20 * MIB,
    loading=10 * MIB,
    context=512,
    kv_type="f16",
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2GiB", 2 << 30), ("900MiB", 900 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("7k", 7168), (12345, 12345)],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gibi", "1e9", "0", "2GiB extra", "9" * 30, True])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="memory="):
        parse_size(text)


def test_a_plan_above_the_limit_names_both_and_the_remedy() -> None:
    assert PLAN.total == 400 * MIB
    PLAN.require(400 * MIB, "model.gguf")
    with pytest.raises(
        MemoryLimitError, match=r"memory 399 MiB is below what model.gguf needs.* 400 MiB .*--memory 400MiB"
    ):
        PLAN.require(399 * MIB, "model.gguf")


def test_a_plan_above_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 300 * MIB)
    with pytest.raises(MemoryLimitError, match="only 300 MiB are available"):
        PLAN.require(None, "model.gguf")


def test_available_memory_is_sane() -> None:
    assert 10 * MIB < memory.available() < 1 << 50


def put(folder: Path, **values: int | str) -> None:
    """Files of a cgroup; double underscores stand for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def left_in(cgroups: Path) -> int:
    """What available() says above the memory that this process holds."""
    return memory.available(cgroups.parent / "proc", cgroups) - psutil.Process().memory_info().rss


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup root without groups, on a machine with 8 GiB free."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def near(found: int, expected: int) -> bool:
    """Equal but for what the process itself took in between."""
    return abs(found - expected) < 8 * MIB


def test_cgroups_of_version_2_and_those_above_them_limit(cgroups: Path) -> None:
    cgroup = cgroups.parent / "proc" / "self" / "cgroup"
    assert near(left_in(cgroups), 8 << 30)
    cgroup.write_text("0::/user.slice/app.scope\n")
    put(cgroups / "user.slice/app.scope", memory__max="max", memory__current=5 << 30)
    assert near(left_in(cgroups), 8 << 30)
    put(cgroups / "user.slice", memory__max=3 << 30, memory__current=2 << 30)
    assert near(left_in(cgroups), 1 << 30)
    put(cgroups / "user.slice", memory__stat=f"anon {1 << 30}\ninactive_file {512 * MIB}\nactive_file {512 * MIB}")
    assert near(left_in(cgroups), 1536 * MIB)
    put(cgroups / "user.slice/app.scope", memory__max=700 * MIB, memory__current=600 * MIB)
    assert near(left_in(cgroups), 100 * MIB)


def test_cgroups_of_version_1_limit(cgroups: Path) -> None:
    (cgroups.parent / "proc" / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    names = {"memory__limit_in_bytes": 4 << 30, "memory__usage_in_bytes": 3 << 30}
    put(cgroups / "memory/docker/abc", **names, memory__stat=f"inactive_file 1\ntotal_inactive_file {2 << 30}")
    assert near(left_in(cgroups), 3 << 30)
    put(cgroups / "memory", memory__limit_in_bytes=2 << 30, memory__usage_in_bytes=1 << 30)
    assert near(left_in(cgroups), 1 << 30)


def test_in_a_container_that_sees_its_own_group_at_the_root(cgroups: Path) -> None:
    (cgroups.parent / "proc" / "self" / "cgroup").write_text("0::/docker/not-visible-here\n")
    put(cgroups, memory__max=900 * MIB, memory__current=1000 * MIB)
    assert left_in(cgroups) <= 8 * MIB

"""What doctor finds of memory: RAM, a cgroup's limit, huge pages, pressure, swap on flash and in zram."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgert import cgroup, memory, sysfs
from edgert.findings import Finding
from edgert.memory import STARTING_BYTES

_MUCH = 64 << 20  # of swap in use: more than what idle programs leave there


def memory_findings(root: Path) -> Iterator[Finding]:
    """Findings on memory; `root` holds sys/ and proc/."""
    machine, free = psutil.virtual_memory(), memory.available()
    yield Finding("memory", "installed", gib(machine.total), "hot weights, cache and the experts in use have to fit")
    yield _available(free, machine.available)
    yield _limit(root)
    yield _huge_pages(root)
    yield _pressure(root)
    yield from _swap(root)


def _available(free: int, of_machine: int) -> Finding:
    reason = "free, or page cache that gives way: what edgert takes where --memory is not given, less a head-room"
    if free < STARTING_BYTES:
        least = f"less than the {STARTING_BYTES >> 20} MiB with which the smallest model starts"
        return Finding("memory", "available", gib(free), least, "close other programs", stops=True)
    if free < 0.9 * of_machine:
        reason = "a cgroup's limit leaves less than the machine has"
    return Finding("memory", "available", gib(free), reason)


def _limit(root: Path) -> Finding:
    limits = cgroup.limited(root / "proc", root / "sys/fs/cgroup")
    if not limits:
        return Finding("memory", "cgroup limit", "none", "the whole machine's memory may be used")
    tightest = min(limits, key=lambda group: group.limit or 0)
    used = f"{gib(tightest.usage or 0)} used, page cache counted"
    reason = f"{used}: edgert plans within it, and gives page cache back before it is reached"
    return Finding("memory", "cgroup limit", gib(tightest.limit or 0), reason)


def _huge_pages(root: Path) -> Finding:
    pages = re.search(r"\[(\w+)\]", sysfs.text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if pages and pages[1] == "never":
        return Finding(
            "memory",
            "huge pages",
            "never",
            "experts are read and computed up to a third slower from small pages",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    reason = "the expert buffer lies in them" if pages else "experts may be computed up to a third slower"
    return Finding("memory", "huge pages", pages[1] if pages else "not in this kernel", reason)


def _pressure(root: Path) -> Finding:
    pressure = sysfs.text(root / "proc/pressure/memory")
    if not pressure:
        reason = "major page faults alone tell of want of memory"
        return Finding("memory", "pressure (PSI)", "not in this kernel", reason)
    average = re.search(r"some avg10=([0-9.]+)", pressure)
    if average is None:
        return Finding("memory", "pressure (PSI)", "watched", "the expert buffer shrinks when it rises")
    remedy = "close other programs" if float(average[1]) >= 5 else ""
    reason = "of the last 10 s waited for memory; the expert buffer shrinks when it rises"
    return Finding("memory", "pressure (PSI)", f"{average[1]} %", reason, remedy)


def _swap(root: Path) -> Iterator[Finding]:
    """What there is of both kinds. A budget counts on neither."""
    in_ram, on_flash = [0, 0], [0, 0]  # bytes there are, bytes in use
    for line in sysfs.text(root / "proc/swaps").splitlines()[1:]:
        name, _, *sizes = line.split()
        if len(sizes) >= 2 and sizes[0].isdigit() and sizes[1].isdigit():
            kind = in_ram if "/zram" in name else on_flash
            kind[0], kind[1] = kind[0] + 1024 * int(sizes[0]), kind[1] + 1024 * int(sizes[1])
    if not in_ram[0] and not on_flash[0]:
        yield Finding("memory", "swap", "none", "a budget that is too large is refused or ends, it does not slow down")
    if on_flash[0]:
        reason = f"{gib(on_flash[1])} used; the budget does not count on it, for what lies there is read back slowly"
        yield Finding("memory", "swap", gib(on_flash[0]), reason, _less(on_flash[1]))
    if in_ram[0]:
        reason = f"{gib(in_ram[1])} used: what is swapped there stays in RAM, compressed, in place of experts"
        remedy = _less(in_ram[1])
        if remedy and (root / "etc/nv_tegra_release").exists():
            remedy += "; or have none of it: sudo systemctl disable nvzramconfig, and restart"
        yield Finding("memory", "zram", gib(in_ram[0]), reason, remedy)


def _less(used: int) -> str:
    return "close other programs" if used >= _MUCH else ""


def gib(n_bytes: float) -> str:
    """As everywhere in doctor's findings."""
    return f"{n_bytes / 2**30:.2f} GiB"

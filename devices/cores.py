"""How many threads to run, on which CPUs, and why: physical cores, big ones, within affinity and cgroup quota.

Everything is read below a root folder, so that a test can hand in a machine of its own. Nothing here starts a thread.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

# Which cores may count as big. Below half the capacity of the largest they are the small in-order ones, whose
# arithmetic units are narrower than their capacity says. A clock alone shows less of the difference than there is
# (small cores reach three quarters of it), and the cores of one kind differ by up to a sixth.
_LEAST_CAPACITY = 0.5
_LEAST_CLOCK = 0.8


@dataclass(frozen=True)
class Cores:
    """The default for threads."""

    n_threads: int
    reason: str  # of each choice, for a person
    cpus: tuple[int, ...]  # numbers of the CPUs that the threads are meant for, ascending
    pinned: bool  # whether they are kept there, because the machine has others that are slower


def default_threads() -> int:
    """Physical cores that this process may use: big ones, as many as a cgroup's quota allows."""
    return choose_threads().n_threads


def choose_threads(root: Path = Path("/")) -> Cores:
    """How many threads, on which CPUs, and why; `root` holds sys/ and proc/."""
    allowed = _allowed()
    cpus, reasons = _big(root, allowed)
    n_cores = _count_cores(root, cpus)
    reasons.append(_plural(n_cores, "physical core"))
    if n_cores < len(cpus):
        reasons[-1] += f" with {len(cpus)} hardware threads"
    quota = _quota(root)
    if quota is not None:
        reasons.append(f"the cgroup allows the time of {quota:.3g} CPUs")
        n_cores = min(n_cores, max(1, int(quota)))
    return Cores(n_cores, "; ".join(reasons), tuple(cpus), len(cpus) < len(allowed))


def _allowed() -> list[int]:
    """CPUs that the affinity leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _big(root: Path, allowed: list[int]) -> tuple[list[int], list[str]]:
    """The big ones among the CPUs, and the reason.

    A matrix is split evenly, so the slowest thread decides: of the cores that are not small, take those for which
    their number times the capacity of the slowest is largest (one prime core does not beat four of two thirds).
    """
    reasons = [f"{_plural(len(allowed), 'CPU')} usable"]
    everywhere = _count_online(root)
    if everywhere > len(allowed):
        reasons[0] += f" of {everywhere} by affinity"
    for file, least, what in (
        ("cpu_capacity", _LEAST_CAPACITY, "capacity"),
        ("cpufreq/cpuinfo_max_freq", _LEAST_CLOCK, "clock in kHz"),
    ):
        speeds = {cpu: _number(_folder(root, cpu) / file) for cpu in allowed}
        known = {cpu: speed for cpu, speed in speeds.items() if speed}
        if len(known) < len(allowed):
            continue
        steps = sorted({speed for speed in known.values() if speed >= least * max(known.values())})
        slowest = max(steps, key=lambda step: (step * sum(speed >= step for speed in known.values()), step))
        big = [cpu for cpu in allowed if known[cpu] >= slowest]
        if len(big) < len(allowed):
            others = max(speed for speed in known.values() if speed < slowest)
            reasons.append(f"{len(big)} big ({what} from {slowest} on; the others reach {others})")
        return big, reasons
    return allowed, reasons


def _folder(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _count_online(root: Path) -> int:
    return len(_parse_list(_text(root / "sys/devices/system/cpu/online")))


def _count_cores(root: Path, cpus: list[int]) -> int:
    """Physical cores among the CPUs: hardware threads of one core count once."""
    cores = set()
    for cpu in cpus:
        topology = _folder(root, cpu) / "topology"
        siblings = _text(topology / "core_cpus_list") or _text(topology / "thread_siblings_list")
        if not siblings:
            return max(1, min(len(cpus), psutil.cpu_count(logical=False) or len(cpus)))
        cores.add(frozenset(_parse_list(siblings)))
    return len(cores)


def _quota(root: Path) -> float | None:
    """CPUs' worth of time that the cgroup of this process and those above it allow: the smallest; None without one.

    In a container the path in /proc may be the host's, while the mounted tree starts at the container's own group:
    folders that do not exist are passed over, and the mount's top is always looked at.
    """
    mount = root / "sys/fs/cgroup"
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            tops = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mount / controllers, mount / "cpu"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for top in tops:
            quotas += [_quota_of(top.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """What one cgroup allows: version 2 keeps 'quota period' in one file ('max' for no quota), version 1 in two."""
    words = _text(group / "cpu.max").split() or [
        _text(group / "cpu.cfs_quota_us").strip(),
        _text(group / "cpu.cfs_period_us").strip(),
    ]
    if len(words) == 2 and all(re.fullmatch("[0-9]+", word) and int(word) for word in words):
        return int(words[0]) / int(words[1])
    return None


def _text(path: Path) -> str:
    """What a file of the system says; nothing if it is not there or not to be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if re.fullmatch("[0-9]+", text) else 0


def _parse_list(text: str) -> list[int]:
    """'0-3,8' as the numbers it stands for; nothing for what is no such list."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch("([0-9]+)(?:-([0-9]+))?", part)
        if match:
            numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers

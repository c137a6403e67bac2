"""Watches whether the machine begins to page, and shrinks the expert buffer before it does; lets it grow again later.

A buffer that makes the machine page is slower than a smaller one, however many hits it has. The model's own thread
looks between tokens: no thread of the guard's, nothing to lock. `GuardPolicy` decides from readings alone; `Guard`
takes them and asks the residency.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgert import cgroup, file_pages
from edgert.memory import Budget, MemoryPlan, head_room

_MIB = 1 << 20
_NO_LIMIT = 1 << 60
LOOK_S = 0.1  # between two readings, which take 60 microseconds
_RELEASE_S = 5.0  # between two releases of file pages, which take 20 ms


class Resizable(Protocol):
    """An expert buffer whose size may be asked for; it follows at its next safe point."""

    @property
    def slot_bytes(self) -> int:
        """Bytes that it holds now."""

    def request_bytes(self, n_bytes: int) -> None:
        """Ask for another size."""


@dataclass(frozen=True)
class Reading:
    """What the system says at one moment; faults and stalls are counted from some moment on."""

    seconds: float
    major_faults: int = 0  # pages that this process had to wait for
    stalled_s: float = 0.0  # in which some task waited for memory: of the cgroup, or of the machine
    available: int = _NO_LIMIT  # bytes of the machine
    left: int = _NO_LIMIT  # bytes below the tightest limit of a cgroup, page cache counted as taken


@dataclass(frozen=True)
class Change:
    """Another size for the expert buffer, and why."""

    n_bytes: int
    reason: str


class GuardPolicy:
    """When to shrink, when to grow, by how much.

    Paging shows as major faults or as time stalled for memory, over two windows on end (one, if it is bad): a library
    that is read once is no paging. Each step takes an eighth, or what is missing, then waits for its effect. Growth
    needs a quiet time, which doubles each time that growth was followed by paging, so that the size does not swing.
    """

    WINDOW_S = 0.5
    FREED_S, SETTLE_S = 0.2, 1.0  # until a step shows in what is free, and in how much is paged
    FAULTS_PER_S, STALLED_SHARE, BAD = 100.0, 0.10, 5.0  # beyond BAD times these, one window is enough
    NEAR = 3  # times the reserve that is available: little
    STEP = 8  # a shrink or a growth is planned / STEP
    SPARE = 32 * _MIB  # left below a cgroup's limit after a growth
    TIGHT = 4 * _MIB  # less than that is left: shrink
    QUIET_S, LONGEST_QUIET_S = 5.0, 300.0
    RELAPSE_S = 60.0  # paging so soon after a growth comes of it

    def __init__(self, planned: int, least: int, reserve: int) -> None:
        """planned, least: sizes of the buffer in bytes; reserve: bytes that the machine is to have available."""
        self.planned, self.least, self.reserve = planned, least, reserve
        self._since: Reading | None = None  # the window began
        self._strained_windows = 0
        self._strained_at = self._grown_at = float("-inf")
        self._quiet_s = self.QUIET_S

    def between_tokens(self, reading: Reading, size: int) -> Change | None:
        """What to do at this moment, the buffer holding `size` bytes: shrink, or nothing."""
        since = reading.seconds - self._strained_at
        short, reason = self._shortage(reading) if since >= self.FREED_S else (0, "")
        if not short and since >= self.SETTLE_S:
            short, reason = self._paging(reading, size)
        if not short:
            return None
        if reading.seconds < self._grown_at + self.RELAPSE_S:
            self._quiet_s, self._grown_at = min(2 * self._quiet_s, self.LONGEST_QUIET_S), float("-inf")
        self._strained_at, self._since, self._strained_windows = reading.seconds, None, 0
        smaller = max(size - short, self.least)
        return Change(smaller, reason) if smaller < size else None

    def between_requests(self, reading: Reading, size: int) -> Change | None:
        """The same where nobody waits: the buffer may grow too."""
        change = self.between_tokens(reading, size)
        calm = reading.seconds >= self._strained_at + self._quiet_s and not self._strained_windows
        missing = self.planned - size
        if change is not None or not calm or missing <= 0:
            return change
        room = min(reading.available - 2 * self.reserve, reading.left - self.SPARE)
        step = min(missing, max(self.planned // self.STEP, _MIB), room)
        if step < min(_MIB, missing):
            return None
        self._grown_at = reading.seconds
        return Change(size + step, f"memory is free again, {_mib(min(reading.available, reading.left))} MiB")

    def _shortage(self, reading: Reading) -> tuple[int, str]:
        """Bytes to give back because too few are left, and why; (0, "") if there are enough."""
        if reading.available < self.reserve:
            reason = f"only {_mib(reading.available)} MiB are available on this machine"
            return 2 * self.reserve - reading.available, reason
        if reading.left < self.TIGHT:
            return self.SPARE - reading.left, f"only {_mib(reading.left)} MiB are left below the cgroup's limit"
        return 0, ""

    def _paging(self, reading: Reading, size: int) -> tuple[int, str]:
        """The same because this process, or those around it, wait for pages."""
        if self._since is None:
            self._since = reading
        seconds = reading.seconds - self._since.seconds
        if seconds < self.WINDOW_S:
            return 0, ""
        faults = (reading.major_faults - self._since.major_faults) / seconds
        stalled = (reading.stalled_s - self._since.stalled_s) / seconds
        # Stalls of the machine may be a neighbour's at a limit of its own: they count where this process faults too, or
        # little is left.
        ours = 10 * faults > self.FAULTS_PER_S or reading.available < self.NEAR * self.reserve
        strain = max(faults / self.FAULTS_PER_S, stalled / self.STALLED_SHARE if ours else 0.0)
        self._since = reading
        self._strained_windows = self._strained_windows + 1 if strain > 1 else 0
        if self._strained_windows < (1 if strain > self.BAD else 2):
            return 0, ""
        reason = f"the machine pages: {faults:,.0f} major faults a second, {stalled:.0%} of the time stalled for memory"
        return max(size // self.STEP, _MIB), reason


class Sensors:
    """Takes readings; what the system does not offer stays at what is harmless."""

    def __init__(self, proc: Path = cgroup.PROC, root: Path = cgroup.ROOT) -> None:
        groups = cgroup.limited(proc, root)
        self._limits = [(group.limit or 0, _open(group.usage_file)) for group in groups]
        pressures = [group.folder / "memory.pressure" for group in groups if group.version == 2]
        opened = (_open(path) for path in (*pressures, proc / "pressure" / "memory"))
        self._pressure = next((found for found in opened if found is not None), None)
        self._meminfo = _open(proc / "meminfo")

    def read(self) -> Reading:
        """One reading."""
        left = [limit - int(text) for limit, file in self._limits if (text := _read(file))]
        pressure, meminfo = _read(self._pressure), _read(self._meminfo)
        stalled = float(pressure.partition("total=")[2].split()[0]) / 1e6 if "total=" in pressure else 0.0
        free = int(meminfo.partition("MemAvailable:")[2].split()[0]) << 10 if "MemAvailable:" in meminfo else _NO_LIMIT
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        return Reading(time.monotonic(), faults, stalled, free, min(left, default=_NO_LIMIT))

    def close(self) -> None:
        """Close the files; what is read then is harmless."""
        for file in (*(file for _, file in self._limits), self._pressure, self._meminfo):
            if file is not None:
                os.close(file)
        self._limits, self._pressure, self._meminfo = [], None, None


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.0f}"


def _open(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _read(file: int | None) -> str:
    if file is None:
        return ""
    with contextlib.suppress(OSError):  # such as a kernel whose pressure was switched off
        return os.pread(file, 4096, 0).decode()
    return ""


class Guard:
    """Looks between tokens, and between requests; asks `residency` for another size where the policy says so."""

    def __init__(self, residency: Resizable, policy: GuardPolicy, sensors: Sensors, *, strict: bool) -> None:
        """strict: page cache counts, so that it is given back before experts are."""
        self._residency, self._policy, self._sensors, self._strict = residency, policy, sensors, strict
        self._next_look = self._next_release = 0.0
        self._asked = residency.slot_bytes
        self.changes: deque[Change] = deque(maxlen=100)  # the last ones, for whoever shows them

    def look(self) -> None:
        """Between two tokens. Costs a look at the clock, ten times a second 60 microseconds."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._ask(self._policy.between_tokens(self._read(2 * self._policy.TIGHT), self._asked))

    def between_requests(self) -> None:
        """Between two answers, when nobody waits."""
        self._ask(self._policy.between_requests(self._read(self._policy.SPARE + _MIB), self._asked))

    def close(self) -> None:
        """Take no readings any more."""
        self._next_look = float("inf")
        self._sensors.close()

    def _read(self, spare: int) -> Reading:
        """A reading; where less than `spare` is left below a limit, another one once the page cache is given back."""
        reading = self._sensors.read()
        if self._strict and reading.left < spare and reading.seconds >= self._next_release:
            file_pages.release(dropping=True)
            self._next_release = reading.seconds + _RELEASE_S
            reading = self._sensors.read()
        return reading

    def _ask(self, change: Change | None) -> None:
        if change is not None:
            self._asked = change.n_bytes
            self.changes.append(change)
            self._residency.request_bytes(change.n_bytes)


def guard_for(residency: Resizable, plan: MemoryPlan, budget: Budget) -> Guard:
    """The guard of a model whose experts are streamed.

    What the machine is to keep is half of a head-room; where a stated budget leaves less than that, half of the rest.
    """
    reserve = max(min(head_room() // 2, (budget.free - plan.total) // 2), 64 * _MIB)
    policy = GuardPolicy(plan.slots, plan.least_slots, reserve)
    return Guard(residency, policy, Sensors(), strict=budget.strict)

"""The guard: when it shrinks the expert buffer and when it lets it grow, on made-up readings and on real ones."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgert import guard
from edgert.guard import Change, GuardPolicy, Reading, Sensors, guard_for
from edgert.memory import Budget, MemoryPlan

MIB = 1 << 20
PLANNED, LEAST, RESERVE = 800 * MIB, 40 * MIB, 200 * MIB


class Machine:
    """A made-up machine and the buffer on it; time goes on by steps of 100 ms."""

    def __init__(self) -> None:
        self.policy = GuardPolicy(PLANNED, LEAST, RESERVE)
        self.now = Reading(1000.0, available=4 << 30)
        self.size = PLANNED
        self.changes: list[Change] = []

    def run(self, seconds: float, *, faults: float = 0, stalled: float = 0, requests: bool = False) -> list[Change]:
        """So many major faults a second, and that share of the time stalled; the changes that came of it."""
        before = len(self.changes)
        for _ in range(round(10 * seconds)):
            now = self.now
            self.now = replace(
                now,
                seconds=now.seconds + 0.1,
                major_faults=now.major_faults + round(faults / 10),
                stalled_s=now.stalled_s + stalled / 10,
            )
            look = self.policy.between_requests if requests else self.policy.between_tokens
            change = look(self.now, self.size)
            if change is not None:
                self.size = change.n_bytes
                self.changes.append(change)
        return self.changes[before:]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_quiet_machine_is_left_alone(machine: Machine) -> None:
    assert not machine.run(60, faults=50, stalled=0.05)


def test_paging_shrinks_the_buffer_step_by_step_down_to_its_least(machine: Machine) -> None:
    (first,) = machine.run(1.5, faults=200)
    assert first.n_bytes == 700 * MIB and "200 major faults a second" in first.reason
    assert not machine.run(0.8, faults=200), "a step takes a moment to show"
    machine.run(120, faults=200)
    assert machine.size == LEAST
    assert not machine.run(10, faults=200), "nothing is left to give"


def test_stalls_count_as_paging(machine: Machine) -> None:
    (change,) = machine.run(1.5, stalled=0.2, faults=20)
    assert "20% of the time" in change.reason
    machine.run(60)
    machine.now = replace(machine.now, available=2 * RESERVE)
    assert machine.run(1.5, stalled=0.2)


def test_stalls_of_a_neighbour_at_its_own_limit_do_not(machine: Machine) -> None:
    assert not machine.run(60, stalled=0.9)


def test_one_burst_is_no_paging_unless_it_is_bad(machine: Machine) -> None:
    machine.run(1)
    assert not machine.run(0.5, faults=400) and not machine.run(10)
    assert len(machine.run(0.6, faults=1000)) == 1


def test_want_of_memory_is_made_good_at_once(machine: Machine) -> None:
    machine.run(1)
    machine.now = replace(machine.now, available=150 * MIB)
    (change,) = machine.run(0.1)
    assert change.n_bytes == PLANNED - 250 * MIB and "150 MiB are available" in change.reason
    machine.now = replace(machine.now, available=400 * MIB)
    assert not machine.run(30)


def test_a_cgroup_that_is_nearly_full_is_relieved(machine: Machine) -> None:
    machine.now = replace(machine.now, left=2 * MIB)
    (change,) = machine.run(0.1)
    assert change.n_bytes == PLANNED - 30 * MIB and "2 MiB are left" in change.reason
    machine.now = replace(machine.now, left=20 * MIB)
    assert not machine.run(60, requests=True), "too little to grow by"


def test_it_grows_again_between_requests_once_it_is_quiet(machine: Machine) -> None:
    machine.run(1.2, faults=200)
    assert machine.size == 700 * MIB
    assert not machine.run(30), "never during an answer"
    machine.run(1.6, faults=200)
    assert machine.size == 700 * MIB - 700 * MIB // 8
    assert not machine.run(4, requests=True), "not yet"
    grown = machine.run(3, requests=True)
    assert machine.size == PLANNED and [change.n_bytes for change in grown][-1] == PLANNED
    assert not machine.run(10, requests=True), "never above what was planned"


def test_it_grows_only_into_what_is_free(machine: Machine) -> None:
    machine.run(1.2, faults=200)
    machine.now = replace(machine.now, available=2 * RESERVE + 10 * MIB)
    (change, *_) = machine.run(6, requests=True)
    assert change.n_bytes == 710 * MIB
    machine.now = replace(machine.now, available=2 * RESERVE)
    size = machine.size
    assert not machine.run(6, requests=True) and machine.size == size


def test_growth_that_brings_paging_back_waits_longer_each_time(machine: Machine) -> None:
    waits = []
    machine.run(1.2, faults=200)
    for _ in range(4):
        start = machine.now.seconds
        while not machine.run(0.1, requests=True):
            assert machine.now.seconds < start + 400
        waits.append(machine.now.seconds - start)
        machine.run(1.2, faults=200)
    assert waits == pytest.approx([5, 10, 20, 40], abs=1.5)


# ---- readings --------------------------------------------------------------------------------------------------------
def test_sensors_read_what_the_system_has(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc / "self", proc / "pressure", root / "app"):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  9 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n")
    (proc / "pressure" / "memory").write_text("some avg10=0.00 total=2500000\nfull avg10=0.00 total=1\n")
    sensors = Sensors(proc, root)
    found = sensors.read()
    assert (found.available, found.stalled_s, found.left) == (2 * MIB, 2.5, guard._NO_LIMIT)
    assert found.major_faults >= 0
    sensors.close()
    (proc / "self" / "cgroup").write_text("0::/app\n")
    for name, text in {"max": "9000", "current": "7000", "pressure": "some total=1000000\n"}.items():
        (root / "app" / f"memory.{name}").write_text(text)
    sensors = Sensors(proc, root)
    assert (sensors.read().left, sensors.read().stalled_s) == (2000, 1.0), "the cgroup's own pressure comes first"
    (root / "app" / "memory.current").write_text("8000")
    assert sensors.read().left == 1000
    sensors.close()
    assert sensors.read().available == guard._NO_LIMIT, "closed"


def test_a_system_that_offers_nothing_is_quiet(tmp_path: Path) -> None:
    reading = Sensors(tmp_path, tmp_path).read()
    assert (reading.stalled_s, reading.available, reading.left) == (0.0, guard._NO_LIMIT, guard._NO_LIMIT)


class Buffer:
    """A residency as far as the guard knows it."""

    slot_bytes = PLANNED

    def __init__(self) -> None:
        self.asked: list[int] = []

    def request_bytes(self, n_bytes: int) -> None:
        self.asked.append(n_bytes)


def a_plan(**sizes: int) -> MemoryPlan:
    """A plan of a model whose experts are streamed."""
    parts = {"process": 100 * MIB, "hot": 100 * MIB, "cold": 0, "kv": 0, "work": 0, "loading": 0, "context": 512}
    return MemoryPlan(**(parts | {"slots": PLANNED, "least_slots": LEAST} | sizes), kv_type="f16")


def test_the_guard_of_a_real_process_looks_often_and_reads_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Buffer()
    plan = a_plan()
    watching = guard_for(buffer, plan, Budget(plan.total, plan.total, plan.total + 4096 * MIB, strict=True))
    readings, read = [], Sensors.read
    monkeypatch.setattr(Sensors, "read", lambda sensors: readings.append(read(sensors)) or readings[-1])
    for _ in range(1000):
        watching.look()
    assert 1 <= len(readings) <= 20
    watching.between_requests()
    assert not buffer.asked or readings[-1].available < 512 * MIB or readings[-1].left < 64 * MIB
    watching.close()
    watching.look()


def test_the_guard_asks_for_what_the_policy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, plan = Buffer(), a_plan()
    watching = guard_for(buffer, plan, Budget(plan.total, None, plan.total + 4096 * MIB))
    monkeypatch.setattr(Sensors, "read", lambda sensors: Reading(5000.0, available=1))
    watching.look()
    (asked,) = buffer.asked
    assert LEAST <= asked < PLANNED and [change.n_bytes for change in watching.changes] == [asked]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc as Linux has it")
def test_sensors_read_this_machine() -> None:
    opened = len(os.listdir("/proc/self/fd"))
    sensors = Sensors()
    reading = sensors.read()
    assert 0 < reading.available < 1 << 50 and reading.left > 0 and reading.stalled_s >= 0
    sensors.close()
    assert len(os.listdir("/proc/self/fd")) == opened

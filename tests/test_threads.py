"""The thread pool: every thread runs every job once and in order, whatever the host, a fork or an exit does to it."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.devices import threads
from edgert.devices.cores import Cores
from edgert.devices.threads import ThreadPool, meet
from edgert.errors import OptionError
from edgert.quant.jit import kernel
from edgert.quant.records import address_of, at, record

LOG = record("counts totals room rounds entries mark")
CELL = record("value")


@kernel
def write(thread: int, n_threads: int, barrier: int, log: int) -> None:
    """Each thread adds the job's mark to its own list of entries."""
    count = at(log, LOG).counts + 8 * thread
    place = at(count, CELL).value
    at(at(log, LOG).entries + 8 * (thread * at(log, LOG).room + place), CELL).value = at(log, LOG).mark
    at(count, CELL).value = place + 1


@kernel
def gather(thread: int, n_threads: int, barrier: int, log: int) -> None:
    """Each thread adds to its own count; after a barrier each sees all counts of this round."""
    counts, totals, rounds = at(log, LOG).counts, at(log, LOG).totals, at(log, LOG).rounds
    for round_ in range(rounds):
        at(counts + 8 * thread, CELL).value += 1
        meet(barrier, n_threads)
        total = 0
        for other in range(n_threads):
            total += at(counts + 8 * other, CELL).value
        at(totals + 8 * (thread * rounds + round_), CELL).value = total
        meet(barrier, n_threads)


@kernel
def linger(thread: int, n_threads: int, barrier: int, cell: int) -> None:
    """Say that it has begun, and stay until the test counts on: long enough for all threads to sleep."""
    if thread == 0:
        at(cell, CELL).value = 1
        while threads._load(cell) == 1:
            threads._nap(1000_000)
    meet(barrier, n_threads)


JOBS = {name: address_of(job, 4) for name, job in (("write", write), ("gather", gather), ("linger", linger))}


class Log:
    """What the jobs above write, and the record that tells them where."""

    def __init__(self, n_threads: int, room: int = 64, rounds: int = 100) -> None:
        self.counts = np.zeros(n_threads, np.int64)
        self.totals = np.zeros((n_threads, rounds), np.int64)
        self.entries = np.zeros((n_threads, room), np.int64)
        places = [array.ctypes.data for array in (self.counts, self.totals, self.entries)]
        self.record = np.array([(places[0], places[1], room, rounds, places[2], 0)], LOG)
        self.address = self.record.ctypes.data

    def written(self) -> list[list[int]]:
        """The marks of each thread, in order."""
        return [list(entries[:count]) for entries, count in zip(self.entries, self.counts, strict=True)]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come, and give up after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def state(thread: threading.Thread) -> str:
    """What Linux says that a thread does: R runs, S sleeps."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]


def all_asleep(pool: ThreadPool) -> bool:
    return all(state(thread) == "S" for thread in pool._threads)


def check(pool: ThreadPool) -> None:
    """A pool that works."""
    log = Log(pool.n_threads)
    pool.run(JOBS["gather"], log.address)
    assert (log.totals == pool.n_threads * np.arange(1, 101)).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_barriers_keep_threads_together(n_threads: int) -> None:
    pool = ThreadPool(n_threads)
    for _ in range(3):
        check(pool)
    pool.close()


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20), st.sampled_from([0.0, 0.0, 0.003])), max_size=12),
)
def test_each_thread_runs_each_job_once_and_in_order(sizes: list[int], steps: list[tuple[int, int, float]]) -> None:
    """Bursts of jobs for several pools, between them pauses that let the workers fall asleep."""
    pools = [ThreadPool(size) for size in sizes]
    logs = [Log(size, room=300, rounds=2) for size in sizes]
    expected: list[list[int]] = [[] for _ in sizes]
    for mark, (which, n_jobs, pause) in enumerate(steps):
        which %= len(pools)
        time.sleep(pause)
        for number in range(n_jobs):
            logs[which].record["mark"] = mark * 100 + number
            pools[which].run(JOBS["write"], logs[which].address)
            expected[which].append(mark * 100 + number)
    for pool, log, marks in zip(pools, logs, expected, strict=True):
        assert log.written() == [marks] * pool.n_threads
        pool.close()


def test_many_jobs_one_right_after_another() -> None:
    pool, log = ThreadPool(3), Log(3, room=5000)
    for mark in range(5000):
        log.record["mark"] = mark
        pool.run(JOBS["write"], log.address)
    assert log.written() == [list(range(5000))] * 3
    pool.close()


def test_sleeping_threads_wake_for_a_job_and_inside_it() -> None:
    pool = ThreadPool(3)
    cell = np.zeros(1, np.int64)
    for _ in range(3):
        until(lambda: all_asleep(pool))
        cell[0] = 0
        caller = threading.Thread(target=pool.run, args=(JOBS["linger"], cell.ctypes.data))
        caller.start()
        until(lambda: cell[0] == 1 and all_asleep(pool))
        cell[0] = 2
        caller.join()
        check(pool)
    pool.close()


def test_callers_take_turns() -> None:
    pool = ThreadPool(2)
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(50):
                check(pool)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=use) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    pool.close()


def test_two_threads_with_a_pool_each_beside_busy_python() -> None:
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    busy.start()
    logs = [Log(2, room=200), Log(2, room=200)]

    def use(log: Log) -> None:
        pool = ThreadPool(2)
        for mark in range(200):
            log.record["mark"] = mark
            pool.run(JOBS["write"], log.address)
        pool.close()

    users = [threading.Thread(target=use, args=(log,)) for log in logs]
    for user in users:
        user.start()
    for user in users:
        user.join()
    stop.set()
    busy.join()
    assert [log.written() for log in logs] == [[list(range(200))] * 2] * 2


def test_closing_ends_the_threads_asleep_or_awake() -> None:
    before = threading.active_count()
    for rest in (False, True):
        pool = ThreadPool(4)
        assert threading.active_count() == before + 3
        check(pool)
        if rest:
            until(lambda pool=pool: all_asleep(pool))  # type: ignore[misc]
        pool.close()
        assert threading.active_count() == before
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            check(pool)


def test_closing_waits_for_the_job() -> None:
    pool, cell = ThreadPool(2), np.zeros(1, np.int64)
    caller = threading.Thread(target=pool.run, args=(JOBS["linger"], cell.ctypes.data))
    caller.start()
    until(lambda: cell[0] == 1)
    closer = threading.Thread(target=pool.close)
    closer.start()
    time.sleep(0.01)
    assert closer.is_alive() and caller.is_alive() and len(pool._threads) == 1
    cell[0] = 2
    closer.join()
    caller.join()
    assert not pool._threads


def test_a_pool_that_nobody_holds_ends_its_threads() -> None:
    pool = ThreadPool(3)
    workers = list(pool._threads)
    del pool
    gc.collect()
    until(lambda: not any(worker.is_alive() for worker in workers))


@pytest.mark.parametrize("n_threads", [0, -1, 1025])
def test_a_number_of_threads_that_makes_no_sense_is_refused(n_threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads={n_threads} must lie between 1 and 1024"):
        ThreadPool(n_threads)


def test_threads_that_the_system_refuses_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "edgert-3":
            raise RuntimeError("can't start new thread")
        start(self)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OptionError, match="threads=5: the system refused number 4"):
        ThreadPool(5)
    until(lambda: threading.active_count() == before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin threads")
def test_workers_are_pinned_where_some_cores_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.sched_getaffinity(0)
    first = min(mine)
    if len(mine) == 1:
        pytest.skip("one processor leaves nothing to choose")
    monkeypatch.setattr(threads, "choose_threads", lambda: Cores(1, "one is big", (first,), True))
    pool = ThreadPool(2)  # two threads do not fit on it
    check(pool)
    assert os.sched_getaffinity(pool._threads[0].native_id or 0) == mine
    pool.close()
    monkeypatch.setattr(threads, "choose_threads", lambda: Cores(2, "two are big", (first, first), True))
    pool = ThreadPool(None)
    check(pool)
    assert os.sched_getaffinity(pool._threads[0].native_id or 0) == {first} and os.sched_getaffinity(0) == mine
    pool.close()

"""The thread pool: interrupts, exceptions and restarts never leave a thread behind or an answer wrong."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from models import engine_of, golden_path, run

from edgert.devices import threads
from edgert.devices.threads import ThreadPool, default_threads, meet
from edgert.errors import OptionError
from edgert.quant.jit import kernel


@kernel
def count(thread: Any, n_threads: Any, barrier: Any, counts: Any, totals: Any) -> None:
    """Each thread adds to its own count; after a barrier each sees all counts of this round."""
    for round_ in range(100):
        counts[thread, 0] += 1
        meet(barrier, n_threads)
        total = 0
        for other in range(n_threads):
            total += counts[other, 0]
        totals[thread, round_] = total
        meet(barrier, n_threads)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_barriers_keep_threads_together(n_threads: int) -> None:
    pool = ThreadPool(n_threads)
    counts, totals = np.zeros((n_threads, 16), np.int64), np.zeros((n_threads, 100), np.int64)
    for _ in range(3):
        counts[:] = 0
        pool.run(count, counts, totals)
        assert (totals == n_threads * np.arange(1, 101)).all()
    pool.close()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    pool = ThreadPool(4)
    assert threading.active_count() == before + 3
    pool.close()
    assert threading.active_count() == before


class Interrupted:
    """A queue through which a Ctrl-C comes instead of a job."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def put(self, job: Any) -> None:
        """Interrupt, but let the order to end through."""
        if job is not None:
            raise KeyboardInterrupt
        self.real.put(job)


@pytest.mark.parametrize("which", [0, 1])
def test_an_interrupt_leaves_no_wrong_answers(which: int) -> None:
    engine, session = engine_of(golden_path("llama-q4_0"), activations="int8", threads=3)
    tokens = list(range(3, 40))
    expected = run(engine, session, tokens)
    before = threading.active_count()
    for _ in range(3):
        pool = engine.device.pool  # type: ignore[attr-defined]   # the CPU device has one
        pool._queues[which] = Interrupted(pool._queues[which])
        session.tokens.clear()
        with pytest.raises(KeyboardInterrupt):
            run(engine, session, tokens)
        session.tokens.clear()
        assert (run(engine, session, tokens) == expected).all()
    assert threading.active_count() == before
    engine.device.close()


def test_a_kernel_that_does_not_compile_raises_and_harms_nothing() -> None:
    @kernel
    def broken(thread: Any, n_threads: Any, barrier: Any, value: Any) -> None:
        value.nothing_of_this_name()

    pool = ThreadPool(2)
    with pytest.raises(Exception, match="nothing_of_this_name"):
        pool.run(broken, np.zeros(1))
    counts, totals = np.zeros((2, 16), np.int64), np.zeros((2, 100), np.int64)
    pool.run(count, counts, totals)
    assert totals[1, -1] == 200
    pool.close()


def test_waiting_threads_use_no_processor() -> None:
    pool = ThreadPool(2)
    pool.run(count, np.zeros((2, 16), np.int64), np.zeros((2, 100), np.int64))
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.25
    pool.close()


def test_the_default_respects_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads() >= 1
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 6, 7})
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: 100)
    assert default_threads() == 4
    monkeypatch.setattr(threads, "_cgroup_cpus", lambda: 2)
    assert default_threads() == 2
    for wrong in (0, -1, 5000):
        with pytest.raises(OptionError, match=f"threads={wrong}"):
            ThreadPool(wrong)

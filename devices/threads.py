"""Threads that run one kernel together: each calls it with its own number, and they meet at barriers inside it.

A pool belongs to one model; nothing is shared with numba's threading layers or a host application's OpenMP. Work is
split statically by thread number, so results do not depend on timing, nor (kernels see to it) on the number of threads.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import psutil
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from edgert.errors import OptionError
from edgert.quant.jit import kernel

_SPINS = 4000  # about 40 microseconds of waiting before the processor is offered to others
_I64 = ir.IntType(64)


@intrinsic
def _add_atomic(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to an int64 and return what was there before."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], ordering="seq_cst")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    """Let another thread of the machine run."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        function = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@kernel
def meet(barrier: int, n_threads: int) -> None:
    """Wait until all threads are here. `barrier` is the address of int64 (2,): arrived, generation (64 bytes apart)."""
    if n_threads == 1:
        return
    generation = _add_atomic(barrier + 64, 0)
    if _add_atomic(barrier, 1) == n_threads - 1:
        _add_atomic(barrier, -n_threads)
        _add_atomic(barrier + 64, 1)
        return
    spins = 0
    while _add_atomic(barrier + 64, 0) == generation:
        spins += 1
        if spins > _SPINS:
            _yield_processor()


def default_threads() -> int:
    """Physical cores that this process may use, with a cgroup's CPU quota respected."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or usable
    return max(1, min(usable, physical, _cgroup_cpus()))


def _cgroup_cpus() -> int:
    """Whole CPUs that the cgroup's quota allows; a large number without a quota."""
    for path, split in (("/sys/fs/cgroup/cpu.max", True), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", False)):
        try:
            with open(path) as file:
                words = file.read().split()
            if split:
                quota, period = words
            else:
                quota = words[0]
                with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                    period = file.read().strip()
            if quota not in ("max", "-1"):
                return max(1, int(quota) // int(period))
        except (OSError, ValueError):
            continue
    return 1 << 16


class ThreadPool:
    """`n_threads` threads, the caller's among them."""

    def __init__(self, n_threads: int | None = None) -> None:
        self.n_threads = default_threads() if n_threads is None else n_threads
        if not 1 <= self.n_threads <= 1024:
            raise OptionError(f"threads={n_threads} must lie between 1 and 1024")
        self._barrier = np.zeros(16, np.int64)
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(self.n_threads - 1)]
        for number, queue in enumerate(self._queues, start=1):
            name = f"edgert-{number}"
            threading.Thread(target=_work, args=(number, self.n_threads, queue), name=name, daemon=True).start()

    def run(self, compiled: Any, *arguments: Any) -> None:
        """Call compiled(thread, n_threads, barrier, *arguments) on every thread.

        The kernel ends with a barrier, so all have finished when this returns.
        """
        barrier = self._barrier.ctypes.data
        if not compiled.overloads:  # compile here: a thread that failed to would leave the others waiting
            compiled.compile(tuple(numba.typeof(value) for value in (0, self.n_threads, barrier, *arguments)))
        for queue in self._queues:
            queue.put((compiled, barrier, arguments))
        compiled(0, self.n_threads, barrier, *arguments)

    def close(self) -> None:
        """End the threads."""
        for queue in self._queues:
            queue.put(None)
        self._queues = []
        self.n_threads = 1


def _work(number: int, n_threads: int, queue: SimpleQueue[Any]) -> None:
    while (job := queue.get()) is not None:
        compiled, barrier, arguments = job
        compiled(number, n_threads, barrier, *arguments)
        del job, compiled, arguments  # nothing of a finished job is kept alive while waiting

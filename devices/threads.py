"""Threads that run one kernel together: each calls it with its own number, and they meet at barriers inside it.

A pool belongs to one model; nothing is shared with numba's threading layers or a host application's OpenMP. Work is
split statically by thread number, so results do not depend on timing, nor (kernels see to it) on the number of threads.
"""

from __future__ import annotations

import os
import platform
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
def _load_atomic(typing_context: Any, address: Any) -> Any:
    """An int64 that another thread may be writing."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def _pause(typing_context: Any) -> Any:
    """Tell the processor that this thread spins."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        elif platform.machine() == "aarch64":
            function = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, function, "llvm.aarch64.hint")
            builder.call(hint, [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), generate


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
    """Wait until all threads are here, or the run is given up.

    barrier: address of three int64, 64 bytes apart: how many arrived, generation, whether the run was given up.
    """
    if n_threads == 1:
        return
    generation = _load_atomic(barrier + 64)
    if _add_atomic(barrier, 1) == n_threads - 1:
        _add_atomic(barrier, -n_threads)
        _add_atomic(barrier + 64, 1)
        return
    spins = 0
    while _load_atomic(barrier + 64) == generation and not _load_atomic(barrier + 128):
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
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
        self._start()

    def _start(self) -> None:
        self._barrier = np.zeros(24, np.int64)
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(self.n_threads - 1)]
        self._threads = [
            threading.Thread(target=_work, args=(number, self.n_threads, queue), name=f"edgert-{number}", daemon=True)
            for number, queue in enumerate(self._queues, start=1)
        ]
        for thread in self._threads:
            thread.start()
        self._running = False

    def ready(self) -> None:
        """Replace the threads if the last run did not end: until then they may still write to its buffers."""
        if self._running:
            self._stop()
            self._start()

    def run(self, compiled: Any, *arguments: Any) -> None:
        """Call compiled(thread, n_threads, barrier, *arguments) on every thread.

        The kernel ends with a barrier, so all have finished when this returns. An exception in the calling thread, such
        as KeyboardInterrupt, gives the run up: the threads stop waiting for each other and are replaced.
        """
        self.ready()
        barrier = self._barrier.ctypes.data
        if not compiled.overloads:  # compile here: a thread that failed to would leave the others waiting
            compiled.compile(tuple(numba.typeof(value) for value in (0, self.n_threads, barrier, *arguments)))
        self._running = True
        try:
            for queue in self._queues:
                queue.put((compiled, self._barrier, arguments))
            compiled(0, self.n_threads, barrier, *arguments)
        except BaseException:
            self.ready()
            raise
        self._running = False

    def _stop(self) -> None:
        self._barrier[16] = 1
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """End the threads."""
        self._stop()
        self._queues, self._threads = [], []
        self.n_threads = 1


def _work(number: int, n_threads: int, queue: SimpleQueue[Any]) -> None:
    while (job := queue.get()) is not None:
        compiled, barrier, arguments = job
        compiled(number, n_threads, barrier.ctypes.data, *arguments)
        del job, compiled, barrier, arguments  # nothing of a finished job is kept alive while waiting

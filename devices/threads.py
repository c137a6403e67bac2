"""Threads that run one compiled job together: each calls it with its own number, and they meet at barriers inside it.

The workers stay in compiled code from the pool's start to its end: they need neither the GIL nor Python objects, so a
busy Python thread of the host application does not hold them up. A pool shares nothing with numba's threading layers or
OpenMP. Work is split statically by thread number, so results do not depend on timing, nor (kernels see to it) on the
number of threads.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from edgert.devices.cores import choose_threads
from edgert.errors import OptionError
from edgert.quant.jit import JIT_ENABLED, kernel
from edgert.quant.records import address_of, at, call, record

_MICROSECOND = 1000  # all times are in nanoseconds

# Linux's futex: the number of the system call, and "sleep while a word holds a value" and "wake" within one process
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
_SLEEP, _WAKE = 128 | 0, 128 | 1
_EVERYONE = (1 << 31) - 1
_CLOCK = getattr(time, "CLOCK_MONOTONIC", 1)
_NAP = 50 * _MICROSECOND

# How long a wait spins before it also yields its processor, and before it sleeps.
# A worker without a job stays awake for 2 ms: sampling and the host's Python between two tokens take 0.3 to 1 ms, and
# a run with sleeping workers takes tens of microseconds more. Then the battery, the host and the threads that read
# flash come first. It yields soon, because the caller may have to share its processor with it.
_IDLE = (20 * _MICROSECOND, 2000 * _MICROSECOND)
# Inside a job threads wait while their shares differ; a longer wait means that one lost its processor. Then sleeping
# helps, for it makes room and is woken at once, while a thread that yields to a busy stranger is out for a whole slice
# (measured beside one busy process: 40 ms for a job of 20 barriers, 2 ms with sleep). 20 us is about what it costs.
# With more threads than processors the one that is waited for may need this very processor: sleep at once.
_INSIDE = (20 * _MICROSECOND, 20 * _MICROSECOND) if _FUTEX else (20 * _MICROSECOND, 1000 * _MICROSECOND)
_CROWDED = (0, 0) if _FUTEX else (0, 1000 * _MICROSECOND)

# Words that different threads write lie 128 bytes apart: processors fetch cache lines in pairs.
_LINE = 128
_JOB = 0  # a JOB record
_FINISHED = 2 * _LINE  # how many times a worker finished a job
_BUSY = 4 * _LINE  # 1 while a caller's job runs
_BARRIER = 5 * _LINE  # how many times a thread came to the barrier, WAITING of those who wait there on the next line
_BLOCK_BYTES = 7 * _LINE

JOB = record("generation function argument n_threads closed")
WAITING = record("sleepers yield_after sleep_after")  # on the line after the word that is waited for

_I32, _I64 = ir.IntType(32), ir.IntType(64)


# ---- single instructions, and functions of the C library -------------------------------------------------------------
def _call_c(builder: ir.IRBuilder, name: str, result: ir.Type, *values: Any, variadic: bool = False) -> Any:
    kinds = [value.type for value in values]
    function = ir.FunctionType(result, kinds[:1], var_arg=True) if variadic else ir.FunctionType(result, kinds)
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)


def _time(builder: ir.IRBuilder) -> Any:
    """Room for a struct timespec: seconds and nanoseconds."""
    return cgutils.alloca_once(builder, ir.LiteralStructType([_I64, _I64]), zfill=True)


@intrinsic
def _load(typing_context: Any, address: Any) -> Any:
    """An int64 that another thread may be writing; what that thread wrote before is then seen too.

    seq_cst, not acquire: `_wake` reads the sleepers after its caller changed the word, and neither may pass the other.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to an int64 and return what was there before."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], ordering="seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _swap(typing_context: Any, address: Any, value: Any) -> Any:
    """Set an int64 and return what was there before."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("xchg", pointer, values[1], ordering="seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _pause(typing_context: Any) -> Any:
    """Tell the processor that this thread spins."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call_c(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif platform.machine() in ("aarch64", "arm64"):  # its `yield` does nothing on most cores; `isb` takes a while
            _call_c(builder, "llvm.aarch64.isb", ir.VoidType(), _I32(15))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield_processor(typing_context: Any) -> Any:
    """Let another thread of the machine run."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        _call_c(builder, "sched_yield", _I32)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _futex(typing_context: Any, word: Any, operation: Any, value: Any) -> Any:
    """Linux's futex on the low half of the int64 at `word` (both processors keep it first)."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        nothing = _I64(0)
        _call_c(builder, "syscall", _I64, _I64(_FUTEX), *values, nothing, nothing, nothing, variadic=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _nap(typing_context: Any, nanoseconds: Any) -> Any:
    """Sleep for less than a second, or until a signal comes."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        moment = _time(builder)
        builder.store(values[0], cgutils.gep_inbounds(builder, moment, 0, 1))
        _call_c(builder, "nanosleep", _I32, moment, ir.Constant(moment.type, None))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _now(typing_context: Any) -> Any:
    """Nanoseconds of the monotonic clock."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        moment = _time(builder)
        _call_c(builder, "clock_gettime", _I32, _I32(_CLOCK), moment)
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, moment, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, _I64(1_000_000_000)), rest)

    return types.int64(), generate


# ---- waiting and waking ----------------------------------------------------------------------------------------------
@kernel
def _wait(word: int, old: int) -> None:
    """Wait until the word is not `old`: spin, then yield, then sleep, when WAITING on the next line says so."""
    waiting = word + _LINE
    start = 0
    while True:
        for _ in range(32):
            if _load(word) != old:
                return
            _pause()
        now = _now()
        if start == 0:
            start = now
        waited = now - start
        if waited >= at(waiting, WAITING).sleep_after:
            # The sleeper counts itself first and the kernel compares the word after; who changes the word changes it
            # first and reads the count after. So one of the two sees the other.
            if _FUTEX:
                _add(waiting, 1)
                _futex(word, _SLEEP, old)
                _add(waiting, -1)
            else:
                _nap(min(waited >> 4, 1000 * _MICROSECOND))
        elif waited >= at(waiting, WAITING).yield_after:
            _yield_processor()


@kernel
def _wake(word: int) -> None:
    """Wake those who sleep on a word that was changed."""
    if _FUTEX and _load(word + _LINE):
        _futex(word, _WAKE, _EVERYONE)


@kernel
def meet(barrier: int, n_threads: int) -> None:
    """Wait until all threads are here; what each wrote before is then seen by all.

    barrier: address of a counter that only grows, of WAITING on the next line. Being both arrival and release it takes
    60 to 150 ns less for two threads than a counter with a generation on a line of its own, or one flag per thread.
    """
    if n_threads == 1:
        return
    count = _add(barrier, 1) + 1
    if count % n_threads == 0:
        _wake(barrier)
        return
    all_here = count - count % n_threads + n_threads
    while count < all_here:
        _wait(barrier, count)
        count = _load(barrier)


# ---- jobs ------------------------------------------------------------------------------------------------------------
@kernel
def _serve(block: int, thread: int) -> None:
    """What a worker does all its life: wait for a job, run it, say so."""
    n_threads = at(block, JOB).n_threads
    generation = 0
    while True:
        _wait(block + _JOB, generation)
        generation += 1  # no more: the next job comes when all have finished this one
        function = at(block, JOB).function
        if function == 0:
            return
        call(function, (thread, n_threads, block + _BARRIER, at(block, JOB).argument))
        _add(block + _FINISHED, 1)
        _wake(block + _FINISHED)


@kernel
def _launch(block: int, function: int, argument: int) -> int:
    """Run a job as thread 0, with all workers; 0, or 1 if the pool is closed.

    It returns when every worker has finished, so function and argument are never overwritten before all have read
    them, however soon the next job comes; nor need a job end with a barrier. Callers that come meanwhile wait for it.
    """
    while _swap(block + _BUSY, 1):
        _nap(_NAP)
    n_threads = at(block, JOB).n_threads
    closed = at(block, JOB).closed
    if not closed and n_threads > 1:
        at(block, JOB).function = function
        at(block, JOB).argument = argument
        all_finished = (_add(block + _JOB, 1) + 1) * (n_threads - 1)
        _wake(block + _JOB)
        call(function, (0, n_threads, block + _BARRIER, argument))
        finished = _load(block + _FINISHED)
        while finished < all_finished:
            _wait(block + _FINISHED, finished)
            finished = _load(block + _FINISHED)
    elif not closed:
        call(function, (0, 1, block + _BARRIER, argument))
    _swap(block + _BUSY, 0)
    return closed


@kernel
def _end(block: int) -> None:
    """Let the workers leave, once the present job is done; no job runs after that."""
    while _swap(block + _BUSY, 1):
        _nap(_NAP)
    if not at(block, JOB).closed:
        at(block, JOB).closed = 1
        at(block, JOB).function = 0
        _add(block + _JOB, 1)
        _wake(block + _JOB)
    _swap(block + _BUSY, 0)


_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


class ThreadPool:
    """`n_threads` threads, the caller's among them; by default as many as `choose_threads` finds right.

    Any thread may call `run`; one job runs at a time. A pool that nobody holds any more ends its workers. The end of
    the interpreter leaves them alone: they need nothing of it, and the end of the process takes them along.
    """

    def __init__(self, n_threads: int | None = None) -> None:
        cores = choose_threads()
        self.n_threads = cores.n_threads if n_threads is None else n_threads
        if not 1 <= self.n_threads <= 1024:
            raise OptionError(f"threads={n_threads} must lie between 1 and 1024")
        if not JIT_ENABLED:
            raise RuntimeError("NUMBA_DISABLE_JIT is set: there are no compiled jobs to run, use the reference device")
        self._crowded = self.n_threads > len(cores.cpus)
        self._cpus = cores.cpus if cores.pinned and not self._crowded else ()
        self._closed = False
        for compiled, n_arguments in ((_launch, 3), (_serve, 2), (_end, 1)):
            address_of(compiled, n_arguments)  # now, so that no run compiles
        self._forget_workers()
        self._start()
        _pools.add(self)

    def _forget_workers(self) -> None:
        """As if none had ever been started; so it is in the child of a fork, where they do not exist."""
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._address = 0

    def _start(self) -> None:
        """Start the workers, unless they are there."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the thread pool is closed")
            if self._address:
                return
            block, address = _make_block(self.n_threads, self._crowded)
            try:
                for number in range(1, self.n_threads):
                    arguments = (block, address, number, self._cpus)
                    thread = threading.Thread(target=_work, args=arguments, name=f"edgert-{number}", daemon=True)
                    thread.start()
                    self._threads.append(thread)
            except RuntimeError as error:  # "can't start new thread"
                _end(address)
                self._threads = []
                raise OptionError(f"threads={self.n_threads}: the system refused number {number + 1}") from error
            self._finalizer: weakref.finalize[..., Any] = weakref.finalize(self, _end_workers, block, address)
            self._finalizer.atexit = False
            self._block, self._address = block, address

    def run(self, function: int, argument: int) -> None:
        """Call job(thread, n_threads, barrier, argument) on every thread; all have finished when this returns.

        function: address of a @kernel of four int64 (`records.address_of`). The run is one compiled call, which no
        signal interrupts: Python looks at signals when it has returned.
        """
        if not self._address:
            self._start()
        if _launch(self._address, function, argument):
            raise RuntimeError("the thread pool is closed")

    def close(self) -> None:
        """End the threads, after the present job; may be called again."""
        with self._lock:
            self._closed = True
        if self._address:
            _end(self._address)
            self._finalizer.detach()
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()


def _make_block(n_threads: int, crowded: bool) -> tuple[npt.NDArray[np.uint8], int]:
    """The words that the threads of a pool share, and the address of the first."""
    block = np.zeros(_BLOCK_BYTES + _LINE, np.uint8)
    first = -block.ctypes.data % _LINE
    shared = block[first : first + _BLOCK_BYTES].reshape(-1, _LINE)
    shared[0, : JOB.itemsize].view(JOB)["n_threads"] = n_threads
    inside = _CROWDED if crowded else _INSIDE
    for line, (yield_after, sleep_after) in ((_JOB, _IDLE), (_FINISHED, inside), (_BARRIER, inside)):
        waiting = shared[line // _LINE + 1, : WAITING.itemsize].view(WAITING)
        waiting["yield_after"], waiting["sleep_after"] = yield_after, sleep_after
    return block, shared.ctypes.data


def _work(block: npt.NDArray[np.uint8], address: int, number: int, cpus: tuple[int, ...]) -> None:
    """A worker's thread. It keeps the block alive, also when the interpreter ends before it."""
    if cpus:
        with contextlib.suppress(OSError):  # they may have been taken offline
            os.sched_setaffinity(0, cpus)  # on Linux this is about the calling thread alone
    _serve(address, number)


def _end_workers(block: npt.NDArray[np.uint8], address: int) -> None:
    """For a pool that was not closed; nobody waits for the workers."""
    _end(address)


def _after_fork() -> None:
    for pool in list(_pools):
        pool._finalizer.detach()
        pool._forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

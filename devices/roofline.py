"""What this machine can do at most: bytes read from memory and int8 operations a second, by compiled loops.

Measured on the threads that a model computes with. Knows the vector layer and the thread pool, nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.threads import ThreadPool, meet
from edgert.quant.jit import kernel
from edgert.quant.records import address_of, at, record
from edgert.quant.simd import add_i32, dot4, splat_i32, sum_lanes_i32
from edgert.quant.simd_memory import load_i8, load_i32, store_int

WANTED_BYTES = 1 << 30  # beyond any cache
_LEAST_BYTES = 16 << 20
_PAGE = 4096
_PASS_S = 0.03  # of the dot products; a pass over memory takes as long as it takes
_WIDE, _NARROW = 12, 4  # accumulators of the two loops of dot products
_PRODUCTS = 64  # multiply-adds of one dot4

READ = record("address n_bytes streams sums")
DOTS = record("operands n_rounds wide sums")


@dataclass(frozen=True)
class Ceiling:
    """What was measured, pass by pass; the best pass is the ceiling: everything else that ran only slows it."""

    n_threads: int
    n_bytes: int  # of the memory read in one pass
    read_bytes_per_s: tuple[float, ...]
    int8_operations_per_s: tuple[float, ...]  # a multiply-add counts as two

    def __add__(self, other: Ceiling) -> Ceiling:
        """Both measurements as one."""
        return Ceiling(
            self.n_threads,
            min(self.n_bytes, other.n_bytes),
            self.read_bytes_per_s + other.read_bytes_per_s,
            self.int8_operations_per_s + other.int8_operations_per_s,
        )


def memory_for(free: int) -> int:
    """Bytes to read where `free` may be taken: 1 GiB, or half of what is free where that is less.

    0 where even that is too little to measure with.
    """
    n_bytes = min(WANTED_BYTES, free // 2) // _PAGE * _PAGE
    return n_bytes if n_bytes >= _LEAST_BYTES else 0


def measure(pool: ThreadPool, n_bytes: int, n_passes: int = 8) -> Ceiling:
    """Read `n_bytes` of memory (0: leave that out) and run dot products, each n_passes times."""
    reads = _read(pool, n_bytes, n_passes) if n_bytes else []
    return Ceiling(pool.n_threads, n_bytes, tuple(reads), tuple(_multiply(pool, n_passes)))


def compile_all(pool: ThreadPool) -> None:
    """Compile what measure() runs, or find it in the cache."""
    _read(pool, _PAGE * pool.n_threads, 1)
    _multiply(pool, 1, seconds=0.0)


def _run(pool: ThreadPool, job: Any, argument: npt.NDArray[Any]) -> float:
    """Seconds that the pool takes for a job."""
    function = address_of(job, 4)
    started = time.perf_counter()
    pool.run(function, argument.ctypes.data)
    return time.perf_counter() - started


class Reader:
    """Memory to read, all of it at a time, for as long as the reader lives."""

    def __init__(self, pool: ThreadPool, n_bytes: int) -> None:
        self._pool, self._n_bytes = pool, n_bytes
        self._memory = np.empty(n_bytes + _PAGE, np.uint8)
        self._sums = np.zeros(16 * pool.n_threads, np.int32)
        start = self._memory.ctypes.data + -self._memory.ctypes.data % _PAGE
        # One stream or several: which of them keeps a core's prefetcher busier differs between machines.
        self._arguments = [np.array([(start, n_bytes, many, self._sums.ctypes.data)], READ) for many in (0, 1)]
        _run(pool, touch, self._arguments[0])

    def passes(self, n_passes: int) -> list[float]:
        """Bytes a second of each pass."""
        return [self._n_bytes / _run(self._pool, read_all, self._arguments[i % 2]) for i in range(n_passes)]


def _read(pool: ThreadPool, n_bytes: int, n_passes: int) -> list[float]:
    """Bytes a second of each pass over fresh memory."""
    return Reader(pool, n_bytes).passes(n_passes)


def _multiply(pool: ThreadPool, n_passes: int, seconds: float = _PASS_S) -> list[float]:
    """Operations a second of each pass, by the loop that suits the number of vector registers here."""
    operands = np.arange(128 * 64, dtype=np.int64).astype(np.uint8)
    sums = np.zeros(16 * pool.n_threads, np.int32)

    def passes(wide: bool) -> Callable[[int], float]:
        def rate(n_rounds: int) -> float:
            argument = np.array([(operands.ctypes.data, n_rounds, wide, sums.ctypes.data)], DOTS)
            n_operations = 2 * _PRODUCTS * (_WIDE if wide else _NARROW) * n_rounds * pool.n_threads
            return n_operations / _run(pool, dot_all, argument)

        return rate

    found = []
    for wide in (True, False):
        rate = passes(wide)
        rate(1)
        per_round = 2 * _PRODUCTS * (_WIDE if wide else _NARROW) * pool.n_threads
        n_rounds = max(1, int(rate(1000) * seconds / per_round))
        found.append([rate(n_rounds) for _ in range(n_passes)])
    return max(found, key=max)


# ---- compiled --------------------------------------------------------------------------------------------------------
@kernel
def touch(thread: int, n_threads: int, barrier: int, argument: int) -> None:
    """Write to every page, so that it is there, near the thread that will read it."""
    address, n_pages = at(argument, READ).address, at(argument, READ).n_bytes // _PAGE
    for page in range(n_pages * thread // n_threads, n_pages * (thread + 1) // n_threads):
        store_int(address + page * _PAGE, 1)
    meet(barrier, n_threads)


@kernel
def read_all(thread: int, n_threads: int, barrier: int, argument: int) -> None:
    """Read all of the memory by wide loads, each thread its own pages: in a row, or in four streams."""
    task = at(argument, READ)
    n_pages = task.n_bytes // _PAGE
    begin = task.address + n_pages * thread // n_threads * _PAGE
    span = task.address + n_pages * (thread + 1) // n_threads * _PAGE - begin
    gap, step = 128, 512
    if task.streams:
        span //= 4
        gap, step = span, 128
    a, b, c, d = splat_i32(0), splat_i32(0), splat_i32(0), splat_i32(0)
    for p in range(begin, begin + span, step):
        a = add_i32(add_i32(a, load_i32(p)), load_i32(p + 64))
        b = add_i32(add_i32(b, load_i32(p + gap)), load_i32(p + gap + 64))
        c = add_i32(add_i32(c, load_i32(p + 2 * gap)), load_i32(p + 2 * gap + 64))
        d = add_i32(add_i32(d, load_i32(p + 3 * gap)), load_i32(p + 3 * gap + 64))
    total = sum_lanes_i32(add_i32(add_i32(a, b), add_i32(c, d)))
    store_int(task.sums + 64 * thread, total)  # or LLVM would leave the loop out
    meet(barrier, n_threads)


@kernel
def dot_all(thread: int, n_threads: int, barrier: int, argument: int) -> None:
    """Dot products of operands that stay in the first-level cache, as fast as they go.

    wide: twelve independent sums, for 32 registers of 512 bits; else four, which do not spill elsewhere.
    """
    task = at(argument, DOTS)
    if task.wide:
        total = _dot_wide(task.operands, task.n_rounds)
    else:
        total = _dot_narrow(task.operands, task.n_rounds)
    store_int(task.sums + 64 * thread, total)
    meet(barrier, n_threads)


@kernel
def _dot_wide(operands: int, n_rounds: int) -> int:
    """4 x 3 operands a round, new ones each time: nothing can be moved out of the loop."""
    a0, a1, a2, a3 = splat_i32(0), splat_i32(1), splat_i32(2), splat_i32(3)
    b0, b1, b2, b3 = splat_i32(4), splat_i32(5), splat_i32(6), splat_i32(7)
    c0, c1, c2, c3 = splat_i32(8), splat_i32(9), splat_i32(10), splat_i32(11)
    for i in range(n_rounds):
        p = operands + 64 * (i & 63)
        u0, u1, u2, u3 = load_i8(p), load_i8(p + 64), load_i8(p + 128), load_i8(p + 192)
        s = load_i8(p + 256)
        a0, a1, a2, a3 = dot4(a0, u0, s), dot4(a1, u1, s), dot4(a2, u2, s), dot4(a3, u3, s)
        s = load_i8(p + 320)
        b0, b1, b2, b3 = dot4(b0, u0, s), dot4(b1, u1, s), dot4(b2, u2, s), dot4(b3, u3, s)
        s = load_i8(p + 384)
        c0, c1, c2, c3 = dot4(c0, u0, s), dot4(c1, u1, s), dot4(c2, u2, s), dot4(c3, u3, s)
    a = add_i32(add_i32(a0, a1), add_i32(a2, a3))
    b = add_i32(add_i32(b0, b1), add_i32(b2, b3))
    c = add_i32(add_i32(c0, c1), add_i32(c2, c3))
    return sum_lanes_i32(add_i32(add_i32(a, b), c))


@kernel
def _dot_narrow(operands: int, n_rounds: int) -> int:
    """2 x 2 operands a round."""
    a0, a1, b0, b1 = splat_i32(0), splat_i32(1), splat_i32(2), splat_i32(3)
    for i in range(n_rounds):
        p = operands + 64 * (i & 63)
        u0, u1, s0, s1 = load_i8(p), load_i8(p + 64), load_i8(p + 128), load_i8(p + 192)
        a0, a1, b0, b1 = dot4(a0, u0, s0), dot4(a1, u1, s0), dot4(b0, u0, s1), dot4(b1, u1, s1)
    return sum_lanes_i32(add_i32(add_i32(a0, a1), add_i32(b0, b1)))

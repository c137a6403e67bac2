"""The machine in hand as a board: its memory and arithmetic measured now, its flash as `edgert doctor` found it.

Rates are those of the processors' own time: what other programs take away meanwhile does not count, for a plan is to
tell what the machine does when it is left alone. What they take of the memory's bandwidth and of caches does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgert import machine
from edgert.boards import HERE, Board, Flash, Unit
from edgert.cache import cache_folder
from edgert.memory import available, installed
from edgert.plan_model import PlanModel
from edgert.quant import isa, jit
from edgert.storage.flash_settings import existing, flash_settings
from edgert.tier import USUAL_BYTES_PER_S
from edgert.traffic import ModelTraffic

if TYPE_CHECKING:
    from edgert.devices.threads import ThreadPool

_LEAST_BYTES, _MOST_BYTES, _SPARE_BYTES = 16 << 20, 512 << 20, 1 << 30
_PASSES = 8
_ROUNDS = 100_000  # of dot products: tens of milliseconds
_BUSY = 0.85  # of the processors' time, below which others are said to take it
_SLOW_UNIT = Unit("CPU", 2e9, 1e9, 5e9, 1)  # where nothing is compiled: a guess
FLOATS = 4  # int8 operations that take as long as one of a 32-bit float: as many more fit a register


def this_board(model: PlanModel) -> Board:
    """The board that this runs on, as far as the model in question needs it to be measured. Takes about a second."""
    unit, remarks = measured_unit(token_bytes(model))
    where = model.path if model.path is not None else existing(cache_folder())
    flash, said = this_flash(where, int(model.record_bytes.max(initial=0)))
    return board_of(unit, flash, (*remarks, *said))


def board_of(unit: Unit, flash: Flash, remarks: tuple[str, ...] = ()) -> Board:
    """This machine with rates that were measured."""
    return Board(
        name=HERE,
        title="this machine",
        ram_bytes=installed(),
        system_bytes=max(0, installed() - available()),
        memory_bytes_per_s=unit.bytes_per_s,
        cpu=unit,
        gpu=None,
        flash=(flash,),
        slowness=1.0,
        remarks=remarks,
        sources=(machine.cpu_name(),),
        measured=True,
    )


def token_bytes(model: PlanModel) -> int:
    """Bytes of the weights that tokens come back to: what caches would have to hold."""
    traffic, c = ModelTraffic.of(model.weights, 0.0), model.config
    n_experts = len(c.expert_layers) * c.router.n_expert if c.router else 0
    return int(traffic.layers.n_bytes + traffic.head.n_bytes + n_experts * traffic.expert.n_bytes)


def measured_unit(n_bytes: int, threads: int | None = None) -> tuple[Unit, tuple[str, ...]]:
    """The CPU as it reads about n_bytes of memory (small models stay in caches), and remarks on how that was found."""
    if not jit.JIT_ENABLED:
        return _SLOW_UNIT, ("nothing is compiled here: rates are guesses",)
    from edgert.devices.threads import ThreadPool

    n_bytes = min(max(n_bytes, _LEAST_BYTES), _MOST_BYTES)
    if available() < n_bytes + _SPARE_BYTES:
        n_bytes = _LEAST_BYTES
    pool = ThreadPool(threads)
    try:
        rates = Rates(pool, n_bytes)
        read, int8 = rates.read(), rates.int8()
    finally:
        pool.close()
    remarks: tuple[str, ...] = (f"reads {read / 1e9:.1f} GB/s, {int8 / 1e9:,.0f} G int8 operations a second, now",)
    if rates.share < _BUSY:
        remarks += (f"other programs took {1 - rates.share:.0%} of the processors meanwhile",)
    return Unit("CPU", int8, int8 / FLOATS, read, pool.n_threads, isa.choose().name), remarks


class Rates:
    """Measures a pool's threads. share: what part of the processors' time they got, over all measurements."""

    def __init__(self, pool: ThreadPool, n_bytes: int) -> None:
        from edgert.devices import roofline
        from edgert.devices.buffers import huge_pages

        self._pool, self._wall, self._cpu = pool, 0.0, 0.0
        self._sums = np.zeros(16 * pool.n_threads, np.int32)
        n_bytes = n_bytes // 4096 * 4096
        self._memory = huge_pages(n_bytes)  # as weights lie
        start, sums = self._memory.ctypes.data, self._sums.ctypes.data
        self._reads = [np.array([(start, n_bytes, streams, sums)], roofline.READ) for streams in (0, 1)]
        self._n_bytes = n_bytes
        self._run(roofline.touch, self._reads[0])
        self._wall = self._cpu = 0.0

    @property
    def share(self) -> float:
        """Of the processors' time that the threads could have had."""
        return min(1.0, self._cpu / self._wall) if self._wall else 1.0

    def read(self) -> float:
        """Bytes a second: the median of passes with the better of two patterns."""
        from edgert.devices import roofline

        each = [[self._run(roofline.read_all, reads) for _ in range(_PASSES)] for reads in self._reads]
        return self._n_bytes / float(min(map(np.median, each)))

    def int8(self) -> float:
        """Operations a second, by the loop that suits the registers here."""
        from edgert.devices import roofline

        operands = np.arange(128 * 64, dtype=np.int64).astype(np.uint8)
        best = 0.0
        for wide, sums in ((1, 12), (0, 4)):  # accumulators of the two loops
            arguments = np.array([(operands.ctypes.data, _ROUNDS, wide, self._sums.ctypes.data)], roofline.DOTS)
            seconds = float(np.median([self._run(roofline.dot_all, arguments) for _ in range(_PASSES // 2)]))
            best = max(best, 128 * sums * _ROUNDS * self._pool.n_threads / seconds)
        return best

    def _run(self, job: Any, argument: Any) -> float:
        """Seconds of the processors' time, each thread's share of it, or what the clock says where that is less."""
        from edgert.quant.records import address_of

        function, n_threads = address_of(job, 4), self._pool.n_threads
        began, cpu = time.perf_counter(), time.process_time()
        self._pool.run(function, argument.ctypes.data)
        cpu, wall = (time.process_time() - cpu) / n_threads, time.perf_counter() - began
        self._wall, self._cpu = self._wall + wall, self._cpu + min(cpu, wall)
        return min(cpu, wall)


def this_flash(where: Path, record_bytes: int) -> tuple[Flash, tuple[str, ...]]:
    """The flash that holds a path, at reads of a record's size, and a remark where it was never measured."""
    settings = flash_settings(where, record_bytes or None)
    if settings.measured and settings.bytes_per_s:
        return Flash(f"its flash, {settings.date}", settings.bytes_per_s, 0.0), ()
    remark = f"flash was never measured here: {USUAL_BYTES_PER_S / 1e9:.0f} GB/s is assumed; run `edgert doctor`"
    return Flash("flash, assumed", USUAL_BYTES_PER_S, 1e-4), (remark,)

"""The machine in hand as a board: its memory and arithmetic measured now, its flash as `edgert doctor` found it.

Rates are those of the processors' own time: what other programs take away meanwhile does not count, for a plan is to
tell what the machine does when it is left alone. What they take of the memory's bandwidth and of caches does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgert import machine
from edgert.boards import HERE, Board, Flash, Unit
from edgert.cache import cache_folder
from edgert.memory import available, installed
from edgert.plan_model import PlanModel
from edgert.plan_parts import PROMPT, Product, products
from edgert.quant import isa, jit
from edgert.storage.flash_settings import existing, flash_settings
from edgert.tier import USUAL_BYTES_PER_S
from edgert.traffic import ModelTraffic

if TYPE_CHECKING:
    from edgert.devices.product_rates import Products
    from edgert.devices.threads import ThreadPool

_LEAST_BYTES, _MOST_BYTES, _SPARE_BYTES = 16 << 20, 512 << 20, 1 << 30
_PASSES, _PASS_S, _FIRST_TURNS = 7, 0.03, 4
_LESSER = 0.1  # of the products, that need no measuring
_LOOKED_UP, _LOOK_UP_S = 400, 2.5e-6  # turns, and seconds of one where plan.py's were measured
_BUSY = 0.85  # of the processors' time, below which others are said to take it
_SLOW_UNIT = Unit("CPU", 2e9, 1e9, 5e9, 1)  # where nothing is compiled: a guess
FLOATS = 4  # int8 operations that take the kernels as long as one of a 32-bit float in attention


def this_board(model: PlanModel, n_prompt: int) -> Board:
    """The board that this runs on, as far as the model in question needs it to be measured. Takes about a second."""
    unit, remarks = measured_unit(model, n_prompt)
    where = model.path if model.path is not None else existing(cache_folder())
    flash, said = this_flash(where, int(model.record_bytes.max(initial=0)))
    return board_of(unit, flash, python_slowness(), (*remarks, *said))


def board_of(unit: Unit, flash: Flash, slowness: float, remarks: tuple[str, ...] = ()) -> Board:
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
        slowness=slowness,
        remarks=remarks,
        sources=(machine.cpu_name(),),
        measured=True,
    )


def python_slowness() -> float:
    """How much longer Python takes here and now than where plan.py's seconds of software were measured."""

    def look_up() -> float:
        numbers, kept, began = np.arange(16) % 3, dict.fromkeys(range(16), 0), time.process_time()
        for turn in range(_LOOKED_UP):
            for number in np.flatnonzero(numbers == turn % 3).tolist():
                kept[number] += 1
        return time.process_time() - began

    look_up()
    return float(np.median([look_up() for _ in range(_PASSES)])) / (_LOOKED_UP * _LOOK_UP_S)


def measured_unit(
    model: PlanModel, n_prompt: int, threads: int | None = None, n_bytes: int | None = None
) -> tuple[Unit, tuple[str, ...]]:
    """The CPU as it multiplies the model's matrices, and remarks on how that was found.

    n_prompt: tokens of a prompt; with few of them experts have a few rows each, which takes longer by row. n_bytes: of
    memory to take meanwhile, by default memory_bytes() at this moment.
    """
    if not jit.JIT_ENABLED:
        return _SLOW_UNIT, ("nothing is compiled here: rates are guesses",)
    from edgert.devices.threads import ThreadPool

    pool = ThreadPool(threads)
    try:
        of_token = products(model.weights, 1)
        rates = Rates(pool, memory_bytes(model) if n_bytes is None else n_bytes)
        read = rates.rate(of_token, lambda one: one.matrix.n_bytes)
        integers, floats = _by_kind(products(model.weights, min(n_prompt, PROMPT)))
        int8 = rates.rate(integers, lambda one: one.operations) if integers else None
        half = int8 / FLOATS if int8 else rates.rate(floats, lambda one: one.operations)
    finally:
        pool.close()
    computes = f"{int8 / 1e9:,.0f} G int8" if int8 else f"{half / 1e9:,.0f} G float"
    remarks: tuple[str, ...] = (f"kernels read {read / 1e9:.1f} GB/s and make {computes} operations a second, now",)
    if rates.share < _BUSY:
        remarks += (f"other programs took {1 - rates.share:.0%} of the processors meanwhile",)
    return Unit("CPU", int8, half, read, pool.n_threads, isa.choose().name), remarks


def memory_bytes(model: PlanModel) -> int:
    """Bytes to fill with matrices, at least one: as many as tokens come back to, which caches may or may not hold."""
    traffic, c = ModelTraffic.of(model.weights, 0.0), model.config
    n_experts = len(c.expert_layers) * c.router.n_expert if c.router else 0
    n_bytes = int(traffic.layers.n_bytes + traffic.head.n_bytes + n_experts * traffic.expert.n_bytes)
    n_bytes = min(max(n_bytes, _LEAST_BYTES), _MOST_BYTES)
    least = max(_LEAST_BYTES, *(one.matrix.n_bytes + 64 for one in products(model.weights, 1)))
    return max(n_bytes, least) if available() > n_bytes + _SPARE_BYTES else least


def _by_kind(found: dict[Product, float]) -> tuple[dict[Product, float], dict[Product, float]]:
    """Products of integers, and of floats."""
    integers = {one: count for one, count in found.items() if one.matrix.format.is_integer}
    return integers, {one: count for one, count in found.items() if one not in integers}


class Rates:
    """Measures a pool's threads. share: what part of the processors' time they got, over all measurements."""

    def __init__(self, pool: ThreadPool, n_bytes: int) -> None:
        from edgert.devices.buffers import huge_pages
        from edgert.devices.product_rates import fill

        self._pool, self._wall, self._cpu = pool, 0.0, 0.0
        self._memory = huge_pages(n_bytes)  # as weights lie
        fill(self._memory)

    @property
    def share(self) -> float:
        """Of the processors' time that the threads could have had."""
        return min(1.0, self._cpu / self._wall) if self._wall else 1.0

    def rate(self, found: dict[Product, float], amount: Callable[[Product], float]) -> float:
        """What is computed or read in a second, over products and how many there are of each; amount: of one.

        The lesser of them, which together make a tenth, are left out.
        """
        shares = sorted(((count * amount(one), one) for one, count in found.items()), key=lambda pair: -pair[0])
        total, left = sum(share for share, _ in shares), 1.0
        measured = seconds = 0.0
        for share, one in shares:
            if measured and left < _LESSER:
                break
            left -= share / total
            measured += share
            seconds += found[one] * self._seconds(one)
        return measured / seconds

    def _seconds(self, product: Product) -> float:
        """Of one product, the median of passes."""
        from edgert.devices.product_rates import Products

        made = Products(product.matrix, product.n_rows, self._memory, self._pool.n_threads)
        made.run(self._pool, 1)  # pages, and the kernels' own
        once = self._run(made, _FIRST_TURNS) / _FIRST_TURNS
        turns = max(_FIRST_TURNS, min(int(_PASS_S / once), made.n_matrices))
        return float(np.median([self._run(made, turns) for _ in range(_PASSES)])) / turns

    def _run(self, made: Products, turns: int) -> float:
        """Seconds of the processors' time, each thread's share of it, or what the clock says where that is less."""
        n_threads = self._pool.n_threads
        began, cpu = time.perf_counter(), time.process_time()
        made.run(self._pool, turns)
        cpu, wall = (time.process_time() - cpu) / n_threads, time.perf_counter() - began
        self._wall, self._cpu = self._wall + wall, self._cpu + min(cpu, wall)
        return max(min(cpu, wall), 1e-9)


def this_flash(where: Path, record_bytes: int) -> tuple[Flash, tuple[str, ...]]:
    """The flash that holds a path, at reads of a record's size, and a remark where it was never measured."""
    settings = flash_settings(where, record_bytes or None)
    if settings.measured and settings.bytes_per_s:
        return Flash(f"its flash, {settings.date}", settings.bytes_per_s, 0.0), ()
    remark = f"flash was never measured here: {USUAL_BYTES_PER_S / 1e9:.0f} GB/s is assumed; run `edgert doctor`"
    return Flash("flash, assumed", USUAL_BYTES_PER_S, 1e-4), (remark,)

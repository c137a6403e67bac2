"""The machine in hand as a board: its memory and arithmetic measured now, its flash as `edgert doctor` found it."""

from __future__ import annotations

from pathlib import Path

from edgert import machine
from edgert.boards import HERE, Board, Flash, Unit
from edgert.cache import cache_folder
from edgert.devices import cores
from edgert.memory import available, installed
from edgert.plan_model import PlanModel
from edgert.quant import isa, jit
from edgert.storage.flash_settings import existing, flash_settings
from edgert.tier import USUAL_BYTES_PER_S
from edgert.traffic import ModelTraffic

_LEAST_BYTES, _MOST_BYTES, _SPARE_BYTES = 16 << 20, 512 << 20, 1 << 30
_SLOW_UNIT = Unit("CPU", 2e9, 1e9, 5e9, 1)  # where nothing is compiled: a guess
FLOATS = 4  # int8 operations that take as long as one of a 32-bit float: as many more fit a register


def this_board(model: PlanModel) -> Board:
    """The board that this runs on, as far as the model in question needs it to be measured. Takes about a second."""
    where = model.path if model.path is not None else existing(cache_folder())
    record = int(model.record_bytes.max(initial=0))
    unit, remarks = measured_unit(token_bytes(model))
    flash, said = this_flash(where, record)
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
        remarks=(*remarks, *said),
        sources=(machine.cpu_name(),),
        measured=True,
    )


def token_bytes(model: PlanModel) -> int:
    """Bytes that the weights of a model occupy which tokens come back to: what caches would have to hold."""
    traffic, c = ModelTraffic.of(model.weights, 0.0), model.config
    n_experts = c.n_layers * c.router.n_expert if c.router else 0
    return int(traffic.layers.n_bytes + traffic.head.n_bytes + n_experts * traffic.expert.n_bytes)


def measured_unit(n_bytes: int) -> tuple[Unit, tuple[str, ...]]:
    """The CPU as it reads about n_bytes of memory (small models stay in caches), and remarks on how that was found."""
    threads = cores.choose_threads()
    n_bytes = min(max(n_bytes, _LEAST_BYTES), _MOST_BYTES)
    if not jit.JIT_ENABLED:
        return _SLOW_UNIT, ("nothing is compiled here: rates are guesses",)
    if available() < n_bytes + _SPARE_BYTES:
        n_bytes = _LEAST_BYTES
    from edgert.devices import roofline
    from edgert.devices.threads import ThreadPool

    pool = ThreadPool()
    try:
        roofline.compile_all(pool)
        ceiling = roofline.measure(pool, n_bytes, n_passes=6)
    finally:
        pool.close()
    reads, int8 = sorted(ceiling.read_bytes_per_s), max(ceiling.int8_operations_per_s)
    remarks: tuple[str, ...]
    remarks = (f"reads {max(reads) / 1e9:.1f} GB/s, {int8 / 1e9:,.0f} G int8 operations a second, measured now",)
    if reads[-1] > 2 * reads[len(reads) // 2]:
        remarks += ("other programs are at work: rates moved by more than twice while they were measured",)
    unit = Unit("CPU", int8, int8 / FLOATS, max(reads), threads.n_threads, isa.choose().name)
    return unit, remarks


def this_flash(where: Path, record_bytes: int) -> tuple[Flash, tuple[str, ...]]:
    """The flash that holds a path, at reads of a record's size, and a remark where it was never measured."""
    settings = flash_settings(where, record_bytes or None)
    if settings.measured and settings.bytes_per_s:
        return Flash(f"its flash, {settings.date}", settings.bytes_per_s, 0.0), ()
    remark = f"flash was never measured here: {USUAL_BYTES_PER_S / 1e9:.0f} GB/s is assumed; run `edgert doctor`"
    return Flash("flash, assumed", USUAL_BYTES_PER_S, 1e-4), (remark,)

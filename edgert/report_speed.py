"""What a machine would make of a model: seconds a token, from what must be read from memory and from flash.

An estimate with its assumptions in the open, for tokens that are generated one by one after a short prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgert.experts.replay import Hits, Report
from edgert.experts.speed_allocation import Tier
from edgert.memory import available, budget_for
from edgert.quant import jit
from edgert.report_subject import Subject
from edgert.storage.flash_settings import flash_settings

ARITHMETIC_SHARE = 0.7  # of the rate at which memory can be read: what tokens of real models reach
READ_S = Tier.latency_s  # that a read takes beside its bytes
WORTH = 0.8  # of the speed with all experts in RAM: the least that a suggested memory gives
HARDLY_MORE = 1.1  # times a memory: what nobody would give speed up for
FLASH = {"SD card": 80e6, "eMMC": 250e6, "SATA or UFS": 500e6, "NVMe": 2e9}  # bytes a second at an expert's size
_UNMEASURED_RAM, _MEASURED_BYTES, _LEAST_FREE = 10e9, 256 << 20, 1 << 30


@dataclass(frozen=True)
class Machine:
    """Rates in bytes a second; flash None: never measured here. memory: bytes that a model may take; None: any."""

    ram: float
    flash: float | None
    ram_measured: bool = True
    memory: int | None = None


def this_machine(path: Path, record_bytes: int) -> Machine:
    """The machine that this runs on; how fast its flash is at records of a size is known only from `edgert doctor`."""
    settings, memory = flash_settings(path, record_bytes), budget_for(None).n_bytes
    ram = _memory_rate()
    flash = settings.bytes_per_s if settings.measured else None
    return Machine(ram or _UNMEASURED_RAM, flash, ram is not None, memory)


def _memory_rate() -> float | None:
    """Bytes a second that are read from memory; None where nothing is compiled, or too little is free."""
    if not jit.JIT_ENABLED or available() < _LEAST_FREE:
        return None
    from edgert.devices import roofline
    from edgert.devices.threads import ThreadPool

    pool = ThreadPool()
    try:
        roofline.compile_all(pool)
        return max(roofline.measure(pool, _MEASURED_BYTES, n_passes=4).read_bytes_per_s)
    finally:
        pool.close()


@dataclass(frozen=True)
class Row:
    """One size of the expert buffer: the share of the experts in it, its bytes, those of the whole process (None:
    unknown), the policy that a bundle would choose, the share of uses found there, bytes that a token reads from flash,
    and tokens a second for each rate of flash."""

    residency: float
    buffer_bytes: int
    process_bytes: int | None
    policy: str
    hit_rate: float
    read_bytes: float
    tokens_per_s: tuple[float, ...]

    @property
    def bytes(self) -> int:
        """Of the process, or of the buffer where that is unknown."""
        return self.process_bytes or self.buffer_bytes


def compute_seconds(subject: Subject, machine: Machine) -> float:
    """Of a token's arithmetic: hot weights, where they are known, and the experts it uses, read from memory."""
    profile = subject.profile
    used = float((profile.frequency() * subject.record_bytes).sum())
    hot = subject.needs.hot if subject.needs is not None else 0
    return (used + hot) / (ARITHMETIC_SHARE * machine.ram)


def seconds(compute: float, hits: Hits, flash: float) -> float:
    """Of a token: arithmetic, then bytes and reads from flash."""
    n_tokens = max(1, hits.n_tokens)
    return compute + (hits.bytes_missed / flash + hits.n_missed * READ_S) / n_tokens


def what_if(subject: Subject, found: Report, machine: Machine, rates: Sequence[float]) -> list[Row]:
    """A row for each residency that was replayed, with its best policy, and one with all experts in RAM."""
    compute, total = compute_seconds(subject, machine), int(subject.record_bytes.sum())
    rows = []
    for place, (residency, policy) in enumerate(found.best_policies().items()):
        hits, slots = found.policies[policy][place], int(residency * total)
        speeds = tuple(1 / seconds(compute, hits, rate) for rate in rates)
        read = hits.bytes_missed / max(1, hits.n_tokens)
        rows.append(Row(residency, slots, _process_bytes(subject, slots), policy, hits.rate, read, speeds))
    return [*rows, Row(1.0, total, _process_bytes(subject, 0), "", 1.0, 0.0, (1 / compute,) * len(rates))]


def _process_bytes(subject: Subject, slots: int) -> int | None:
    """What --memory has to be for an expert buffer of `slots` bytes, or (0) with all experts in RAM."""
    needed = subject.needs
    return None if needed is None else max(needed.plan(min(needed.work), slots).total, needed.least_budget)


def enough(rows: Sequence[Row], column: int, memory: int | None) -> Row:
    """The smallest buffer that gives WORTH of the speed of the last row, or the last where that takes hardly more.

    Where `memory` is too small for it, the largest that fits, or the smallest there is.
    """
    fitting = [row for row in rows if memory is None or row.bytes <= memory] or rows[:1]
    worth = [row for row in fitting if row.tokens_per_s[column] >= WORTH * rows[-1].tokens_per_s[column]]
    least = worth[0] if worth else fitting[-1]
    return rows[-1] if rows[-1] in fitting and rows[-1].bytes <= HARDLY_MORE * least.bytes else least

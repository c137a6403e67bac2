"""What a machine makes of experts on flash: the buffer that a memory budget leaves them, and the rate of its flash.

For choosing bits with the cache in mind, before the bundle is there; the plan is that of loading.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgert.errors import OptionError
from edgert.experts.speed_allocation import Tier
from edgert.memory import Budget, plan_memory
from edgert.needs import needs
from edgert.storage.flash_settings import flash_settings
from edgert.weights import Weights

USUAL_BYTES_PER_S = 1e9  # of a flash that was never measured
READ_S = 1 / 12e9  # for a byte of weights in RAM: two cores of a small machine


def tier_for(
    weights: Weights, memory: int, place: Path, n_context: int, kv_type: str = "f16", *, most: int
) -> tuple[Tier, str]:
    """The tier of a model on flash at `place`, in `memory` bytes; and how its rate is known.

    weights: with the fewest bits that its experts can have; most: bytes of their records with the most. OptionError
    where even those fit: then bits for speed are the fewest bits. MemoryLimitError: below the floor.
    """
    # The first run alone waits for the compiler; and what does not all fit is read from flash, so that is planned for.
    needed = replace(needs(weights, n_context, kv_type), compiling=False, cold=most)
    plan = plan_memory(needed, Budget(memory, memory, memory, strict=True))
    if not plan.slots:
        raise OptionError(
            f"all experts fit --memory {memory >> 20:,}MiB in any format, {most >> 20:,} MiB at most: there the fewest "
            "bits are the fastest, leave --objective speed away"
        )
    whole = memory - (needed.plan(min(needed.work)).total - most)
    rate, words = flash_rate(place, needed.record)
    return Tier(plan.slots, rate, whole_bytes=whole), words


def flash_rate(place: Path, record_bytes: int) -> tuple[float, str]:
    """Bytes a second of records of this size on the flash at `place`, and how that is known, for a person."""
    rate = flash_settings(place, record_bytes).bytes_per_s
    known = "as measured here" if rate else f"a guess: {place} was never measured, which `edgert doctor {place}` does"
    return rate or USUAL_BYTES_PER_S, f"{(rate or USUAL_BYTES_PER_S) / 1e6:,.0f} MB/s, {known}"

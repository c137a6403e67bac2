"""What a bench says of experts that lie on flash: hit rate, bytes read, the flash's rate, and the bound it sets.

The bound is the online one: a token takes no less than its arithmetic, and no less than the flash takes for the bytes
that the policy in use did not keep, at the rate that it reaches with records of this size in the same run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from edgert.devices.base import READY
from edgert.experts.replay import Belady, Hits, replay_policy
from edgert.experts.residency import Residency
from edgert.experts.streamed import Streamed
from edgert.experts.trace import Trace
from edgert.types import ExpertCounts, Ids

_GROUP_BYTES = 32 << 20  # read at a time to measure the flash: the lanes are not to run dry
_ALONE = 15  # records that are read one by one
_TURN_S = 0.1  # a measurement of the flash takes, unless one group takes longer


class FlashRate:
    """Measures the flash with the model's own lanes: experts that are in RAM are read once more into their places.

    So it takes no memory, and the buffer is afterwards what it was.
    """

    def __init__(self, residency: Streamed) -> None:
        self._buffer, self._numbers = residency.buffer, np.random.default_rng(1)

    def measure(self) -> float:
        """Bytes a second, random records. Raises what goes wrong with a read."""
        n_bytes, seconds = 0, 0.0
        self._buffer.cancel_all()
        while seconds < _TURN_S:
            keys = np.flatnonzero(self._buffer.state == READY)
            assert len(keys), "the flash is measured after a step: nothing is in the buffer yet"
            keys = self._numbers.permutation(keys)
            n_keys = max(1, int(np.searchsorted(np.cumsum(self._buffer.sizes[keys]), _GROUP_BYTES)))
            n_bytes += int(self._buffer.sizes[keys[:n_keys]].sum())
            seconds += self._read(keys[:n_keys])
        return n_bytes / seconds

    def alone(self) -> float:
        """Seconds that a record takes which is read by itself, the median of some. Raises as measure() does."""
        self._buffer.cancel_all()
        keys = self._numbers.permutation(np.flatnonzero(self._buffer.state == READY))[:_ALONE]
        return float(np.median([self._read(keys[i : i + 1]) for i in range(len(keys))]))

    def _read(self, keys: Ids) -> float:
        """Seconds until all are there."""
        reads, reader = self._buffer.read_again(keys.tolist()), self._buffer.reader
        started = time.perf_counter()
        try:
            reader.submit(reads)
            while reader.pending:
                for arrival in reader.wait():
                    if arrival.error is not None:
                        raise arrival.error
        finally:
            reader.cancel(reads)
            while reader.pending:
                reader.wait()
        return time.perf_counter() - started


def flash_rate_of(residency: Residency) -> FlashRate | None:
    """What measures the flash of a residency; None if nothing is on flash."""
    return FlashRate(residency) if isinstance(residency, Streamed) else None


@dataclass(frozen=True)
class Routed:
    """The routes of the tokens that a test generated: ids (n_layers, n_tokens, top_k), the first n_warm not timed.

    record_bytes: (n_layers, n_expert), 0 where a layer has no experts.
    """

    ids: Ids
    n_warm: int
    record_bytes: Ids

    def belady(self, n_bytes: int) -> Hits:
        """What the best possible policy hits with an expert buffer of n_bytes, in the tokens that were timed."""
        n_layers, n_tokens, top_k = self.ids.shape
        nothing = np.zeros((n_layers, n_tokens, top_k), np.float16)
        ahead, steps = np.zeros((n_layers, n_tokens, 0, 0), np.int8), np.ones(n_tokens, np.int64)
        trace = Trace("", self.record_bytes, self.ids.astype(np.uint16), nothing, ahead, steps)
        return replay_policy(trace, Belady(trace), n_bytes, self.n_warm)


@dataclass(frozen=True)
class Streaming:
    """What the runs of one test did with a model whose experts are on flash.

    runs: counts and seconds of each. flash: bytes a second, measured before each run and after the last. resident_s:
    seconds a token of the same steps with all experts in RAM, where that was measured. belady: hits of the best
    possible policy on the same routes.
    """

    runs: tuple[tuple[ExpertCounts, float], ...]
    run_tokens: int
    flash: tuple[float, ...]
    working_set: int
    buffer_bytes: int
    residency: float
    policy: str
    prefetch: str  # the controller's last word
    resident_s: float | None = None
    belady: Hits | None = None

    @property
    def counts(self) -> ExpertCounts:
        """Of all runs together."""
        return sum((counts for counts, _ in self.runs), ExpertCounts())

    @property
    def seconds(self) -> float:
        """Of all runs together."""
        return sum(seconds for _, seconds in self.runs)

    @property
    def n_tokens(self) -> int:
        """Of all runs together."""
        return len(self.runs) * self.run_tokens

    @property
    def flash_bytes_per_s(self) -> float:
        """Median of the measurements."""
        return statistics.median(self.flash)

    @property
    def needed(self) -> float:
        """Bytes a token that the policy had not kept: all that was read but what was read in vain."""
        return _needed(self.counts) / self.n_tokens

    @property
    def kept(self) -> float:
        """Share of the bytes asked for that the policy had kept, whatever was read ahead."""
        return max(0.0, 1.0 - self.needed / self.working_set)

    @property
    def compute_s(self) -> float:
        """Seconds a token of arithmetic: measured with all experts in RAM, or else those in which nothing waited."""
        if self.resident_s is not None:
            return self.resident_s
        return statistics.median((seconds - counts.flash_wait_s) / self.run_tokens for counts, seconds in self.runs)

    def bounds_s(self) -> list[float]:
        """Seconds that a token of each run takes at least, at the flash's rate around it: that moves fast."""
        rates = [(before + after) / 2 for before, after in pairwise(self.flash)]
        reading = [_needed(counts) / self.run_tokens / rate for (counts, _), rate in zip(self.runs, rates, strict=True)]
        return [max(self.compute_s, seconds) for seconds in reading]

    def as_json(self, *, decoding: bool) -> dict[str, Any]:
        """Plain values, of which those of speed are medians. decoding: whether the tokens came one by one."""
        counts, bounds = self.counts, self.bounds_s()
        each = [seconds / self.run_tokens for _, seconds in self.runs]
        found = {
            "tokens_per_s": 1 / statistics.median(each),
            "hit_rate": counts.hit_rate,
            "bytes_per_token": counts.bytes_read / self.n_tokens,
            "needed_bytes_per_token": self.needed,
            "flash_bytes_per_s": self.flash_bytes_per_s,
            "flash_measured_bytes_per_s": list(self.flash),
            "flash_used_bytes_per_s": counts.bytes_read / counts.flash_busy_s if counts.flash_busy_s else None,
            "flash_busy_share": counts.flash_busy_s / self.seconds,
            "flash_idle_share": max(0.0, 1 - counts.flash_busy_s / self.seconds),
            "flash_wait_share": counts.flash_wait_s / self.seconds,
            "compute_s_per_token": self.compute_s,
            "compute_measured": "resident" if self.resident_s is not None else "not waiting",
            "bound_s_per_token": statistics.median(bounds),
            "bound_tokens_per_s": 1 / statistics.median(bounds),
            "bound_share": statistics.median(bound / seconds for bound, seconds in zip(bounds, each, strict=True)),
            "residency": self.residency,
            "buffer_bytes": self.buffer_bytes,
            "working_set": self.working_set,
            "policy": self.policy,
            "prefetch": {
                "useful_bytes": counts.prefetch_useful,
                "late_bytes": counts.prefetch_late,
                "wasted_bytes": counts.prefetch_wasted,
                "evicted_bytes": counts.prefetch_evicted,
                "word": self.prefetch,
            },
        }
        if decoding:
            found["kept_rate"] = self.kept
        if self.belady is not None:
            found |= {"belady_rate": self.belady.byte_rate, "regret": self.belady.byte_rate - self.kept}
        return found


def _needed(counts: ExpertCounts) -> int:
    return max(0, counts.bytes_read - counts.prefetch_wasted - counts.prefetch_evicted)

"""How far a long work is: its speed and the time left, a few times a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from edgert.weights import Progress

_REPORT_S = 0.1  # between two reports
_RATE_S, _FIRST_S = 10.0, 1.0  # what the rate is measured over, and how long before the first is told


def megabytes(rate: float) -> str:
    """A speed in bytes a second, for a person."""
    return f"{rate / 1e6:,.0f} MB/s"


class Meter:
    """Tells how far a work over many bytes or other units is, a few times a second, with its speed and the time left.

    speed: words for so many units a second.
    """

    def __init__(
        self, progress: Progress, doing: str, total: int, done: int = 0, *, speed: Callable[[float], str] = megabytes
    ) -> None:
        self._speed = speed
        self._progress, self._doing, self._total, self._done = progress, doing, max(total, 1), done
        self._seen = deque([(time.perf_counter(), done)])  # over the last seconds

    def add(self, n_units: int, words: str) -> None:
        """So many units more, of what `words` says."""
        self._done += n_units
        now = time.perf_counter()
        if now - self._seen[-1][0] < _REPORT_S:
            return
        self._seen.append((now, self._done))
        while now - self._seen[0][0] > _RATE_S and len(self._seen) > 2:
            self._seen.popleft()
        seconds, stage = now - self._seen[0][0], f"{self._doing}: {words}"
        if seconds >= _FIRST_S and self._done > self._seen[0][1]:
            rate = (self._done - self._seen[0][1]) / seconds
            stage += f", {self._speed(rate)}, {duration((self._total - self._done) / rate)} left"
        self._progress(stage, self._done / self._total)


def duration(seconds: float) -> str:
    """So many seconds for a person: 8 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

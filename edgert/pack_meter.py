"""How far a long work over bytes is: its speed and the time left, a few times a second."""

from __future__ import annotations

import time
from collections import deque

from edgert.weights import Progress

_REPORT_S = 0.1  # between two reports
_RATE_S, _FIRST_S = 10.0, 1.0  # what the rate is measured over, and how long before the first is told


class Meter:
    """Tells how far a work over many bytes is, a few times a second, with its speed and the time left."""

    def __init__(self, progress: Progress, doing: str, total: int, done: int = 0) -> None:
        self._progress, self._doing, self._total, self._done = progress, doing, max(total, 1), done
        self._seen = deque([(time.perf_counter(), done)])  # over the last seconds

    def add(self, n_bytes: int, words: str) -> None:
        """So many bytes more, of what `words` says."""
        self._done += n_bytes
        now = time.perf_counter()
        if now - self._seen[-1][0] < _REPORT_S:
            return
        self._seen.append((now, self._done))
        while now - self._seen[0][0] > _RATE_S and len(self._seen) > 2:
            self._seen.popleft()
        seconds, stage = now - self._seen[0][0], f"{self._doing}: {words}"
        if seconds >= _FIRST_S:
            rate = (self._done - self._seen[0][1]) / seconds
            stage += f", {rate / 1e6:,.0f} MB/s, {duration((self._total - self._done) / max(rate, 1))} left"
        self._progress(stage, self._done / self._total)


def duration(seconds: float) -> str:
    """So many seconds for a person: 8 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

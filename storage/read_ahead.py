"""Work done ahead by a few threads and given out in order: reading, while what was read before is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(jobs: Iterable[Callable[[], T]], *, n_threads: int = 2, n_ahead: int = 8) -> Generator[T, None, None]:
    """What the jobs give, in their order; an error is raised in its job's place, and no further job is begun then.

    Two threads, because one alone leaves the drive idle half of the time. n_ahead: jobs under way or done, whose
    results are held in memory.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(n_threads, "edgert-read") as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) >= n_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

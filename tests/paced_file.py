"""A file whose reads take their time, wait or fail as a test says, and reads of it whose bytes are known."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgert.storage.flash import ALIGNMENT, FlashFile, aligned_buffer
from edgert.storage.reader import Arrival, Read, Reader

N_BLOCKS = 256
DATA = np.random.default_rng(1).integers(0, 256, N_BLOCKS * ALIGNMENT, dtype=np.uint8)


def write(path: Path) -> Path:
    """A file of DATA."""
    path.write_bytes(DATA.tobytes())
    return path


class Paced(FlashFile):
    """A file whose reads take the times in `delays_s` in turn, fail in the blocks in `broken`, or wait for `gate`."""

    def __init__(self, path: Path, delays_s: tuple[float, ...] = (), broken: frozenset[int] = frozenset()) -> None:
        super().__init__(path)
        self.delays_s, self.broken = delays_s, broken
        self.gate: threading.Semaphore | None = None
        self.begun: list[tuple[int, int]] = []  # offset and size in blocks of each piece, as lanes took them
        self.n_running = self.most_running = 0
        self._lock = threading.Lock()

    def _preadv(self, view: memoryview, offset: int) -> int:
        with self._lock:
            self.begun.append((offset // ALIGNMENT, len(view) // ALIGNMENT))
            number = len(self.begun)
            self.n_running += 1
            self.most_running = max(self.most_running, self.n_running)
        try:
            if self.gate is not None:
                assert self.gate.acquire(timeout=60)
            if self.delays_s:
                time.sleep(self.delays_s[number % len(self.delays_s)])
            if self.broken.intersection(range(offset // ALIGNMENT, (offset + len(view)) // ALIGNMENT)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super()._preadv(view, offset)
        finally:
            with self._lock:
                self.n_running -= 1


def make(first: int, n_blocks: int, *marks: int, urgent: bool = True, key: int = 0) -> Read:
    """A read of whole blocks into a new buffer."""
    size = n_blocks * ALIGNMENT
    return Read(key, first * ALIGNMENT, aligned_buffer(size), (*marks, size), urgent)


def right(read: Read, n_bytes: int | None = None) -> bool:
    """Whether the first bytes of a read are what the file has there."""
    n_bytes = len(read.buffer) if n_bytes is None else n_bytes
    return bool((read.buffer[:n_bytes] == DATA[read.offset : read.offset + n_bytes]).all())


def finish(reader: Reader) -> list[Arrival]:
    """All arrivals until nothing is under way."""
    arrivals = []
    while reader.pending:
        arrivals += reader.wait(60)
    assert reader.poll() == [] and reader.wait() == []
    return arrivals


def until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")

"""The expert buffer: one stretch of memory in which records of any size get places, none of it lost to fragments.

Records of one size fill it like slots. Of mixed sizes, a record may find enough bytes free but not side by side: then
others between two gaps are moved together. Its end can be given back to the system, and taken again. What lies at a
place, and what should leave, is not known here.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgert.storage.flash import aligned_buffer

ALIGNMENT = 4096  # of every place, and of every size


class Slots:
    """Places in a buffer of n_bytes, of which `limit` may be in use."""

    def __init__(self, n_bytes: int) -> None:
        assert n_bytes % ALIGNMENT == 0, n_bytes
        self.memory: npt.NDArray[np.uint8] = aligned_buffer(n_bytes)
        self.limit = n_bytes
        self._gaps: list[tuple[int, int]] = []  # (start, size), ascending, never touching
        self.keep({})

    @property
    def free_bytes(self) -> int:
        """Bytes that hold nothing."""
        return sum(size for _, size in self._gaps)

    def at(self, start: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """The bytes of a place."""
        return self.memory[start : start + n_bytes]

    def take(self, n_bytes: int) -> int | None:
        """The start of a place of that size, from the smallest gap that holds it; None if none does."""
        best = min((gap for gap in self._gaps if gap[1] >= n_bytes), key=lambda gap: gap[1], default=None)
        if best is None:
            return None
        place = self._gaps.index(best)
        if best[1] == n_bytes:
            del self._gaps[place]
        else:
            self._gaps[place] = best[0] + n_bytes, best[1] - n_bytes
        return best[0]

    def give_back(self, start: int, n_bytes: int) -> None:
        """A place is empty again; what of it lies beyond the limit stays out of use."""
        n_bytes = min(start + n_bytes, self.limit) - start
        if n_bytes <= 0:
            return
        at = bisect.bisect(self._gaps, (start, 0))
        if at < len(self._gaps) and start + n_bytes == self._gaps[at][0]:
            n_bytes += self._gaps.pop(at)[1]
        if at and sum(self._gaps[at - 1]) == start:
            at -= 1
            start, before = self._gaps.pop(at)
            n_bytes += before
        self._gaps.insert(at, (start, n_bytes))

    def keep(self, places: Mapping[int, int]) -> None:
        """Begin anew with these places taken, sizes by starts, and all else empty."""
        gaps, end = [], 0
        for start in [*sorted(places), self.limit]:
            if start > end:
                gaps.append((end, start - end))
            end = start + places.get(start, 0)
        self._gaps = gaps

    def join_gaps(
        self, n_bytes: int, movable: Mapping[int, int], moved: Callable[[int, int], None], most_bytes: int
    ) -> bool:
        """Move records together until a gap of n_bytes is there; False if that takes moving more than most_bytes.

        movable: size by start of the records that may be moved; moved(old, new) is called after each move. Of the
        stretches of gaps and movable records that hold enough, the one with the fewest bytes to move is taken.
        """
        stretch = self._cheapest_stretch(n_bytes, movable, most_bytes)
        if stretch is None:
            return False
        start, end = stretch
        records = sorted((at, size) for at, size in movable.items() if start <= at < end)
        self._gaps = [gap for gap in self._gaps if not start <= gap[0] < end]
        to, base = start, self.memory.ctypes.data
        for at, size in records:
            if at != to:
                ctypes.memmove(base + to, base + at, size)
                moved(at, to)
            to += size
        self.give_back(to, end - to)
        return True

    def _cheapest_stretch(self, n_bytes: int, movable: Mapping[int, int], most_bytes: int) -> tuple[int, int] | None:
        best: tuple[int, int, int] | None = None  # bytes to move, start, end
        for place, (start, size) in enumerate(self._gaps):
            free, to_move, end = size, 0, start + size
            for gap_start, gap_size in self._gaps[place + 1 :]:
                while end in movable and end < gap_start:
                    to_move, end = to_move + movable[end], end + movable[end]
                if end != gap_start or to_move > most_bytes:
                    break
                free, end = free + gap_size, gap_start + gap_size
                if free >= n_bytes:
                    break
            if free >= n_bytes and (best is None or to_move < best[0]):
                best = to_move, start, end
        return None if best is None else best[1:]

    def set_limit(self, n_bytes: int) -> None:
        """Use only the first n_bytes from now on; nothing may lie beyond them. The rest goes back to the system."""
        assert n_bytes % ALIGNMENT == 0 and 0 <= n_bytes <= len(self.memory), n_bytes
        old, self.limit = self.limit, n_bytes
        if n_bytes > old:
            self.give_back(old, n_bytes - old)
            return
        self._gaps = [(start, min(start + size, n_bytes) - start) for start, size in self._gaps if start < n_bytes]
        _release(self.memory[n_bytes:])

    def check(self, places: Mapping[int, int]) -> list[str]:
        """What is wrong, given the records' sizes by their starts; empty if nothing is."""
        stretches = sorted([*self._gaps, *places.items()])
        wrong, end = [], 0
        for start, size in stretches:
            if start != end:
                wrong.append(f"the expert buffer has {start - end} bytes before {start} that are lost or used twice")
            end = start + size
        if end != self.limit and stretches:
            wrong.append(f"the expert buffer ends at {end}, not {self.limit}")
        return wrong


def _release(memory: npt.NDArray[np.uint8]) -> None:
    """Give whole pages back to the system; they read as zeros afterwards."""
    start = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (memory.ctypes.data + len(memory)) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED))

"""The 64-bit checksum of everything in a bundle: as fast as memory is read, and changed by any single flipped bit.

The bytes are pages of 4,096, a page rows of 8 words of 64 bits, zeros added up to a whole row. Each of the 8 lanes of a
page begins with a number made from the page's index, takes its words one after the other (exclusive-or, rotate,
multiply by an odd number) and is multiplied by an odd number of its own; the checksum is the sum of all. Every step is
reversible, so damage within one lane of one page is always seen, all other damage but for one chance in 2**64. Pages do
not depend on each other: NumPy takes them side by side. It finds damage, not malice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant.jit import JIT_ENABLED, inner, kernel
from edgert.quant.records import at

PAGE = 4096  # bytes
_ROW, _LANES, _PAGE_ROWS = 64, 8, 64
_SLOW_PAGES = 256  # that NumPy takes at a time
# Bundles on disk hold sums made with these.
_STATE = np.random.SeedSequence(0x6564_6765).generate_state(2 * _LANES, np.uint64)
_SEEDS, _ODD = _STATE[:_LANES], _STATE[_LANES:] | np.uint64(1)
_PRIME, _GOLDEN = np.uint64(0x9E37_79B1_85EB_CA87), np.uint64(0x9E37_79B9_7F4A_7C15)
_LEFT, _RIGHT, _HALF, _ONE = np.uint64(29), np.uint64(35), np.uint64(32), np.uint64(1)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7 = _SEEDS
_B0, _B1, _B2, _B3, _B4, _B5, _B6, _B7 = _ODD
_WORDS = np.dtype([(f"w{lane}", np.uint64) for lane in range(_LANES)])
_TOTAL = np.dtype([("value", np.uint64)])


@kernel
def _take(lane: Any, word: Any) -> Any:
    """A lane, or lanes, after one more word."""
    mixed = lane ^ word
    return ((mixed << _LEFT) | (mixed >> _RIGHT)) * _PRIME


@kernel
def _end(lane: Any, odd: Any) -> Any:
    """What a lane, or lanes, add to the sum."""
    return (lane ^ (lane >> _HALF)) * odd


@inner
def _begin(index: Any) -> Any:
    """The lanes of page number `index`, counted from 1."""
    start = index * _GOLDEN
    return (
        *(_A0 ^ start, _A1 ^ start, _A2 ^ start, _A3 ^ start),
        *(_A4 ^ start, _A5 ^ start, _A6 ^ start, _A7 ^ start),
    )


@inner
def _mix(h: Any, row: int) -> Any:
    """Lanes after the row at an address."""
    x = at(row, _WORDS)
    return (
        *(_take(h[0], x.w0), _take(h[1], x.w1), _take(h[2], x.w2), _take(h[3], x.w3)),
        *(_take(h[4], x.w4), _take(h[5], x.w5), _take(h[6], x.w6), _take(h[7], x.w7)),
    )


@inner
def _sum(h: Any) -> Any:
    """What the lanes of a page add to the sum."""
    found = _end(h[0], _B0) + _end(h[1], _B1) + _end(h[2], _B2) + _end(h[3], _B3)
    return found + _end(h[4], _B4) + _end(h[5], _B5) + _end(h[6], _B6) + _end(h[7], _B7)


@kernel
def _add(data: int, n_rows: int, first_page: int, total: int) -> None:
    """Add rows to a sum, from the beginning of a page on.

    Two pages at a time, 1.45 times as fast from memory as one: that makes two streams for the CPU to fetch ahead.
    """
    found, index, first = np.uint64(0), np.uint64(first_page), 0
    while first < n_rows:
        here = data + _ROW * first
        a, b = _begin(index + _ONE), _begin(index + _ONE + _ONE)
        if first + 2 * _PAGE_ROWS <= n_rows:
            for row in range(here, here + PAGE, _ROW):
                a, b = _mix(a, row), _mix(b, row + PAGE)
            found += _sum(b)
            first += _PAGE_ROWS
            index += _ONE
        else:
            for row in range(here, min(here + PAGE, data + _ROW * n_rows), _ROW):
                a = _mix(a, row)
        found += _sum(a)
        first += _PAGE_ROWS
        index += _ONE
    at(total, _TOTAL).value += found


def _pages(words: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The same in NumPy for pages (n_pages, n_rows, 8) of these numbers, counted from 1: what each adds, (n_pages,)."""
    lanes = _SEEDS ^ (index * _GOLDEN)[:, None]
    for row in range(words.shape[1]):
        lanes = _slow_take(lanes, words[:, row])
    return _slow_end(lanes, _ODD).sum(axis=1, dtype=np.uint64)


_slow_take, _slow_end = (getattr(compiled, "py_func", compiled) for compiled in (_take, _end))


class Checksum:
    """A checksum over bytes that come in pieces; every piece but the last is a multiple of 4,096 bytes."""

    def __init__(self) -> None:
        self._total, self._n_pages = np.zeros(1, np.uint64), 0

    def update(self, data: npt.NDArray[np.uint8]) -> None:
        """Add bytes, uint8 (n,), contiguous."""
        assert data.dtype == np.uint8 and data.ndim == 1 and data.flags.c_contiguous
        whole = data.size // PAGE * PAGE
        self._add(data[:whole])
        if whole < data.size:
            last = np.zeros(-(-(data.size - whole) // _ROW) * _ROW, np.uint8)
            last[: data.size - whole] = data[whole:]
            self._add(last)

    def _add(self, data: npt.NDArray[np.uint8]) -> None:
        """Add whole pages, or less than one."""
        n_rows = data.size // _ROW
        if JIT_ENABLED and n_rows:
            _add(data.ctypes.data, n_rows, self._n_pages, self._total.ctypes.data)
        elif n_rows:
            pages = data.view(np.uint64).reshape(-1, min(n_rows, _PAGE_ROWS), _LANES)
            for first in range(0, len(pages), _SLOW_PAGES):
                some = pages[first : first + _SLOW_PAGES]
                index = np.arange(len(some), dtype=np.uint64) + np.uint64(self._n_pages + first + 1)
                self._total += _pages(some, index).sum(dtype=np.uint64)
        self._n_pages += -(-n_rows // _PAGE_ROWS)

    def value(self) -> int:
        """The checksum of all that came, from 0 to 2**64 - 1."""
        return int(self._total[0])


def checksum(data: npt.NDArray[np.uint8]) -> int:
    """The checksum of bytes, uint8 (n,), contiguous: from 0 to 2**64 - 1."""
    whole = Checksum()
    whole.update(data)
    return whole.value()


def checksum_rows(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The checksum of each row of uint8 (n_rows, n_bytes), n_bytes a multiple of 64: uint64 (n_rows,)."""
    total = np.zeros(len(rows), np.uint64)
    for first in range(0, rows.shape[1], PAGE):
        page = np.ascontiguousarray(rows[:, first : first + PAGE]).view(np.uint64).reshape(len(rows), -1, _LANES)
        total += _pages(page, np.full(len(rows), first // PAGE + 1, np.uint64))
    return total


def kernels() -> list[tuple[Any, int]]:
    """What is compiled for a checksum, with the number of integers that it takes."""
    return [(_add, 4)]

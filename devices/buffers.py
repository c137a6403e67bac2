"""Memory for compiled code: aligned buffers, and rows of activations as floats and as int8.

Everything here is allocated once, when a model is loaded; what kernels write into it is theirs.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import GROUP
from edgert.quant.matmul import ROWS
from edgert.quant.tile_kernels import GROUP_BYTES
from edgert.types import Floats

_HUGE_PAGE, _PIECE_BYTES = 2 << 20, 256 << 20
SPARE_ROWS = 8  # behind the last row of a buffer: blocks of rows are written whole


def aligned(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes on a 64-byte boundary, with 64 readable ones behind them."""
    buffer = np.zeros(n_bytes + 128, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n_bytes]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Arena:
    """Memory for weights, zeroed, taken from large pieces that lie in huge pages where the system has them.

    A token reads nearly all of the hot weights and some of the experts: with pages of 4 KiB the search for pages takes
    part of the time.
    """

    def __init__(self) -> None:
        self._piece, self._used = np.zeros(0, np.uint8), 0

    def take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes on a 64-byte boundary; they live as long as the array."""
        start = round_up(self._used, 64)
        if start + n_bytes > len(self._piece):
            self._piece, start = huge_pages(max(n_bytes, _PIECE_BYTES)), 0
        self._used = start + n_bytes
        return self._piece[start : start + n_bytes]


def unused_bytes(n_bytes: int) -> int:
    """Most bytes that an arena's pages hold beside n_bytes of weights: each piece ends within a huge page."""
    return _HUGE_PAGE * (n_bytes // _PIECE_BYTES + 2)


def huge_pages(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes that begin where a huge page may."""
    try:
        memory = mmap.mmap(-1, n_bytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes for weights: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return whole[start : start + n_bytes]


class Rows:
    """Rows of activations: floats, and the same quantised."""

    def __init__(self, n_rows: int, n_columns: int, *, quantised: bool = False, floats: bool = True) -> None:
        self.stride = round_up(n_columns, 64)
        group_stride = self.stride // 32 * GROUP_BYTES if quantised else 0
        rows = n_rows + SPARE_ROWS
        self.floats = (
            aligned(4 * rows * self.stride if floats else 0)
            .view(np.float32)
            .reshape(rows if floats else 0, self.stride)
        )
        self._groups = aligned(rows * group_stride)
        self.address = self.floats.ctypes.data
        self.record = np.array([(self.address, self.stride, self._groups.ctypes.data, group_stride)], ROWS)

    def dequantised(self, n_rows: int) -> Floats:
        """What the integers of the first rows stand for, (n_rows, stride)."""
        groups = self._groups[: n_rows * self.stride // GROUP * GROUP_BYTES].reshape(-1, GROUP_BYTES)
        integers, scales = groups[:, :GROUP].view(np.int8), groups[:, GROUP : GROUP + 4].copy().view(np.float32)
        floats: Floats = (integers * scales).reshape(n_rows, self.stride)
        return floats

"""How fast products of packed matrices with rows go here: the kernels themselves, over memory that is full of matrices.

A loop of nothing but dot products says less: what kernels reach of it moves by a factor of two with the processor and
with what shares it. Knows matrices and threads, nothing of models.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgert.devices.buffers import SPARE_ROWS, aligned, round_up
from edgert.devices.feed_forward import PARTS_BYTES
from edgert.devices.threads import ThreadPool, meet
from edgert.quant import matmul
from edgert.quant.formats import PackedPart
from edgert.quant.jit import kernel
from edgert.quant.matmul import MATRIX, ROWS, matrix_record, multiply_blocks, multiply_row, put_rows, rows_at_once
from edgert.quant.records import address_of, at, record
from edgert.quant.tile_kernels import GROUP_BYTES
from edgert.types import Floats

# `n_turns` products, the matrices (MATRIX, side by side) one after the other, with the same rows (address of ROWS).
PRODUCTS = record("matrices n_matrices rows n_rows n_turns scratch scratch_bytes")
_FILL = 0x3C  # each byte: as a half float, float or power of two a number that neither vanishes nor overflows
_UNIT, _ROW_UNIT = 2, 64  # tiles at a time, with several rows and with one, as feed_forward.py does
_MATRIX = MATRIX.itemsize


class Products:
    """Matrices of one format and shape, as many as `memory` holds, each to be multiplied with the same n_rows rows.

    `memory` has been filled by fill().
    """

    def __init__(self, part: PackedPart, n_rows: int, memory: npt.NDArray[np.uint8], n_threads: int) -> None:
        """part: a matrix, where it lies does not matter. UnsupportedError where the kernels cannot take it."""
        n_in, n_bytes = part.shape[1], round_up(part.n_bytes, 64)
        self.n_matrices = len(memory) // n_bytes
        assert self.n_matrices, "the memory holds not one of the matrices"
        one = matrix_record(part, memory.ctypes.data, quantised=True, several=n_rows > 1)
        self._matrices = np.repeat(one, self.n_matrices)
        self._matrices["address"] += np.arange(self.n_matrices) * n_bytes
        stride, rows = round_up(n_in, 64), n_rows + SPARE_ROWS
        groups = stride // 32 * GROUP_BYTES
        self._floats, self._groups = aligned(4 * rows * stride), aligned(rows * groups)
        for buffer in (self._floats, self._groups):
            fill(buffer)
        self._rows = np.array([(self._floats.ctypes.data, stride, self._groups.ctypes.data, groups)], ROWS)
        scratch = round_up(PARTS_BYTES + matmul.scratch_bytes(n_in), 64)
        self._scratch = aligned(n_threads * scratch)
        fields = (self._matrices.ctypes.data, self.n_matrices, self._rows.ctypes.data, n_rows, 1)
        self._argument = np.array([(*fields, self._scratch.ctypes.data, scratch)], PRODUCTS)

    def outputs(self) -> Floats:
        """Of the last tile that each thread multiplied with one row at least, (n_threads, 16)."""
        parts = self._scratch.reshape(-1, self._argument["scratch_bytes"][0])[:, :64]
        return parts.copy().view(np.float32)

    def run(self, pool: ThreadPool, n_turns: int) -> None:
        """Multiply n_turns matrices, beginning again with the first where there are fewer."""
        self._argument["n_turns"] = n_turns
        pool.run(address_of(multiply_all, 4), self._argument.ctypes.data)


def fill(memory: npt.NDArray[np.uint8]) -> None:
    """Make bytes such that any format's kernels compute with usual numbers, and that their pages are there."""
    memory[:] = _FILL


@kernel
def multiply_all(thread: int, n_threads: int, barrier: int, argument: int) -> None:
    """Products of PRODUCTS; a thread owns columns, others in each turn so that no thread has the larger share."""
    task = at(argument, PRODUCTS)
    parts = task.scratch + thread * task.scratch_bytes
    blocks = parts + PARTS_BYTES
    for turn in range(task.n_turns):
        matrix = task.matrices + turn % task.n_matrices * _MATRIX
        n_tiles, share = (at(matrix, MATRIX).n_out + 15) // 16, (thread + turn) % n_threads
        first, last = n_tiles * share // n_threads, n_tiles * (share + 1) // n_threads
        if task.n_rows == 1:
            for tile in range(first, last, _ROW_UNIT):
                multiply_row(matrix, task.rows, 0, tile, min(_ROW_UNIT, last - tile), parts, 0)
            continue
        step = rows_at_once(matrix)
        for done in range(0, task.n_rows, step):
            count = min(step, task.n_rows - done)
            put_rows(matrix, task.rows, 0, done, count, blocks)
            for tile in range(first, last, _UNIT):
                multiply_blocks(matrix, blocks, count, tile, min(_UNIT, last - tile), parts, 32, 0)
        meet(barrier, n_threads)  # the slower thread counts, as between the parts of a layer
    meet(barrier, n_threads)

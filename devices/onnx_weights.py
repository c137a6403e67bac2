"""Matrices as ONNX graphs take them: integers and scales of MatMulNBits carry over, everything else becomes float32.

MatMulNBits multiplies with scale * (integer - middle), in 4 or 8 bits with one scale a block; what a format has beside
that, its minima, becomes a correction by the sums of the inputs of each block. Tables and bits between go into 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import TILE_ROWS, Format, Matrix, MatrixSource
from edgert.quant.unpacking import unpack
from edgert.types import Floats, Ids

_SLAB = 1 << 22  # weights that are unpacked at a time


@dataclass(frozen=True)
class BlockWeights:
    """A matrix (n_out, n_in) for MatMulNBits.

    integers: uint8 (n_out, n_in / block, block * bits / 8), low nibble first; scales: float32 (n_out, n_in / block);
    minima: likewise, added for each unit of the block's input, or None.
    """

    bits: int
    block: int
    integers: npt.NDArray[np.uint8]
    scales: Floats
    minima: Floats | None


def stored_bits(format: Format) -> int:
    """Bits of an integer format's weights in MatMulNBits, 4 or 8; 32 for floats."""
    if not format.is_integer:
        return 32
    return 4 if format.bits <= 4 and not format.table else 8


def floats(source: MatrixSource, rows: Ids | None = None) -> Floats:
    """The weights, float32 (n_out, n_in), of `rows` in that order."""
    out = np.empty(source.shape, np.float32)
    for first, matrix in _slabs(source):
        out[first : first + matrix.shape[0]] = matrix.to_float()
    return out if rows is None else out[rows]


def blocks(source: MatrixSource, rows: Ids | None = None) -> BlockWeights:
    """An integer format's weights for MatMulNBits, `rows` of it in that order."""
    (n_out, n_in), format = source.shape, source.format
    bits, n_blocks = stored_bits(format), n_in // format.group
    integers = np.empty((n_out, n_blocks, format.group * bits // 8), np.uint8)
    scales = np.empty((n_out, n_blocks), np.float32)
    minima = np.empty((n_out, n_blocks), np.float32) if format.has_minimum else None
    for first, matrix in _slabs(source):
        part = slice(first, first + matrix.shape[0])
        scales[part] = matrix.float_scales()
        values, centre = _centred(matrix, bits)
        if minima is not None:
            own = matrix.float_minima()
            assert own is not None
            minima[part] = own + centre * scales[part]
        if bits == 4:
            values = values[:, 0::2] | values[:, 1::2] << np.uint8(4)
        integers[part] = values.reshape(-1, *integers.shape[1:])
    if rows is not None:
        integers, scales, minima = integers[rows], scales[rows], None if minima is None else minima[rows]
    return BlockWeights(bits, format.group, integers, scales, minima)


def _centred(matrix: Matrix, bits: int) -> tuple[npt.NDArray[np.uint8], np.float32]:
    """Stored integers, uint8 (n_out, n_in), and what was taken off those of a format with minima to centre them.

    Inputs may be rounded to 8 bits: what integers far from the middle would add and minima take away again would be
    noise.
    """
    format, middle = matrix.format, 1 << (bits - 1)
    centre = 1 << (format.bits - 1) if format.has_minimum else 0
    moved = matrix.integers() + np.int16(middle - centre)
    assert 0 <= moved.min(initial=0) and moved.max(initial=0) < 1 << bits, format.name
    return moved.astype(np.uint8), np.float32(centre)


def _slabs(source: MatrixSource) -> Iterator[tuple[int, Matrix]]:
    """(first row, matrix) of some rows at a time: unpacked they take far more than packed."""
    (n_out, n_in), format = source.shape, source.format
    tiles: Any = np.empty(format.matrix_bytes(n_out, n_in), np.uint8)
    source.pack(tiles)
    step = max(_SLAB // n_in // TILE_ROWS, 1) * TILE_ROWS
    for first in range(0, n_out, step):
        count = min(step, n_out - first)
        start = first // TILE_ROWS * format.tile_bytes(n_in)
        part = tiles[start : start + format.matrix_bytes(count, n_in)]
        yield first, unpack(part, format, (count, n_in))


def half_split(n_heads: int, d_head: int, n_rotated: int) -> Ids:
    """Rows of a projection by which "norm" rotation becomes "neox": the pairs (2i, 2i + 1) become (i, i + n/2).

    Done to queries and keys alike, it leaves their products as they are.
    """
    within = np.arange(d_head)
    within[:n_rotated] = np.concatenate((np.arange(0, n_rotated, 2), np.arange(1, n_rotated, 2)))
    return (np.arange(n_heads)[:, None] * d_head + within).reshape(-1)

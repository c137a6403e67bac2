"""Products of packed matrices with rows of activations: which kernel takes how many rows, and rows put into blocks.

One row goes as it is to the format's kernel for one row (GEMV). Several are put side by side, in blocks of 8 and 4, so
that each weight is unpacked once for all of them (GEMM). Either way a row's result is the same to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.errors import UnsupportedError
from edgert.quant import tile_kernels
from edgert.quant.formats import FORMATS, Format, MatrixSource, PackedPart
from edgert.quant.jit import inner
from edgert.quant.records import address_of, at, call, record
from edgert.quant.simd_memory import load_float, load_int, move32, store_float, store_int
from edgert.quant.tile_kernels import GROUP_BYTES, tile_kernel

# A packed matrix. `kernel8` to `kernel1` are addresses of tile kernels; `offset` is the format's, `halves` whether its
# groups are of 16; `bias` is the address of float32s, or 0.
MATRIX = record("address n_out n_in tile_bytes bias floats offset has_minimum halves kernel8 kernel4 kernel1")
# Rows of activations: floats, `stride` of them a row, and (for matrices whose `floats` is 0) the same as int8 in groups
# of 32, each group with its scale and the sums of its halves: a row of them is a block of one row of a tile kernel.
ROWS = record("floats stride groups group_stride")
BLOCK_ROWS = 64  # rows that are put into blocks at a time: they should stay in the second-level cache
_BLOCK_BYTES = 1 << 18


def matrix_record(
    source: MatrixSource | PackedPart, address: int, *, quantised: bool, bias: int = 0, several: bool = True
) -> npt.NDArray[Any]:
    """MATRIX (1,) of a matrix that was packed to `address`; compiles the kernels of its format.

    quantised: whether rows come as int8 where the format can use them. several: whether ever more than one row comes.
    Raises UnsupportedError where the kernels cannot take the format or the shape.
    """
    format, (n_out, n_in) = source.format, source.shape
    if FORMATS.get(format.name) != format:
        raise UnsupportedError(f"{format} is not one of the formats that there are kernels for")
    if n_out < 1 or n_in < 1 or n_in % format.block:
        raise UnsupportedError(
            f"a matrix of {n_out} x {n_in} in {format.name}: columns must be a multiple of {format.block}, not {n_in}"
        )
    floats = not (quantised and format.is_integer)
    kernels = [
        address_of(tile_kernel(format.name, rows, not floats), 8) if several or rows == 1 else 0
        for rows in tile_kernels.ROWS
    ]
    offset = tile_kernels.offset(format)
    fields = (address, n_out, n_in, format.tile_bytes(n_in), bias, floats, offset, format.has_minimum)
    return np.array([(*fields, format.group == 16, *kernels)], MATRIX)


def compiled_kernels(format: Format, quantised: bool) -> list[Any]:
    """The kernels that a matrix of this format needs, compiled or not."""
    return [tile_kernel(format.name, rows, quantised and format.is_integer) for rows in tile_kernels.ROWS]


def scratch_bytes(n_in: int) -> int:
    """Bytes that blocks of rows of at most `n_in` columns take."""
    return max(_BLOCK_BYTES, 8 * 4 * n_in) + 64


@inner
def _put_integers(
    source: int, place: int, rows: int, n_groups: int, offset: int, has_minimum: int, halves: int, out: int
) -> None:
    """One quantised row as row `place` of a block of `rows`; source 0 stands for a row of zeros."""
    for group in range(n_groups):
        to = out + group * rows * GROUP_BYTES
        numbers = to + rows * 32 + 4 * place
        if source == 0:
            for i in range(0, 32, 4):
                store_int(to + 32 * place + i, np.int32(0))
            for i in range(3):
                store_int(numbers + 4 * rows * i, np.int32(0))
            continue
        at = source + group * GROUP_BYTES
        move32(to + 32 * place, at)
        scale, first, second = load_float(at + 32), load_int(at + 36), load_int(at + 40)
        store_float(numbers, scale)
        if not halves:
            first += second
        if has_minimum:
            store_float(numbers + 4 * rows, scale * np.float32(first))
            store_float(numbers + 8 * rows, scale * np.float32(second))
        else:
            store_int(numbers + 4 * rows, np.int32(-offset) * first)
            store_int(numbers + 8 * rows, np.int32(-offset) * second)


@inner
def put_block(matrix: int, rows: int, row_ids: int, first: int, count: int, size: int, out: int) -> None:
    """Put `count` rows into a block of `size` rows at `out`, the missing ones zero.

    matrix: address of the MATRIX that they are for; rows: of ROWS. Rows are number first, first + 1, ..., or those
    whose numbers (int64) lie at row_ids + 8 * first and behind.
    """
    m, r = at(matrix, MATRIX), at(rows, ROWS)
    for place in range(size):
        source = 0
        if place < count:
            row = first + place
            if row_ids:
                row = np.int64(load_int(row_ids + 8 * row))
            if m.floats:
                source = r.floats + 4 * row * r.stride
            else:
                source = r.groups + row * r.group_stride
        if not m.floats:
            _put_integers(source, place, size, m.n_in // 32, m.offset, m.has_minimum, m.halves, out)
        else:
            for column in range(m.n_in):
                value = np.float32(0)
                if source:
                    value = load_float(source + 4 * column)
                store_float(out + 4 * (column * size + place), value)


@inner
def row_bytes(matrix: int) -> int:
    """Bytes of one row in a block for a matrix (address of MATRIX)."""
    m = at(matrix, MATRIX)
    return m.n_in * 4 if m.floats else m.n_in // 32 * GROUP_BYTES


@inner
def rows_at_once(matrix: int) -> int:
    """Most rows that are put into blocks at a time: whole blocks of 8."""
    return max(8, min(BLOCK_ROWS, _BLOCK_BYTES // row_bytes(matrix) // 8 * 8))


@inner
def put_rows(matrix: int, rows: int, row_ids: int, first: int, count: int, out: int) -> None:
    """Put rows into blocks of 8 behind each other, the rest into one of 8, 4 or 1, as multiply_blocks takes them."""
    size = row_bytes(matrix)
    done = 0
    while done < count:
        rest = count - done
        n = 8 if rest > 4 else 4 if rest > 1 else 1
        if n == 1:
            _put_one(matrix, rows, row_ids, first + done, out + done * size)
        else:
            put_block(matrix, rows, row_ids, first + done, min(rest, n), n, out + done * size)
        done += n


@inner
def _put_one(matrix: int, rows: int, row_ids: int, row: int, out: int) -> None:
    """Copy one row as it is."""
    m, r = at(matrix, MATRIX), at(rows, ROWS)
    if row_ids:
        row = np.int64(load_int(row_ids + 8 * row))
    source = r.floats + 4 * row * r.stride if m.floats else r.groups + row * r.group_stride
    for i in range(0, row_bytes(matrix), 4):
        store_int(out + i, load_int(source + i))


@inner
def multiply_blocks(
    matrix: int, blocks: int, count: int, tile: int, n_tiles: int, out: int, stride: int, bias: int
) -> None:
    """`count` rows that put_rows left at `blocks`, times some tiles of a matrix: floats at `out`, rows `stride` apart.

    `out` is the place of the first tile's outputs. Up to 7 rows behind the last are written too. bias: of all tiles,
    or 0.
    """
    m = at(matrix, MATRIX)
    tiles = m.address + tile * m.tile_bytes
    bias = bias + 64 * tile if bias else 0
    size, eights = row_bytes(matrix), count // 8
    rest = count - 8 * eights
    if rest > 4:
        eights += 1
    if eights:
        call(m.kernel8, (tiles, n_tiles, m.n_in, blocks, eights, out, stride, bias))
    if 0 < rest <= 4:
        done = 8 * eights
        kernel_at = m.kernel4 if rest > 1 else m.kernel1
        call(kernel_at, (tiles, n_tiles, m.n_in, blocks + done * size, 1, out + 4 * done * stride, stride, bias))


@inner
def multiply_row(matrix: int, rows: int, row: int, tile: int, n_tiles: int, out: int, bias: int) -> None:
    """One row of activations times some tiles of a matrix: 16 floats a tile at `out`. bias: of all tiles, or 0."""
    m, r = at(matrix, MATRIX), at(rows, ROWS)
    x = r.floats + 4 * row * r.stride if m.floats else r.groups + row * r.group_stride
    bias = bias + 64 * tile if bias else 0
    call(m.kernel1, (m.address + tile * m.tile_bytes, n_tiles, m.n_in, x, 1, out, 0, bias))


@inner
def multiply(
    matrix: int, rows: int, first: int, count: int, tile: int, n_tiles: int, out: int, stride: int, scratch: int
) -> None:
    """Rows first, first + 1, ... times some tiles of a matrix, floats at `out`, rows `stride` apart.

    `out` is the place of tile 0's outputs of the first row; up to 7 rows behind the last are written too. scratch: the
    thread's own, of scratch_bytes.
    """
    if n_tiles <= 0:
        return
    if count == 1:
        multiply_row(matrix, rows, first, tile, n_tiles, out + 64 * tile, at(matrix, MATRIX).bias)
        return
    bias, step = at(matrix, MATRIX).bias, rows_at_once(matrix)
    for done in range(0, count, step):
        n = min(step, count - done)
        put_rows(matrix, rows, 0, first + done, n, scratch)
        multiply_blocks(matrix, scratch, n, tile, n_tiles, out + 64 * tile + 4 * done * stride, stride, bias)

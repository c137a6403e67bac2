"""From tiles back to matrices, in NumPy: the inverse of `Matrix.pack`, for those who compute without tiles.

Slow; the padding rows of the last tile are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant.formats import BF16, F16, GROUP, SUPER_GROUP, TILE_ROWS, Format, Matrix, PackedPart, planes


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix that lies packed in a record; see formats.MatrixSource."""

    part: PackedPart
    record: npt.NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""
        return self.part.shape

    @property
    def format(self) -> Format:
        """The format of its tiles."""
        return self.part.format

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Copy the tiles."""
        out[:] = self._tiles()

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""
        return unpack(self._tiles(), self.format, self.shape)

    def _tiles(self) -> npt.NDArray[np.uint8]:
        return self.record[self.part.offset : self.part.offset + self.part.n_bytes]


def unpack(tiles: npt.NDArray[np.uint8], format: Format, shape: tuple[int, int]) -> Matrix:
    """The matrix (n_out, n_in) whose tiles these are, uint8 (format.matrix_bytes(*shape),)."""
    n_out, n_in = shape
    n_tiles, n_blocks = -(-n_out // TILE_ROWS), n_in // format.block
    if not format.is_integer:
        kind = np.uint16 if format is BF16 else np.float16 if format is F16 else np.float32
        return Matrix(format, _rows(tiles.view(kind), n_tiles, n_blocks, n_out))
    blocks, at = tiles.reshape(n_tiles, n_blocks, -1), 0

    def take(n_bytes: int) -> npt.NDArray[np.uint8]:
        nonlocal at
        at += n_bytes
        return np.ascontiguousarray(blocks[:, :, at - n_bytes : at])

    n_chunks = format.block // GROUP
    vectors = _from_planes(take(n_chunks * format.chunk_bytes), format.bits, n_chunks, 4 * TILE_ROWS)
    # (tile, block, vector of 4 columns, row, column in it) -> (tile, block, column, row)
    columns = vectors.reshape(n_tiles, n_blocks, -1, TILE_ROWS, 4).transpose(0, 1, 2, 4, 3)
    values = _rows(np.ascontiguousarray(columns), n_tiles, n_blocks, n_out)
    tables: list[Any] = []
    for _ in range(2 if format.has_minimum else 1):
        raw = take(format.scale_bytes)
        if format.scale_bits or format.is_e8m0:
            table = _from_planes(raw, format.scale_bits or 8, 1, TILE_ROWS)
        else:
            table = raw.view(np.float16)
        tables.append(_rows(table, n_tiles, n_blocks, n_out))
    above: list[Any] = [None, None]
    if format.scale_bits:
        n_above = format.block // SUPER_GROUP * TILE_ROWS * 2
        for i in range(len(tables)):
            above[i] = _rows(take(n_above).view(np.float16), n_tiles, n_blocks, n_out)
    return Matrix(format, values, tables[0], tables[1] if len(tables) > 1 else None, *above)


def _rows(table: npt.NDArray[Any], n_tiles: int, n_blocks: int, n_out: int) -> npt.NDArray[Any]:
    """(tile, block, column, row) as (n_out, columns)."""
    tiles = table.reshape(n_tiles, n_blocks, -1, TILE_ROWS).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(tiles.reshape(n_tiles * TILE_ROWS, -1)[:n_out])


def _from_planes(raw: npt.NDArray[np.uint8], bits: int, n_chunks: int, width: int) -> npt.NDArray[np.uint8]:
    """Bytes (tile, block, n_chunks * bytes) of planes as integers (tile, block, n_vectors, width), uint8."""
    chunks = raw.reshape(*raw.shape[:2], n_chunks, -1)
    n_vectors = chunks.shape[-1] * 8 // (bits * width)
    values, at, low = np.zeros((*chunks.shape[:3], n_vectors, width), np.uint8), 0, 0
    for plane in planes(bits):
        per_byte = 8 // plane
        n_bytes = n_vectors * width // per_byte
        packed = chunks[..., at : at + n_bytes].reshape(*chunks.shape[:3], n_vectors // per_byte, width)
        for place in range(per_byte):
            values[..., place::per_byte, :] |= ((packed >> (plane * place)) & ((1 << plane) - 1)) << low
        at, low = at + n_bytes, low + plane
    return values.reshape(*raw.shape[:2], -1, width)

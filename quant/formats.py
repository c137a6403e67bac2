"""Weight formats: what one matrix holds, and its layout in memory, the same for every instruction set.

A matrix (n_out, n_in) lies in tiles of 16 rows, a tile in blocks of columns: 256 with two-level scales, else as many as
share a scale, and at least 32. A block holds the integers of each 32 columns, then the scales of its groups (16 rows
side by side), the minima in the same form, and the super-scales and super-minima, 16 half floats each. The integers of
32 columns are 8 vectors of 64 bytes: 4 consecutive columns of each row side by side. They are cut into planes of 4, 2
and 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, low bits in the wider plane, which comes first); a byte of the 4-bit plane
holds two vectors, of the 2-bit plane four, of the 1-bit plane eight, low bits first. Integer scales of 4 and 6 bits lie
in the same planes, with the 16 bytes of a group in the place of a vector. Float formats hold the 16 rows of a column
side by side. Rows beyond n_out are zero. The slow reading and packing of every format stand here (`Matrix`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

TILE_ROWS = 16
GROUP = 32  # columns that share a scale of the activations
SUPER_GROUP = 256  # columns that share a super-scale
E8M0_LARGEST = 252  # beyond, 6 times the scale is infinite in float32; 255 is not a number in the MX specification


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that integers of so many bits are cut into, low bits first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@dataclass(frozen=True)
class Format:
    """One way to store weights.

    An integer format's weight is scale * (integer - offset) + minimum, or scale * table[integer]. Its scales and minima
    are half floats, one per group; or, where `scale_bits` is not 0, unsigned integers of that many bits, less
    `scale_offset`, under a half-float super-scale (and super-minimum) of 256 columns; or E8M0 bytes.
    """

    name: str
    bits: int
    group: int = GROUP  # columns that share a scale: 16, 32, 64 or 128
    offset: int = 0
    has_minimum: bool = False
    scale_bits: int = 0  # 4, 6 or 8: two-level scales
    scale_offset: int = 0
    is_e8m0: bool = False  # scales are powers of two, stored as MXFP4 does, and halved
    table: tuple[int, ...] = ()  # what each integer stands for

    @property
    def is_integer(self) -> bool:
        """Whether integer kernels (with int8 activations) serve this format."""
        return not self.name.endswith(("f16", "f32"))

    @property
    def block(self) -> int:
        """Columns of one block, the unit that repeats along a tile; n_in is a multiple of it."""
        return SUPER_GROUP if self.scale_bits else max(self.group, GROUP) if self.is_integer else 1

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the integers of 32 columns of a tile."""
        return GROUP * TILE_ROWS * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one block of a tile, without its minima, super-scales and super-minima."""
        width = self.scale_bits or (8 if self.is_e8m0 else 16)
        return self.block // self.group * TILE_ROWS * width // 8

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of a tile: integers, scales, minima, super-scales, super-minima."""
        if not self.is_integer:
            return TILE_ROWS * self.bits // 8
        tables = 2 if self.has_minimum else 1
        levels = self.scale_bytes + (2 * TILE_ROWS if self.scale_bits else 0)
        return self.block // GROUP * self.chunk_bytes + tables * levels

    def tile_bytes(self, n_in: int) -> int:
        """Bytes of one tile of 16 rows with `n_in` columns."""
        return n_in // self.block * self.block_bytes

    def matrix_bytes(self, n_out: int, n_in: int) -> int:
        """Bytes of a packed matrix, its padding rows included."""
        return -(-n_out // TILE_ROWS) * self.tile_bytes(n_in)


def _grouped(bits: int, group: int, has_minimum: bool) -> Format:
    name = f"int{bits}" + (f"-g{group}" if group != GROUP else "") + ("-min" if has_minimum else "")
    return Format(name, bits, group, 0 if has_minimum else 1 << (bits - 1), has_minimum)


_GROUPED = [
    _grouped(bits, group, minimum)
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (16, 32, 64, 128)
    for minimum in (False, True)
]
_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value; the scale is halved
_TWO_LEVEL = [
    Format("int2-k", 2, 16, has_minimum=True, scale_bits=4),
    Format("int3-k", 3, 16, offset=4, scale_bits=6, scale_offset=32),
    Format("int4-k", 4, 32, has_minimum=True, scale_bits=6),
    Format("int5-k", 5, 32, has_minimum=True, scale_bits=6),
    Format("int6-k", 6, 16, offset=32, scale_bits=8, scale_offset=128),
    Format("iq4-xs", 4, 32, scale_bits=6, scale_offset=32, table=_IQ4_TABLE),
]
_TABLES = [
    Format("iq4-nl", 4, 32, table=_IQ4_TABLE),
    Format("mxfp4", 4, 32, is_e8m0=True, table=_MXFP4_TABLE),
]
F16, BF16, F32 = Format("f16", 16), Format("bf16", 16), Format("f32", 32)
FORMATS = {format.name: format for format in (*_GROUPED, *_TWO_LEVEL, *_TABLES, F16, BF16, F32)}
INT4, INT4_MIN, INT8 = FORMATS["int4"], FORMATS["int4-min"], FORMATS["int8"]


@dataclass(frozen=True)
class PackedPart:
    """Where the tiles of one matrix (n_out, n_in) lie within a record: `offset` bytes from its start."""

    format: Format
    shape: tuple[int, int]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the tiles."""
        return self.format.matrix_bytes(*self.shape)


class MatrixSource(Protocol):
    """What a device takes for a matrix: it may still lie in a file, and be read only when it is packed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""

    @property
    def format(self) -> Format:
        """The format that it packs to."""

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles into `out`, uint8 (format.matrix_bytes(*shape),)."""

    def whole(self) -> Matrix:
        """All of the matrix, unpacked."""


@dataclass(frozen=True)
class Matrix:
    """A matrix before packing: (n_out, n_in) in one format, n_in a multiple of the format's block.

    Integer formats: `values` uint8 (n_out, n_in), the integers as they are stored, offset included; `scales` and
    `minima` (n_out, n_in / group), float16, or uint8 where they are E8M0 bytes or integers under `super_scales` and
    `super_minima`, float16 (n_out, n_in / 256).
    Float formats: `values` float16, float32, or uint16 holding bfloat16's bits; no scales.
    """

    format: Format
    values: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic] | None = None
    minima: npt.NDArray[np.generic] | None = None
    super_scales: npt.NDArray[np.float16] | None = None
    super_minima: npt.NDArray[np.float16] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)."""
        return self.values.shape[0], self.values.shape[1]

    def whole(self) -> Matrix:
        """Itself; see MatrixSource."""
        return self

    def some_rows(self, first: int, count: int) -> Matrix:
        """Rows first, first + 1, ... as a matrix."""
        tables = (self.scales, self.minima, self.super_scales, self.super_minima)
        parts = (None if table is None else table[first : first + count] for table in tables)
        return Matrix(self.format, self.values[first : first + count], *parts)  # type: ignore[arg-type]   # their types

    def integers(self) -> npt.NDArray[np.int16]:
        """What the stored integers stand for, int16 (n_out, n_in): less the offset, or looked up in the table."""
        if self.format.table:
            return np.array(self.format.table, np.int16)[self.values]
        return self.values.astype(np.int16) - np.int16(self.format.offset)

    def float_scales(self) -> npt.NDArray[np.float32]:
        """Scales as the kernels use them, float32 (n_out, n_in / group); exact in all formats."""
        assert self.scales is not None
        if self.format.is_e8m0:
            return np.ldexp(np.float32(1.0), self.scales.astype(np.int32) - 128)  # 2**(e - 127), halved
        return self._levels(self.scales, self.super_scales, self.format.scale_offset)

    def float_minima(self) -> npt.NDArray[np.float32] | None:
        """Minima as the kernels use them, float32 (n_out, n_in / group), exact; None where the format has none."""
        return None if self.minima is None else self._levels(self.minima, self.super_minima, 0)

    def _levels(
        self, stored: npt.NDArray[np.generic], above: npt.NDArray[np.float16] | None, offset: int
    ) -> npt.NDArray[np.float32]:
        """Scales or minima as floats: halves as they are, integers times what stands above them."""
        if above is None:
            return stored.astype(np.float32)
        repeated = np.repeat(above.astype(np.float32), SUPER_GROUP // self.format.group, axis=1)
        return repeated * (stored.astype(np.int16) - np.int16(offset)).astype(np.float32)  # 11 + 8 bits

    def to_float(self) -> npt.NDArray[np.float32]:
        """The weights, float32 (n_out, n_in): integer * scale + minimum, rounded once."""
        if self.format is BF16:
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        if not self.format.is_integer:
            return self.values.astype(np.float32)
        weights = np.repeat(self.float_scales().astype(np.float64), self.format.group, axis=1)
        weights *= self.integers()
        minima = self.float_minima()
        weights += 0.0 if minima is None else np.repeat(minima, self.format.group, axis=1)
        with np.errstate(over="ignore"):
            return weights.astype(np.float32)  # up to here all is exact: at most 52 bits, in all formats

    def not_finite(self) -> int:
        """The first row that holds, or whose scales could give, a weight that is infinite or not a number; or -1."""
        halves = (self.scales, self.minima, self.super_scales, self.super_minima)
        tables = [table for table in halves if table is not None and table.dtype == np.float16]
        if self.format is BF16:
            tables = [(self.values.astype(np.uint32) << 16).view(np.float32)]
        elif not self.format.is_integer:
            tables = [self.values]
        elif self.format.is_e8m0 and self.scales is not None:
            tables = [np.where(self.scales.astype(np.int16) > E8M0_LARGEST, np.nan, 0.0)]
        wrong = np.any([~np.isfinite(table).all(axis=1) for table in tables], axis=0)
        return int(np.argmax(wrong)) if wrong.any() else -1

    def pack(self, out: npt.NDArray[np.uint8]) -> None:
        """Write the tiles into `out`, uint8 (format.matrix_bytes(*shape),)."""
        n_tiles, n_blocks = -(-self.shape[0] // TILE_ROWS), self.shape[1] // self.format.block
        if not self.format.is_integer:
            out.reshape(n_tiles, -1)[:] = _lanes(self.values, n_blocks).view(np.uint8).reshape(n_tiles, -1)
            return
        # (tile, block, column, row) -> (tile, block, vector of 4 columns, row and column in it)
        columns = _lanes(self.values, n_blocks).reshape(n_tiles, n_blocks, -1, 4, TILE_ROWS)
        vectors = columns.transpose(0, 1, 2, 4, 3).reshape(n_tiles, n_blocks, -1, GROUP // 4, 4 * TILE_ROWS)
        parts = [_in_planes(vectors, self.format.bits)]
        for table in (self.scales, self.minima):
            if table is not None and table.dtype == np.uint8:
                parts.append(_in_planes(_lanes(table, n_blocks), self.format.scale_bits or 8))
            elif table is not None:
                parts.append(_lanes(table, n_blocks).view(np.uint8))
        parts += [_lanes(t, n_blocks).view(np.uint8) for t in (self.super_scales, self.super_minima) if t is not None]
        blocks = [part.reshape(n_tiles, n_blocks, -1) for part in parts]
        np.concatenate(blocks, axis=2, out=out.reshape(n_tiles, n_blocks, -1))


def _lanes(table: npt.NDArray[np.generic], n_blocks: int) -> npt.NDArray[np.generic]:
    """(n_out, n) as (tile, block, column, row), with zero rows added up to whole tiles."""
    missing = -table.shape[0] % TILE_ROWS
    padded = np.pad(table, ((0, missing), (0, 0))) if missing else table
    tiles = padded.reshape(-1, TILE_ROWS, n_blocks, padded.shape[1] // n_blocks)
    return np.ascontiguousarray(tiles.transpose(0, 2, 3, 1))


def _in_planes(vectors: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """Vectors of integers, uint8 (..., n_vectors, width), as the bytes (..., n) of their planes."""
    parts, low = [], 0
    for width in planes(bits):
        plane = (vectors.astype(np.uint8) >> low) & ((1 << width) - 1)
        per_byte = 8 // width
        packed = plane[..., 0::per_byte, :]
        for place in range(1, per_byte):
            packed = packed | (plane[..., place::per_byte, :] << (width * place))
        parts.append(packed.reshape(*packed.shape[:-2], -1))
        low += width
    return np.concatenate(parts, axis=-1)

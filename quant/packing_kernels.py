"""Compiled packing: rows of a ggml tensor, as they lie in the file, to tiles of edgert.quant.formats.

One kernel serves all block types: it follows the tables of edgert.quant.ggml, eight columns (or one group) at a time,
so a file of several types compiles it once. Floats have a kernel for each size. All tell the first row with a scale or
a weight that is not finite.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from edgert.quant.formats import E8M0_LARGEST, GROUP, TILE_ROWS, planes
from edgert.quant.ggml import LAYOUTS, Fields, Layout
from edgert.quant.jit import kernel
from edgert.quant.records import at, record
from edgert.quant.simd import splat_i32
from edgert.quant.simd_rows import (
    eight_bits,
    eight_bytes,
    first_lanes,
    half_bits,
    note_larger,
    put_beside,
    put_field,
    store_bytes,
    store_half_bits,
    store_halves,
    store_words,
)

# What one call packs: n_tiles of n_blocks each, from rows that lie row_bytes apart; of a tile, n_lanes rows are there.
_JOB = record("source row_bytes n_tiles n_lanes n_blocks out wrong layout")
# How blocks of a type become blocks of a tile, of block_bytes and tile_bytes: the tables below, by address and length.
_LAYOUT = record("block_bytes tile_bytes integers n_integers scales n_scales halves n_halves")
# A plane of integers or scales, `width` bits each. Fields (of 8 columns, or of a group) that share a word or byte of a
# tile are a part; is_bits: the 8 columns are the bits of one byte. Scales larger than `largest` are not finite.
_PLANE = record("width mask flip largest is_bits parts n_parts fields")
_FIELD = record("byte shift")
_PART = record("out")
_HALF = record("byte out flip")  # a half-float scale or minimum
_U32 = np.dtype([("bits", np.uint32)])

_FIELD_BYTES, _PART_BYTES, _PLANE_BYTES, _HALF_BYTES = (d.itemsize for d in (_FIELD, _PART, _PLANE, _HALF))
_IN_EACH_BYTE = 0x0101010101010101
_LINE = 32  # columns of floats turned at a time: rows far apart drive each other out of the cache


@kernel
def _pack_integers(rows: int, stride: int, out: int, address: int, lanes: Any) -> None:
    """One plane of a block of 16 rows. Eight columns, a byte each, are two vectors, put side by side."""
    plane = at(address, _PLANE)
    field, width = plane.fields, plane.width
    mask, flip = plane.mask * _IN_EACH_BYTE, plane.flip * _IN_EACH_BYTE
    for part in range(plane.parts, plane.parts + _PART_BYTES * plane.n_parts, _PART_BYTES):
        to, packed = out + at(part, _PART).out, splat_i32(np.int32(0))
        for place in range(0, 8, 2 * width):
            f = at(field, _FIELD)
            if plane.is_bits:
                columns = eight_bits(rows + f.byte, stride)
            else:
                columns = eight_bytes(rows + f.byte, stride, f.shift, mask, flip)
            if width == 8:
                store_halves(to, columns, lanes)
            else:
                packed = put_beside(packed, columns, width, place)
            field += _FIELD_BYTES
        if width < 8:
            store_words(to, packed, lanes)


@kernel
def _pack_scales(rows: int, stride: int, out: int, address: int, lanes: Any, wrong: Any) -> Any:
    """One plane of the integer scales or minima of a block of 16 rows; `wrong`, with the lanes of a too large one."""
    plane = at(address, _PLANE)
    field = plane.fields
    for part in range(plane.parts, plane.parts + _PART_BYTES * plane.n_parts, _PART_BYTES):
        packed = splat_i32(np.int32(0))
        for place in range(0, 8, plane.width):
            f = at(field, _FIELD)
            packed = put_field(packed, rows + f.byte, stride, f.shift, plane.mask, place)
            field += _FIELD_BYTES
        store_bytes(out + at(part, _PART).out, packed, plane.flip, lanes)
        wrong = note_larger(wrong, packed, 0xFF, plane.largest)
    return wrong


@kernel
def pack_blocks(address: int) -> None:
    """Pack the tiles of a _JOB."""
    job = at(address, _JOB)
    layout = at(job.layout, _LAYOUT)
    stride, lanes = job.row_bytes, first_lanes(job.n_lanes)
    for tile in range(job.n_tiles):
        wrong = splat_i32(np.int32(0))
        rows, out = job.source + tile * TILE_ROWS * stride, job.out + tile * job.n_blocks * layout.tile_bytes
        for _ in range(job.n_blocks):
            for i in range(layout.n_integers):
                _pack_integers(rows, stride, out, layout.integers + i * _PLANE_BYTES, lanes)
            for i in range(layout.n_scales):
                wrong = _pack_scales(rows, stride, out, layout.scales + i * _PLANE_BYTES, lanes, wrong)
            for i in range(layout.n_halves):
                half = at(layout.halves + i * _HALF_BYTES, _HALF)
                bits = half_bits(rows + half.byte, stride)
                store_half_bits(out + half.out, bits, half.flip, lanes)
                wrong = note_larger(wrong, bits, 0x7C00, 0x7BFF)
            rows, out = rows + layout.block_bytes, out + layout.tile_bytes
        store_words(job.wrong + 64 * tile, wrong, lanes)


def _pack_floats(bytes_each: int) -> Any:
    """A kernel for floats of 2 or 4 bytes."""
    number = np.dtype([("bits", f"u{bytes_each}")])

    def pack_floats(source: int, n_tiles: int, n_in: int, out: int, exponent: int, wrong: int) -> None:
        """Turn rows into columns of 16; notes the rows in which a float has all bits of its exponent set."""
        for tile in range(0, TILE_ROWS * n_tiles, TILE_ROWS):
            for first in range(0, n_in, _LINE):
                for row in range(tile, tile + TILE_ROWS):
                    bad = 0
                    to = out + bytes_each * (tile * n_in + row - tile)
                    for column in range(first, min(first + _LINE, n_in)):
                        bits = at(source + bytes_each * (row * n_in + column), number).bits
                        at(to + bytes_each * TILE_ROWS * column, number).bits = bits
                        bad |= (bits & exponent) == exponent
                    if bad:
                        at(wrong + 4 * row, _U32).bits = 1

    pack_floats.__name__ = pack_floats.__qualname__ = f"pack_floats_{bytes_each}"  # numba's cache goes by names
    return kernel(pack_floats)


pack_halves, pack_singles = _pack_floats(2), _pack_floats(4)


def pack(raw: npt.NDArray[np.uint8], kind: Type, n_in: int, out: npt.NDArray[np.uint8]) -> int:
    """Pack rows of a tensor, uint8 (n_rows, row_bytes), that carries over as it is; the first row not finite, or -1."""
    n_rows, row_bytes = raw.shape
    n_whole, n_left = divmod(n_rows, TILE_ROWS)
    wrong = np.zeros((n_whole + (n_left > 0), TILE_ROWS), np.int32)
    tiles = out.reshape(len(wrong), -1)
    _pack_tiles(raw, TILE_ROWS, kind, n_in, tiles[:n_whole], wrong)
    if n_left:  # the kernels read whole tiles
        padded = np.zeros((TILE_ROWS, row_bytes), np.uint8)
        padded[:n_left] = raw[n_rows - n_left :]
        _pack_tiles(padded, n_left, kind, n_in, tiles[n_whole:], wrong[n_whole:])
    return int(np.argmax(wrong != 0)) if wrong.any() else -1


def _pack_tiles(raw: Any, n_lanes: int, kind: Type, n_in: int, tiles: Any, wrong: Any) -> None:
    """Pack as many tiles as `tiles` has, with the first n_lanes rows of each; `wrong` is set where a row is not finite.

    raw uint8 (n_rows, row_bytes), tiles uint8 (n_tiles, tile_bytes), wrong int32 (n_tiles, 16).
    """
    source, out, noted = (table.ctypes.data for table in (raw, tiles, wrong))
    if kind in LAYOUTS:
        n_blocks, layout = n_in // LAYOUTS[kind].format.block, _tables(kind).layout.ctypes.data
        job = np.array([(source, raw.shape[1], len(tiles), n_lanes, n_blocks, out, noted, layout)], _JOB)
        pack_blocks(job.ctypes.data)
    else:
        exponent = {Type.F16: 0x7C00, Type.BF16: 0x7F80, Type.F32: 0x7F800000}[kind]
        pack_floats = pack_singles if kind == Type.F32 else pack_halves
        pack_floats(source, len(tiles), n_in, out, exponent, noted)


class _Tables:
    """What the kernel follows to pack one type: a _LAYOUT, and the tables that it refers to by address."""

    def __init__(self, layout: Layout) -> None:
        format = layout.format
        self._kept: list[npt.NDArray[np.void]] = []
        n_chunks, n_groups = format.block // GROUP, format.block // format.group
        integers, start = [], 0
        for width, fields in zip(planes(format.bits), layout.integers, strict=True):
            per_chunk = min(4, width)  # parts: words of two vectors, of four, or of eight
            places = np.arange(n_chunks * per_chunk)
            outs = start + places // per_chunk * format.chunk_bytes + places % per_chunk * (64 * width // per_chunk)
            is_bits = fields[1][0] == fields[0][0]
            integers.append(self._plane(width, fields[::8], outs, layout.integers_flip, is_bits=is_bits))
            start += 64 * width
        scales, start, largest = [], n_chunks * format.chunk_bytes, E8M0_LARGEST if format.is_e8m0 else 255
        for of_groups, flip in ((layout.scales, layout.scales_flip), (layout.minima, 0)):
            for width, fields in zip(planes(format.scale_bits or 8)[: len(of_groups)], of_groups, strict=True):
                outs = start + TILE_ROWS * np.arange(n_groups * width // 8)
                scales.append(self._plane(width, fields, outs, flip, largest))
                start += TILE_ROWS * len(outs)
        halves = [(layout.half_scale, start, 0)] if layout.half_scale >= 0 else []
        if layout.half_minimum >= 0:
            halves.append((layout.half_minimum, start + 2 * TILE_ROWS, 0x8000 if layout.subtracts else 0))
        row: list[int] = [layout.n_bytes, format.block_bytes]
        for dtype, rows in ((_PLANE, integers), (_PLANE, scales), (_HALF, halves)):
            row += [self._table(dtype, rows), len(rows)]
        self.layout = np.array([tuple(row)], _LAYOUT)

    def _table(self, dtype: np.dtype[np.void], rows: list[Any]) -> int:
        self._kept.append(np.array(rows, dtype))
        return int(self._kept[-1].ctypes.data)

    def _plane(
        self, width: int, fields: Fields, outs: Any, flip: int, largest: int = 255, is_bits: bool = False
    ) -> tuple[int, ...]:
        """A row of _PLANE; `outs` says where each part goes in a block of a tile."""
        parts = self._table(_PART, [(int(out),) for out in outs])
        return width, (1 << width) - 1, flip, largest, is_bits, parts, len(outs), self._table(_FIELD, fields)


@functools.cache
def _tables(kind: Type) -> _Tables:
    return _Tables(LAYOUTS[kind])

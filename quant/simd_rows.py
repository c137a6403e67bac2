"""Vectors across 16 rows of a file, for packing: a few bytes of each row, side by side, and the bit moves on them.

`rows` and `stride` are the address in the first row and the bytes from one row to the next.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from edgert.quant.simd import Vector, _load, _operation, _splat, _store, i32x16

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_V_I32, _V_I64 = ir.VectorType(_I32, 16), ir.VectorType(_I64, 16)

i64x16 = Vector("i64x16", _V_I64)


def _constant(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _gather(builder: ir.IRBuilder, rows: Any, stride: Any, kind: ir.Type) -> Any:
    """One number of each row."""
    gathered = ir.Constant(ir.VectorType(kind, 16), ir.Undefined)
    for lane in range(16):
        gathered = builder.insert_element(gathered, _load(builder, rows, kind), _I32(lane))
        rows = builder.add(rows, stride)
    return gathered


@_operation(i64x16, types.int64, types.int64, types.int64, types.int64, types.int64)
def eight_bytes(builder: ir.IRBuilder, rows: Any, stride: Any, shift: Any, mask: Any, flip: Any) -> Any:
    """((8 bytes >> shift) & mask) ^ flip."""
    gathered = _gather(builder, rows, stride, _I64)
    shifted = builder.lshr(gathered, _splat(builder, shift))
    return builder.xor(builder.and_(shifted, _splat(builder, mask)), _splat(builder, flip))


@_operation(i64x16, types.int64, types.int64)
def eight_bits(builder: ir.IRBuilder, rows: Any, stride: Any) -> Any:
    """The 8 bits of a byte as 8 bytes."""
    bits = builder.zext(_gather(builder, rows, stride, _I8), _V_I64)
    low = builder.mul(builder.and_(bits, _constant(_V_I64, 0x7F)), _constant(_V_I64, 0x02040810204081))
    high = builder.shl(builder.and_(bits, _constant(_V_I64, 0x80)), _constant(_V_I64, 49))
    return builder.or_(builder.and_(low, _constant(_V_I64, 0x0101010101010101)), high)


@_operation(i32x16, i32x16, i64x16, types.int64, types.int64)
def put_beside(builder: ir.IRBuilder, packed: Any, columns: Any, width: Any, place: Any) -> Any:
    """packed | (low 4 bytes | high 4 bytes << width) << place."""
    high = builder.trunc(builder.lshr(columns, _constant(_V_I64, 32)), _V_I32)
    width, place = (_splat(builder, builder.trunc(number, _I32)) for number in (width, place))
    pair = builder.or_(builder.trunc(columns, _V_I32), builder.shl(high, width))
    return builder.or_(packed, builder.shl(pair, place))


@_operation(types.void, types.int64, i64x16, i32x16)
def store_halves(builder: ir.IRBuilder, address: Any, columns: Any, lanes: Any) -> None:
    """The low 4 bytes of each row, then the high ones, in the lanes that are set."""
    high = builder.trunc(builder.lshr(columns, _constant(_V_I64, 32)), _V_I32)
    _store(builder, address, builder.and_(builder.trunc(columns, _V_I32), lanes))
    _store(builder, builder.add(address, _I64(64)), builder.and_(high, lanes))


@_operation(types.void, types.int64, i32x16, i32x16)
def store_words(builder: ir.IRBuilder, address: Any, packed: Any, lanes: Any) -> None:
    """4 bytes of each row, in the lanes that are set."""
    _store(builder, address, builder.and_(packed, lanes))


@_operation(i32x16, i32x16, types.int64, types.int64, types.int64, types.int64, types.int64)
def put_field(builder: ir.IRBuilder, packed: Any, rows: Any, stride: Any, shift: Any, mask: Any, place: Any) -> Any:
    """packed | ((byte >> shift) & mask) << place."""
    gathered = builder.zext(_gather(builder, rows, stride, _I8), _V_I32)
    shift, mask, place = (_splat(builder, builder.trunc(number, _I32)) for number in (shift, mask, place))
    return builder.or_(packed, builder.shl(builder.and_(builder.lshr(gathered, shift), mask), place))


@_operation(types.void, types.int64, i32x16, types.int64, i32x16)
def store_bytes(builder: ir.IRBuilder, address: Any, packed: Any, flip: Any, lanes: Any) -> None:
    """A byte of each row, exclusive-or `flip`, in the lanes that are set."""
    flipped = builder.xor(packed, _splat(builder, builder.trunc(flip, _I32)))
    _store(builder, address, builder.trunc(builder.and_(flipped, lanes), ir.VectorType(_I8, 16)))


@_operation(i32x16, types.int64, types.int64)
def half_bits(builder: ir.IRBuilder, rows: Any, stride: Any) -> Any:
    """The 16 bits of a half float."""
    return builder.zext(_gather(builder, rows, stride, _I16), _V_I32)


@_operation(types.void, types.int64, i32x16, types.int64, i32x16)
def store_half_bits(builder: ir.IRBuilder, address: Any, bits: Any, flip: Any, lanes: Any) -> None:
    """16 bits of each row, exclusive-or `flip`, in the lanes that are set."""
    flipped = builder.xor(bits, _splat(builder, builder.trunc(flip, _I32)))
    _store(builder, address, builder.trunc(builder.and_(flipped, lanes), ir.VectorType(_I16, 16)))


@_operation(i32x16, i32x16, i32x16, types.int64, types.int64)
def note_larger(builder: ir.IRBuilder, noted: Any, values: Any, mask: Any, largest: Any) -> Any:
    """`noted`, and all bits of the lanes where value & mask is larger than `largest`."""
    mask, largest = (_splat(builder, builder.trunc(number, _I32)) for number in (mask, largest))
    larger = builder.icmp_signed(">", builder.and_(values, mask), largest)
    return builder.or_(noted, builder.sext(larger, _V_I32))


@_operation(i32x16, types.int64)
def first_lanes(builder: ir.IRBuilder, n: Any) -> Any:
    """All bits of the first n lanes."""
    count = _splat(builder, builder.trunc(n, _I32))
    return builder.sext(builder.icmp_signed("<", ir.Constant(_V_I32, list(range(16))), count), _V_I32)

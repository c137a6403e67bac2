"""Vectors and single numbers from memory and to it, for numba kernels: addresses are integers, none need be aligned.

Half floats are widened exactly and rounded to nearest, ties to even, whether or not the CPU has instructions for that.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import types

from edgert.quant import isa
from edgert.quant.llvm import F16, F32, I8, I16, I32, V_F32, V_I8, V_I32, call, constant
from edgert.quant.simd import _load, _operation, _splat, _store, f32x16, i8x64, i32x16


# ---- half floats, where the CPU has no instruction for them ----------------------------------------------------------
def _like(shape: Any, kind: ir.Type, value: float | None = None) -> Any:
    """`kind` in the shape (vector or scalar) of the LLVM type `shape`: the type, or a constant of it."""
    vector = isinstance(shape, ir.VectorType)
    made = ir.VectorType(kind, shape.count) if vector else kind
    return made if value is None else made([value] * shape.count if vector else value)


def _widen(builder: ir.IRBuilder, bits: Any) -> Any:
    """Half floats, as int16, to floats; exact."""
    if isa.has_half_floats():
        return builder.fpext(builder.bitcast(bits, _like(bits.type, F16)), _like(bits.type, F32))
    wide = builder.zext(bits, _like(bits.type, I32))
    number = functools.partial(_like, wide.type, I32)
    sign = builder.shl(builder.and_(wide, number(0x8000)), number(16))
    magnitude = builder.shl(builder.and_(wide, number(0x7FFF)), number(13))
    scaled = builder.fmul(builder.bitcast(magnitude, _like(wide.type, F32)), _like(wide.type, F32, 2.0**112))
    finite = builder.icmp_unsigned("<", magnitude, number(0x7C00 << 13))
    special = builder.or_(magnitude, number(0x7F800000))  # infinite, or not a number
    result = builder.select(finite, builder.bitcast(scaled, wide.type), special)
    return builder.bitcast(builder.or_(result, sign), _like(wide.type, F32))


def _narrow(builder: ir.IRBuilder, value: Any) -> Any:
    """Floats to half floats as int16, to nearest, ties to even."""
    if isa.has_half_floats():
        return builder.bitcast(builder.fptrunc(value, _like(value.type, F16)), _like(value.type, I16))
    bits = builder.bitcast(value, _like(value.type, I32))
    number = functools.partial(_like, bits.type, I32)
    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    bits = builder.and_(bits, number(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(bits, number(13)), number(1))
    normal = builder.lshr(builder.add(builder.add(bits, number(0xC8000FFF)), odd), number(13))
    half = _like(value.type, F32, 0.5)  # its last mantissa bit is the smallest half float
    shifted = builder.fadd(builder.bitcast(bits, half.type), half)
    small = builder.sub(builder.bitcast(shifted, bits.type), number(0x3F000000))
    nan = builder.icmp_unsigned(">", bits, number(0x7F800000))
    large = builder.select(nan, number(0x7E00), number(0x7C00))
    result = builder.select(builder.icmp_unsigned("<", bits, number(0x38800000)), small, normal)
    result = builder.select(builder.icmp_unsigned(">=", bits, number(0x47800000)), large, result)
    return builder.trunc(builder.or_(result, sign), _like(value.type, I16))


# ---- loads and stores ------------------------------------------------------------------------------------------------
@_operation(f32x16, types.intp)
def load_f32(builder: ir.IRBuilder, address: Any) -> Any:
    """16 floats."""
    return _load(builder, address, V_F32)


@_operation(f32x16, types.intp)
def load_f16(builder: ir.IRBuilder, address: Any) -> Any:
    """16 half floats, widened."""
    return _widen(builder, _load(builder, address, ir.VectorType(I16, 16)))


@_operation(f32x16, types.intp)
def load_bf16(builder: ir.IRBuilder, address: Any) -> Any:
    """16 bfloat16s, widened."""
    wide = builder.zext(_load(builder, address, ir.VectorType(I16, 16)), V_I32)
    return builder.bitcast(builder.shl(wide, constant(V_I32, 16)), V_F32)


@_operation(i8x64, types.intp)
def load_i8(builder: ir.IRBuilder, address: Any) -> Any:
    """64 bytes."""
    return _load(builder, address, V_I8)


@_operation(i32x16, types.intp)
def load_i32(builder: ir.IRBuilder, address: Any) -> Any:
    """16 integers."""
    return _load(builder, address, V_I32)


@_operation(i8x64, types.intp)
def broadcast4(builder: ir.IRBuilder, address: Any) -> Any:
    """The same 4 bytes in each of the 16 lanes."""
    return builder.bitcast(_splat(builder, _load(builder, address, I32)), V_I8)


@_operation(types.void, types.intp, f32x16)
def store_f32(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """16 floats."""
    _store(builder, address, value)


@_operation(types.void, types.intp, f32x16)
def store_f16(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """16 floats, rounded to half, ties to even."""
    _store(builder, address, _narrow(builder, value))


@_operation(types.void, types.intp, types.float32)
def store_half(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """One float, rounded to half, ties to even."""
    _store(builder, address, _narrow(builder, value))


@_operation(types.void, types.intp, types.float32)
def store_float(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """One float."""
    _store(builder, address, value)


@_operation(types.float32, types.intp)
def load_float(builder: ir.IRBuilder, address: Any) -> Any:
    """One float."""
    return _load(builder, address, F32)


@_operation(types.int32, types.intp)
def load_int(builder: ir.IRBuilder, address: Any) -> Any:
    """One int32."""
    return _load(builder, address, I32)


@_operation(types.int64, types.intp)
def load_long(builder: ir.IRBuilder, address: Any) -> Any:
    """One int64."""
    return _load(builder, address, ir.IntType(64))


@_operation(types.void, types.intp, types.int32)
def store_int(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """One int32."""
    _store(builder, address, value)


@_operation(types.void, types.intp, i32x16)
def store_i8(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """16 integers, each cut to its low byte."""
    _store(builder, address, builder.trunc(value, ir.VectorType(I8, 16)))


@_operation(i32x16, types.intp)
def load_bytes(builder: ir.IRBuilder, address: Any) -> Any:
    """16 bytes, each widened to an unsigned integer."""
    return builder.zext(_load(builder, address, ir.VectorType(I8, 16)), V_I32)


@_operation(i32x16, types.intp)
def load_signed_bytes(builder: ir.IRBuilder, address: Any) -> Any:
    """16 bytes, each widened to a signed integer."""
    return builder.sext(_load(builder, address, ir.VectorType(I8, 16)), V_I32)


@_operation(types.void, types.intp)
def prefetch(builder: ir.IRBuilder, address: Any, level: int = 1) -> None:
    """Ask for the cache line at an address, to be read soon; any address may be named, also one that is not there.

    level: the nearest cache that it shall come to.
    """
    read, locality, data = I32(0), I32(4 - level), I32(1)
    pointer = builder.inttoptr(address, I8.as_pointer())
    # Where LLVM's pointers have no types, it renames this to llvm.prefetch.p0 by itself.
    call(builder, "llvm.prefetch.p0i8", ir.VoidType(), pointer, read, locality, data)


@_operation(types.void, types.intp, types.intp)
def move32(builder: ir.IRBuilder, to: Any, source: Any) -> None:
    """Copy 32 bytes."""
    _store(builder, to, _load(builder, source, ir.VectorType(I8, 32)))

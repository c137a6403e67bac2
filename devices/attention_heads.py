"""Queries, keys and values on their way into attention: norm, rotation, writing to the cache.

Knows how one position lies in a block of the cache, in each type; nothing of tokens, threads or scores. A head is
prepared in a buffer of the thread's own, so that the rows that matrix products left are only read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from edgert.quant.assembler import Code, Value, operation
from edgert.quant.jit import kernel
from edgert.quant.llvm import F32
from edgert.quant.records import record
from edgert.quant.simd import (
    absolute,
    even_lanes,
    first_lane,
    fma,
    interleave_high,
    interleave_low,
    max_lanes,
    maximum,
    odd_lanes,
    round_i32,
    sum_lanes,
)
from edgert.quant.simd_memory import (
    load_f16,
    load_f32,
    load_float,
    store_f16,
    store_f32,
    store_float,
    store_half,
    store_i8,
)

NO_NORM, HEAD_NORM, VECTOR_NORM = 0, 1, 2  # RMS norm of q and k: none, of each head, of the whole vector
# One position and head to write: floats with zeros behind them up to a multiple of 32, may be changed; the block,
# offsets in it as in CACHE, bytes of a row of values, number of the position in the block; room for d_head floats.
POSITION = record("key value d_head d_value block values key_scales value_scales row_bytes lane spare")


# ---- norm and rotation -----------------------------------------------------------------------------------------------
def copy_row(code: Code, source: Value, n: Value, end: Value, to: Value) -> None:
    """n floats, and zeros up to `end` of them. Nothing behind the n floats is read."""

    def emit(code: Code, source: Value, n: Value, end: Value, to: Value) -> None:
        whole = n // 16 * 64
        with code.loop(0, whole, 64) as i:
            code.do(store_f32, to + i, code.do(load_f32, source + i))
        with code.loop(whole, n * 4, 4) as i:
            code.do(store_float, to + i, code.do(load_float, source + i))
        with code.loop(n * 4, end * 4, 4) as i:
            code.do(store_float, to + i, 0.0)

    code.function("edgert_copy_row", 4, emit)(source, n, end, to)


def norm_factor(code: Code, x: Value, n: Value, eps: Value, spare: Value | None = None) -> Value:
    """What the RMS norm of n floats at `x` multiplies each with, before its weight; see reference.rms_norm.

    Zeros follow the floats up to a multiple of 16; or nothing is read there, and `spare` has room for 16 floats.
    """
    lanes, whole = code.variable(code.splat(0.0)), (n if spare else n + 15) // 16 * 16

    def add(part: Value) -> None:
        lanes.value = code.do(fma, part, part, lanes.value)

    with code.loop(0, whole * 4, 64) as i:
        add(code.do(load_f32, x + i))
    if spare:
        with code.when(whole < n):
            copy_row(code, x + whole * 4, n - whole, code.value(16), spare)
            add(code.do(load_f32, spare))
    builder = code.builder
    mean = code.do(sum_lanes, lanes.value) / Value(builder, builder.sitofp(n.llvm, F32))
    root = builder.module.declare_intrinsic("llvm.sqrt", [F32])
    return code.value(1.0) / Value(builder, builder.call(root, [(mean + eps).llvm]))


def _scale(code: Code, head: Value, factor: Value, weight: Value, n: Value) -> None:
    """Multiply n floats with a factor, then with weights. Nothing behind the n weights is read."""
    whole = n // 16 * 64
    with code.loop(0, whole, 64) as i:
        scaled = code.do(load_f32, head + i) * code.splat(factor)
        code.do(store_f32, head + i, scaled * code.do(load_f32, weight + i))
    with code.loop(whole, n * 4, 4) as i:
        code.do(store_float, head + i, code.do(load_float, head + i) * factor * code.do(load_float, weight + i))


def _rotate(code: Code, head: Value, angles: Value, n: Value, neox: Value) -> None:
    """Rotate the first n of the floats at `head` by n/2 pairs of (cos, sin): pairs (i, i + n/2), or (2i, 2i + 1)."""

    def turn(pair: list[Value], cos: Value, sin: Value) -> tuple[Value, Value]:
        a, b = pair
        return a * cos - b * sin, a * sin + b * cos

    whole = n // 32 * 16
    with code.loop(0, whole, 16) as i:
        pair = [code.do(load_f32, angles + i * 8 + 64 * part) for part in range(2)]
        cos, sin = code.do(even_lanes, *pair), code.do(odd_lanes, *pair)
        with code.either(neox.differs(0)) as (then, otherwise):
            with then:
                places = head + i * 4, head + i * 4 + n * 2
                turned = turn([code.do(load_f32, place) for place in places], cos, sin)
                for place, vector in zip(places, turned, strict=True):
                    code.do(store_f32, place, vector)
            with otherwise:
                places = head + i * 8, head + i * 8 + 64
                pair = [code.do(load_f32, place) for place in places]
                turned = turn([code.do(even_lanes, *pair), code.do(odd_lanes, *pair)], cos, sin)
                for place, interleave in zip(places, (interleave_low, interleave_high), strict=True):
                    code.do(store_f32, place, code.do(interleave, *turned))
    with code.loop(whole, n // 2) as i:
        cos, sin = code.do(load_float, angles + i * 8), code.do(load_float, angles + i * 8 + 4)
        first = head + code.choose(neox.differs(0), i * 4, i * 8)
        places = first, first + code.choose(neox.differs(0), n * 2, 4)
        turned = turn([code.do(load_float, place) for place in places], cos, sin)
        for place, number in zip(places, turned, strict=True):
            code.do(store_float, place, number)


_HEAD = ("source", "n", "norm", "norm_late", "weight", "factor", "eps", "to", "angles", "n_rotated", "neox")


def prepare_head(code: Code, **arguments: Value) -> None:
    """One head of n floats at source, normed and rotated, to a buffer of n rounded up to a multiple of 32.

    norm, weight: which, and of this head; norm_late: whether a HEAD_NORM comes after the rotation. factor: address of
    what norm_factor says of the whole vector. eps: address.
    """

    def emit(code: Code, *values: Value) -> None:
        source, n, norm, norm_late, weight, factor, eps, to, angles, n_rotated, neox = values

        def norm_head(late: int) -> None:
            with code.when(norm.equals(HEAD_NORM) & norm_late.equals(late)):
                _scale(code, to, norm_factor(code, to, n, code.do(load_float, eps)), weight, n)

        copy_row(code, source, n, (n + 31) // 32 * 32, to)
        norm_head(0)
        with code.when(norm.equals(VECTOR_NORM)):
            _scale(code, to, code.do(load_float, factor), weight, n)
        _rotate(code, to, angles, n_rotated, neox)
        norm_head(1)

    code.function("edgert_prepare_head", len(_HEAD), emit, inline=False)(*(arguments[name] for name in _HEAD))


# ---- to the cache ----------------------------------------------------------------------------------------------------
def _copy_one(code: Code, n_bytes: int, source: Value, to: Value) -> None:
    """Copy one number."""
    builder, pointer = code.builder, ir.IntType(8 * n_bytes).as_pointer()
    loaded = builder.load(builder.inttoptr(source.llvm, pointer))
    builder.store(loaded, builder.inttoptr(to.llvm, pointer))


def _to_127(code: Code, x: Value) -> Value:
    """Lanes of x, not below -127 nor above 127."""
    zero, lowest = code.splat(0.0), code.splat(-127.0)
    return zero - code.do(maximum, zero - code.do(maximum, x, lowest), lowest)


def _quantise(code: Code, x: Value, n: Value, integers: Value, scales: Value) -> None:
    """int8 integers of n floats, and a half-float scale of each group of 32, 128 bytes apart; see quantise_cached.

    The floats are followed by zeros up to a multiple of 32; integers are written up to a multiple of 16.
    """
    with code.loop(0, n, 32) as first:
        at = x + first * 4
        low, high = code.do(load_f32, at), code.do(load_f32, at + 64)
        largest = code.do(max_lanes, code.do(maximum, code.do(absolute, low), code.do(absolute, high)))
        code.do(store_half, at, largest / 127.0)
        _copy_one(code, 2, at, scales + first * 4)
        scale = code.do(first_lane, code.do(load_f16, at))
        sound = (scale > 0.0) & (scale < float(np.inf))  # else all are 0, which times infinity is not a number
        inverse = code.splat(code.choose(sound, code.value(1.0) / scale, 0.0))
        for i, part in enumerate((low, high)):
            part = code.choose(sound, part, code.splat(0.0))
            with code.when(n > first + 16 * i):
                rounded = code.do(round_i32, _to_127(code, part * inverse))
                code.do(store_i8, integers + first + 16 * i, rounded)


def _write_operation(kv_type: str) -> Any:
    item = {"f16": 2, "f32": 4, "int8": 1}[kv_type]

    def emit_numbers(code: Code, floats: Value, n: Value, to: Value, scales: Value) -> None:
        """Numbers of the cache's type, up to a multiple of 16, and their scales."""
        if kv_type == "int8":
            _quantise(code, floats, n, to, scales)
        else:
            store = store_f16 if kv_type == "f16" else store_f32
            with code.loop(0, n, 16) as i:
                code.do(store, to + i * item, code.do(load_f32, floats + i * 4))

    def write(code: Code, position: Value) -> None:
        """Key and value of one position."""
        p = code.record(position, POSITION)
        numbers = code.function("edgert_numbers", 4, emit_numbers)
        numbers(p.key, p.d_head, p.spare, p.block + p.key_scales + p.lane * 2)
        with code.loop(0, p.d_head) as d:
            _copy_one(code, item, p.spare + d * item, p.block + (d * 64 + p.lane) * item)
        row = p.block + p.values + p.lane * p.row_bytes
        numbers(p.value, p.d_value, row, p.block + p.value_scales + p.lane * 2)

    return operation(1)(write)


_write_f16, _write_f32, _write_int8 = (_write_operation(kv_type) for kv_type in ("f16", "f32", "int8"))


@kernel
def write_f16(position: int) -> None:
    """Write the key and value of the position and head that a POSITION record tells of, as half floats."""
    _write_f16(position)


@kernel
def write_f32(position: int) -> None:
    """The same as floats."""
    _write_f32(position)


@kernel
def write_int8(position: int) -> None:
    """The same as int8."""
    _write_int8(position)


WRITE = {"f16": write_f16, "f32": write_f32, "int8": write_int8}

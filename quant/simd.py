"""Vectors of 16 lanes for numba kernels: the few operations that they are written in.

Three types: `f32x16`, `i32x16` and `i8x64` (four bytes in each of 16 lanes). LLVM splits them into what the machine
has, so each operation means the same everywhere; only `dot4` picks an instruction. Nothing here knows a weight format.
Float operations are single IEEE operations: no contraction, no reassociation.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from edgert.quant.llvm import I32, V_F32, V_I8, V_I32, call, constant, parts
from edgert.quant.simd_paths import emit_dot4, emit_dot4_signed, emit_look_up

LANES = 16


class Vector(types.Type):
    """A numba type that is one LLVM vector."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        self.llvm = llvm
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16, i32x16, i8x64 = Vector("f32x16", V_F32), Vector("i32x16", V_I32), Vector("i8x64", V_I8)


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of a function (builder, *LLVM values) -> LLVM value, with one fixed signature.

    The function itself stays at hand as `operation.emit`, for those who write LLVM code by Python functions.
    """
    names = ", ".join(f"a{i}" for i in range(len(arguments)))

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
            made = emit(builder, *values)
            return context.get_dummy_value() if made is None else made

        namespace: dict[str, Any] = {"signature": result(*arguments), "generate": generate}
        source = f"def {emit.__name__}(typing_context{', ' + names if names else ''}):\n    return signature, generate"
        exec(source, namespace)  # numba reads the number of arguments from the function itself
        made = namespace[emit.__name__]
        made.__doc__, made.__module__ = emit.__doc__, __name__
        operation = intrinsic(made)
        operation.emit = emit
        return operation

    return decorate


def _load(builder: ir.IRBuilder, address: Any, vector: ir.Type) -> Any:
    loaded = builder.load(builder.inttoptr(address, vector.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _splat(builder: ir.IRBuilder, value: Any, n: int = LANES) -> Any:
    vector = ir.VectorType(value.type, n)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, n), [0] * n))


# ---- lanes -----------------------------------------------------------------------------------------------------------
@_operation(f32x16, types.float32)
def splat(builder: ir.IRBuilder, value: Any) -> Any:
    """One float in all lanes."""
    return _splat(builder, value)


@_operation(i32x16, types.int32)
def splat_i32(builder: ir.IRBuilder, value: Any) -> Any:
    """One integer in all lanes."""
    return _splat(builder, value)


@_operation(types.float32, f32x16)
def first_lane(builder: ir.IRBuilder, value: Any) -> Any:
    """Lane 0."""
    return builder.extract_element(value, I32(0))


def _fold(builder: ir.IRBuilder, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold 16 lanes by the fixed tree: 16 to 8 to 4 to 2 to 1, each time the lower half with the upper half."""
    while value.type.count > 1:
        low, high = parts(builder, value, 2)
        value = combine(low, high)
    return builder.extract_element(value, I32(0))


@_operation(types.float32, f32x16)
def sum_lanes(builder: ir.IRBuilder, value: Any) -> Any:
    """Sum of the lanes, by the fixed tree of 16."""
    return _fold(builder, value, builder.fadd)


@_operation(types.int32, i32x16)
def sum_lanes_i32(builder: ir.IRBuilder, value: Any) -> Any:
    """Sum of the integer lanes."""
    return _fold(builder, value, builder.add)


def _larger(builder: ir.IRBuilder) -> Callable[[Any, Any], Any]:
    """The larger of two; not a number if either is not."""

    def larger(a: Any, b: Any) -> Any:
        greater = builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, greater)

    return larger


def _larger_or_second(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The larger of two, or `b` if either is not a number: one instruction on x86, whose order of operands it keeps."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_operation(types.float32, f32x16)
def max_lanes(builder: ir.IRBuilder, value: Any) -> Any:
    """Largest lane."""
    return _fold(builder, value, _larger(builder))


@_operation(types.float32, f32x16)
def largest_lane(builder: ir.IRBuilder, value: Any) -> Any:
    """Largest lane, by one instruction a step; any lane if one is not a number."""
    return _fold(builder, value, functools.partial(_larger_or_second, builder))


def _pick(builder: ir.IRBuilder, a: Any, b: Any, elements: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, LANES), elements))


@_operation(f32x16, f32x16, f32x16)
def even_lanes(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Lanes 0, 2, 4, ... of `a`, then those of `b`."""
    return _pick(builder, a, b, list(range(0, 32, 2)))


@_operation(f32x16, f32x16, f32x16)
def odd_lanes(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Lanes 1, 3, 5, ... of `a`, then those of `b`."""
    return _pick(builder, a, b, list(range(1, 32, 2)))


@_operation(f32x16, f32x16, f32x16)
def interleave_low(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Lane 0 of `a`, lane 0 of `b`, lane 1 of `a`, ... to lane 7."""
    return _pick(builder, a, b, [lane // 2 + lane % 2 * 16 for lane in range(16)])


@_operation(f32x16, f32x16, f32x16)
def interleave_high(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """Lane 8 of `a`, lane 8 of `b`, lane 9 of `a`, ... to lane 15."""
    return _pick(builder, a, b, [8 + lane // 2 + lane % 2 * 16 for lane in range(16)])


@_operation(f32x16, f32x16, types.int64, f32x16)
def keep_first(builder: ir.IRBuilder, value: Any, n: Any, other: Any) -> Any:
    """Lanes below `n` of `value`, the rest of `other`."""
    count = _splat(builder, builder.trunc(n, I32))
    below = builder.icmp_signed("<", ir.Constant(V_I32, list(range(16))), count)
    return builder.select(below, value, other)


# ---- arithmetic ------------------------------------------------------------------------------------------------------
@_operation(f32x16, f32x16, f32x16, f32x16)
def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return call(builder, "llvm.fma.v16f32", V_F32, a, b, c)


@_operation(f32x16, f32x16, f32x16)
def maximum(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The larger of each lane; not a number where either is not."""
    return _larger(builder)(a, b)


@_operation(f32x16, f32x16, f32x16)
def larger_or_second(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """The larger of each lane; `b` where either is not a number."""
    return _larger_or_second(builder, a, b)


@_operation(f32x16, f32x16)
def absolute(builder: ir.IRBuilder, a: Any) -> Any:
    """Absolute value."""
    return call(builder, "llvm.fabs.v16f32", V_F32, a)


@_operation(i32x16, f32x16)
def round_i32(builder: ir.IRBuilder, a: Any) -> Any:
    """Nearest integer, ties to even. |a| must be below 2**22."""
    magic = constant(V_F32, 12582912.0)  # 1.5 * 2**23: its last mantissa bit is worth one
    return builder.sub(builder.bitcast(builder.fadd(a, magic), V_I32), constant(V_I32, 0x4B400000))


@_operation(f32x16, i32x16)
def to_f32(builder: ir.IRBuilder, a: Any) -> Any:
    """Integers to floats, rounded to even (exact below 2**24)."""
    return builder.sitofp(a, V_F32)


@_operation(f32x16, f32x16, i32x16)
def scale_by_power(builder: ir.IRBuilder, a: Any, exponent: Any) -> Any:
    """a * 2**exponent for an exponent from -126 to 127."""
    bits = builder.shl(builder.add(exponent, constant(V_I32, 127)), constant(V_I32, 23))
    return builder.fmul(a, builder.bitcast(bits, V_F32))


@_operation(f32x16, f32x16, f32x16, f32x16, f32x16)
def saturate_exp(builder: ir.IRBuilder, value: Any, x: Any, low: Any, high: Any) -> Any:
    """`value`, but 0 in the lanes where x < low, and infinite where x > high."""
    value = builder.select(builder.fcmp_ordered("<", x, low), constant(V_F32, 0.0), value)
    return builder.select(builder.fcmp_ordered(">", x, high), constant(V_F32, float("inf")), value)


@_operation(f32x16, f32x16, f32x16, f32x16)
def zero_below(builder: ir.IRBuilder, value: Any, x: Any, low: Any) -> Any:
    """`value`, but 0 in the lanes where x < low."""
    return builder.select(builder.fcmp_ordered("<", x, low), constant(V_F32, 0.0), value)


@_operation(i32x16, i32x16, i32x16)
def add_i32(builder: ir.IRBuilder, a: Any, b: Any) -> Any:
    """a + b of integers."""
    return builder.add(a, b)


# ---- low-bit integers ------------------------------------------------------------------------------------------------
@_operation(i32x16, i8x64, types.int32)
def unsigned_byte(builder: ir.IRBuilder, packed: Any, which: Any) -> Any:
    """Byte `which` (0 to 3) of every lane, as an unsigned integer."""
    shift = _splat(builder, builder.mul(which, I32(8)))
    return builder.and_(builder.lshr(builder.bitcast(packed, V_I32), shift), constant(V_I32, 255))


def look_up(table: tuple[int, ...]) -> Any:
    """An operation i8x64 -> i8x64 for kernels: `emit_look_up` with this table."""

    @_operation(i8x64, i8x64)
    def look_up_in_table(builder: ir.IRBuilder, indexes: Any) -> Any:
        """For each byte below 16, the byte of the table."""
        return emit_look_up(builder, indexes, table)

    return look_up_in_table


@_operation(i32x16, i32x16, i8x64, i8x64)
def dot4(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any) -> Any:
    """total + the sum over each lane's four bytes of unsigned * signed, exact in int32."""
    return emit_dot4(builder, total, unsigned, signed)


@_operation(i32x16, i32x16, i8x64, i8x64)
def dot4_below_128(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any) -> Any:
    """dot4 for unsigned bytes that are all below 128, in fewer instructions on most paths; else it is wrong."""
    return emit_dot4(builder, total, unsigned, signed, below_128=True)


@_operation(i32x16, i32x16, i8x64, i8x64)
def dot4_signed(builder: ir.IRBuilder, total: Any, weights: Any, signed: Any) -> Any:
    """dot4 for signed weights; the bytes of `signed` must be above -128."""
    return emit_dot4_signed(builder, total, weights, signed)


def _define_operator(symbol: Any, emit: Callable[..., Any]) -> None:
    """Let kernels write `a + b` for two f32x16."""

    @infer_global(symbol)
    class _Typed(ConcreteTemplate):
        cases = (f32x16(f32x16, f32x16),)

    @lower_builtin(symbol, f32x16, f32x16)
    def _lower(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        return emit(builder, *values)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, lambda builder, a, b, method=_method: getattr(builder, method)(a, b))

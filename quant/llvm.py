"""LLVM's vector types and the few constructions that everything that emits LLVM code shares.

It knows neither numba nor the CPU: values are LLVM values, and `builder` is llvmlite's IRBuilder.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
V_F32, V_I32, V_I8 = ir.VectorType(F32, 16), ir.VectorType(I32, 16), ir.VectorType(I8, 64)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic by name."""
    function = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """A vector with one number in all elements."""
    return ir.Constant(vector, [value] * vector.count)


def elements(builder: ir.IRBuilder, value: Any, start: int, count: int) -> Any:
    """`count` elements of a vector, from `start` on."""
    chosen = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), chosen)


def parts(builder: ir.IRBuilder, value: Any, n_parts: int) -> list[Any]:
    """A vector cut into equal parts."""
    count = value.type.count // n_parts
    return [elements(builder, value, start, count) for start in range(0, value.type.count, count)]


def joined(builder: ir.IRBuilder, values: list[Any]) -> Any:
    """Vectors side by side in one; their number is a power of two."""
    while len(values) > 1:
        both = ir.Constant(ir.VectorType(I32, 2 * values[0].type.count), list(range(2 * values[0].type.count)))
        values = [builder.shuffle_vector(low, high, both) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]

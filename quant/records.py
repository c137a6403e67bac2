"""What compiled code is told: records behind addresses, and functions called by address.

Jobs and kernels take integers alone, so each has one signature and is compiled once. Sizes, flags and further addresses
lie in records, which `at` reads; which kernel serves a matrix is a field of its record, which `call` follows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

_I32, _I64, _POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


def record(integers: str, floats: str = "") -> np.dtype[np.void]:
    """A record for kernels to read: int64 fields (sizes, flags, addresses), then float32 ones."""
    fields = [(name, np.int64) for name in integers.split()] + [(name, np.float32) for name in floats.split()]
    return np.dtype(fields, align=True)


@intrinsic
def at(typing_context: Any, address: Any, dtype: Any) -> Any:
    """The record of `dtype` (a global constant) that lies at an address: at(address, MATRIX).n_out."""
    kind = dtype.dtype

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(kind))

    return kind(types.int64, dtype), generate


@intrinsic
def view(typing_context: Any, address: Any, n: Any, item: Any) -> Any:
    """The n numbers at an address as an array; `item` is any number of their type."""
    array = types.Array(item, 1, "C")

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        made = context.make_array(array)(context, builder)
        data = builder.inttoptr(values[0], context.get_data_type(item).as_pointer())
        size = _I64(context.get_abi_sizeof(context.get_data_type(item)))
        arrayobj.populate_array(made, data, [values[1]], [size], size, None)
        return made._getvalue()

    return array(types.int64, types.int64, item), generate


@intrinsic
def call(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Call the compiled function at an address with a tuple of integers; it must be one that cannot raise."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        integers = cgutils.unpack_tuple(builder, values[1], arguments.count)
        kind = ir.FunctionType(_I32, [_POINTER.as_pointer(), _POINTER] + [_I64] * arguments.count)
        result = cgutils.alloca_once(builder, _POINTER)
        target = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(target, [result, ir.Constant(_POINTER, None), *integers])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, arguments.count)), generate


@functools.cache
def address_of(compiled: Any, n_arguments: int) -> int:
    """The machine address of a @kernel that takes n_arguments integers and returns nothing; compiles it if need be."""
    signature = (types.int64,) * n_arguments
    compiled.compile(signature)
    result = compiled.overloads[signature]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))

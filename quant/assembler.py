"""LLVM code written by Python functions: values with operators, loops, conditions, records, functions.

A Python function that takes a Code and values runs once, when a kernel is compiled, and leaves instructions behind: its
own loops and conditions are unrolled and decided then, `code.loop` and `code.when` are those of the compiled code. It
compiles several times faster than the same through numba, and can keep as many sums in registers as there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Union

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from edgert.quant.llvm import F32, I32
from edgert.quant.simd import splat

_I64 = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
Number = Union["Value", int, float]


class Value:
    """One value of compiled code: an int64, a float32, a vector of these, or a truth value."""

    def __init__(self, builder: ir.IRBuilder, llvm: Any) -> None:
        self.builder, self.llvm = builder, llvm

    def _is_integer(self) -> bool:
        return isinstance(getattr(self.llvm.type, "element", self.llvm.type), ir.IntType)

    def _operate(self, other: Number, for_integers: str, for_floats: str, swapped: bool = False) -> Value:
        values = [self.llvm, other.llvm if isinstance(other, Value) else self.llvm.type(other)]
        name = for_integers if self._is_integer() else for_floats
        return Value(self.builder, getattr(self.builder, name)(*(values[::-1] if swapped else values)))

    def _compare(self, symbol: str, other: Number) -> Value:
        right = other.llvm if isinstance(other, Value) else self.llvm.type(other)
        compare = self.builder.icmp_signed if self._is_integer() else self.builder.fcmp_ordered
        return Value(self.builder, compare(symbol, self.llvm, right))

    def __add__(self, other: Number) -> Value:
        return self._operate(other, "add", "fadd")

    def __sub__(self, other: Number) -> Value:
        return self._operate(other, "sub", "fsub")

    def __mul__(self, other: Number) -> Value:
        return self._operate(other, "mul", "fmul")

    def __truediv__(self, other: Number) -> Value:
        return self._operate(other, "none", "fdiv")

    def __floordiv__(self, other: Number) -> Value:
        """Of integers that are not negative."""
        return self._operate(other, "udiv", "none")

    def __mod__(self, other: Number) -> Value:
        """Of integers that are not negative."""
        return self._operate(other, "urem", "none")

    def __radd__(self, other: Number) -> Value:
        return self._operate(other, "add", "fadd", swapped=True)

    def __rsub__(self, other: Number) -> Value:
        return self._operate(other, "sub", "fsub", swapped=True)

    def __rmul__(self, other: Number) -> Value:
        return self._operate(other, "mul", "fmul", swapped=True)

    def __and__(self, other: Value) -> Value:
        return self._operate(other, "and_", "none")

    def __or__(self, other: Value) -> Value:
        return self._operate(other, "or_", "none")

    def __lt__(self, other: Number) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Number) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Number) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Number) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Number) -> Value:
        """Whether both are the same; false if one is not a number."""
        return self._compare("==", other)

    def differs(self, other: Number) -> Value:
        """Whether they are not the same, of integers."""
        return self._compare("!=", other)


class Variable:
    """A place for a value that changes: read and assign `value`."""

    def __init__(self, builder: ir.IRBuilder, first: Value) -> None:
        self._builder, self._place = builder, cgutils.alloca_once(builder, first.llvm.type)
        self.value = first

    @property
    def value(self) -> Value:
        """What was assigned last."""
        return Value(self._builder, self._builder.load(self._place))

    @value.setter
    def value(self, value: Value) -> None:
        self._builder.store(value.llvm, self._place)


class Record:
    """The record at an address, as `edgert.quant.records.record` lays it out: its fields are read and assigned.

    Its own attributes have names that no field has.
    """

    _builder: Any
    _dtype: Any
    location: Value

    def __init__(self, builder: ir.IRBuilder, location: Value, dtype: np.dtype[np.void]) -> None:
        self.__dict__.update(_builder=builder, _dtype=dtype, location=location)

    def _field(self, name: str) -> Any:
        kind, offset = self._dtype.fields[name][:2]
        llvm = _I64 if kind == np.int64 else F32
        return self._builder.inttoptr((self.location + offset).llvm, llvm.as_pointer())

    def __getattr__(self, name: str) -> Value:
        return Value(self._builder, self._builder.load(self._field(name)))

    def __setattr__(self, name: str, value: Number) -> None:
        place = self._field(name)
        llvm = value.llvm if isinstance(value, Value) else _I64(value)
        self._builder.store(llvm, place)


class Code:
    """Where instructions are put."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def value(self, number: Number) -> Value:
        """A constant as a value: int64 of an int, float32 of a float."""
        if isinstance(number, Value):
            return number
        return Value(self.builder, (_I64 if isinstance(number, int) else F32)(number))

    def do(self, operation: Any, *values: Number) -> Value:
        """One of the operations of edgert.quant.simd."""
        return Value(self.builder, operation.emit(self.builder, *(self.value(value).llvm for value in values)))

    def splat(self, number: Number) -> Value:
        """A float in all lanes of a vector."""
        return self.do(splat, self.value(number))

    def variable(self, first: Number) -> Variable:
        """A variable."""
        return Variable(self.builder, self.value(first))

    def record(self, address: Value, dtype: np.dtype[np.void]) -> Record:
        """The record at an address."""
        return Record(self.builder, address, dtype)

    def choose(self, condition: Value, yes: Number, no: Number) -> Value:
        """One of two values."""
        return Value(self.builder, self.builder.select(condition.llvm, self.value(yes).llvm, self.value(no).llvm))

    def smaller(self, a: Number, b: Number) -> Value:
        """The smaller of two integers."""
        return self.choose(self.value(a) < b, a, b)

    def larger(self, a: Number, b: Number) -> Value:
        """The larger of two integers."""
        return self.choose(self.value(a) > b, a, b)

    @contextmanager
    def repeat(self, condition: Callable[[], Value]) -> Iterator[None]:
        """`while condition():`."""
        head, body, after = (self.builder.append_basic_block(name) for name in ("while", "body", "after"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().llvm, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextmanager
    def loop(self, start: Number, end: Number, step: Number = 1) -> Iterator[Value]:
        """`for i in range(start, end, step):` with a step above 0."""
        index = self.variable(start)
        with self.repeat(lambda: index.value < end):
            now = index.value
            yield now
            index.value = now + step

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """`if condition:`."""
        with self.builder.if_then(condition.llvm):
            yield

    @contextmanager
    def either(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """`if condition:` and `else:`, as two context managers."""
        with self.builder.if_else(condition.llvm) as branches:
            yield branches

    def function(self, name: str, n: int, emit: Callable[..., None], inline: bool = True) -> Callable[..., None]:
        """A function of n int64 that emit(code, *values) writes, once for all calls from one compiled kernel."""
        found = self.builder.module.globals.get(name)
        if found is None:
            found = ir.Function(self.builder.module, ir.FunctionType(ir.VoidType(), [_I64] * n), name)
            found.linkage = "internal"
            if not inline:
                found.attributes.add("noinline")
            inner = ir.IRBuilder(found.append_basic_block("entry"))
            emit(Code(inner), *(Value(inner, argument) for argument in found.args))
            inner.ret_void()

        def call(*values: Number) -> None:
            self.builder.call(found, [self.value(value).llvm for value in values])

        return call

    def call_address(self, address: Value, *values: Number) -> None:
        """Call the compiled kernel of int64 arguments at an address; it must be one that cannot raise."""
        kind = ir.FunctionType(I32, [_POINTER.as_pointer(), _POINTER] + [_I64] * len(values))
        result = cgutils.alloca_once(self.builder, _POINTER)
        target = self.builder.inttoptr(address.llvm, kind.as_pointer())
        self.builder.call(target, [result, ir.Constant(_POINTER, None), *(self.value(value).llvm for value in values)])


def operation(n: int) -> Callable[[Callable[..., Any]], Any]:
    """Make an operation for numba kernels of emit(code, *n int64 values), which returns an int64 or nothing.

    Nothing: an int64 0 is returned.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
            made = emit(Code(builder), *(Value(builder, value) for value in values))
            return _I64(0) if made is None else made.llvm

        names = ", ".join(f"a{i}" for i in range(n))
        namespace: dict[str, Any] = {"signature": types.int64(*[types.int64] * n), "generate": generate}
        exec(f"def {emit.__name__}(typing_context, {names}):\n    return signature, generate", namespace)
        made = namespace[emit.__name__]
        made.__doc__, made.__module__ = emit.__doc__, __name__
        return intrinsic(made)

    return decorate

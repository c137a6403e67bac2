"""Products of rows with the keys or values of a block, and keys and values turned to floats beforehand.

A product takes a few rows at a time, with as many sums in registers as there are: each sum is one chain of fused
multiply-adds, so how many are taken together changes no result. Knows one block in each type of the cache, not what the
products are for.
"""

from __future__ import annotations

from llvmlite import ir

from edgert.quant import isa
from edgert.quant.assembler import Code, Number, Value
from edgert.quant.llvm import V_F32
from edgert.quant.simd import fma, interleave_high, interleave_low, to_f32
from edgert.quant.simd_memory import load_f16, load_f32, load_float, load_signed_bytes, prefetch, store_f32

BLOCK = 64  # positions whose scores share one maximum
GROUP = 32  # dimensions of an int8 key or value that share one scale
AHEAD = 16384  # bytes between what is read from memory and what is asked for: half a block of many models
ITEM = {"half": 2, "float": 4, "int8 keys": 1, "int8 values": 1}  # bytes of one number of each kind of matrix
_I64 = ir.IntType(64)


def _ask_for(code: Code, address: Value) -> None:
    """Have a line on its way from memory, but not to the first-level cache, where it would drive out what is in use."""
    prefetch.emit(code.builder, address.llvm, 2)


# ---- products --------------------------------------------------------------------------------------------------------
def _vectors_at_once(n_rows: int) -> int:
    """How many vectors of n_rows sums fit the registers: 24 sums with AVX-512, 6 where a vector takes several."""
    budget = 24 if "avx512f" in isa.cpu_features() else 6
    return next(n for n in (8, 4, 2, 1) if n == 1 or n * n_rows <= budget)


class _Product:
    """c = a b. a: n_rows x n floats, b: n x n_columns of a kind in ITEM, c: n_rows x n_columns floats.

    Strides are in bytes, n_columns is a multiple of 16. scales, of int8: floats (n / 32, 64) of keys, (n_columns / 32,
    64) of values, the second index being the position. `ahead`: whether to ask for what comes AHEAD of b.
    """

    arguments = ("n_rows", "a", "a_stride", "b", "b_stride", "scales", "n", "n_columns", "c", "c_stride")

    def __init__(self, code: Code, kind: str, ahead: bool, values: tuple[Value, ...]) -> None:
        self.code, self.kind, self.item, self.ahead = code, kind, ITEM[kind], ahead
        self.given = dict(zip(self.arguments, values, strict=True))

    def vector(self, at: Value, k: Value, column: Value) -> Value:
        """16 columns of b, from `column` on, which lie at an address."""
        code, scales = self.code, self.given["scales"]
        if self.kind == "half":
            return code.do(load_f16, at)
        if self.kind == "float":
            return code.do(load_f32, at)
        integers = code.do(to_f32, code.do(load_signed_bytes, at))
        if self.kind == "int8 keys":
            return integers * code.do(load_f32, scales + k // GROUP * (4 * BLOCK) + column * 4)
        return integers * code.splat(code.do(load_float, scales + column // GROUP * (4 * BLOCK) + k * 4))

    def sums(self, n_rows: int, n_vectors: int, column: Value) -> None:
        """n_rows x n_vectors sums over all of n, in registers."""
        code, given, builder, width = self.code, self.given, self.code.builder, 16 * self.item
        rows = [given["a"] + given["a_stride"] * row for row in range(n_rows)]
        b, c = given["b"] + column * self.item, given["c"] + column * 4
        before, body = builder.block, builder.append_basic_block("k")
        builder.branch(body)
        builder.position_at_end(body)
        k, at = Value(builder, builder.phi(_I64)), Value(builder, builder.phi(_I64))
        sums = [[Value(builder, builder.phi(V_F32)) for _ in range(n_vectors)] for _ in range(n_rows)]
        vectors = [self.vector(at + width * v, k, column + 16 * v) for v in range(n_vectors)]
        for line in range(0, width * n_vectors if self.ahead else 0, 64):
            _ask_for(code, at + (AHEAD + line))
        new = []
        for row in range(n_rows):
            factor = code.splat(code.do(load_float, rows[row] + k * 4))
            new.append([code.do(fma, vectors[v], factor, sums[row][v]) for v in range(n_vectors)])
        next_k, next_at = k + 1, at + given["b_stride"]
        end, after = builder.block, builder.append_basic_block("sums")
        builder.cbranch((next_k < given["n"]).llvm, body, after)
        carried = [(k, code.value(0), next_k), (at, b, next_at)]
        zero = Value(builder, ir.Constant(V_F32, [0.0] * 16))
        carried += [(sums[row][v], zero, new[row][v]) for row in range(n_rows) for v in range(n_vectors)]
        for phi, first, following in carried:
            phi.llvm.add_incoming(first.llvm, before)
            phi.llvm.add_incoming(following.llvm, end)
        builder.position_at_end(after)
        for row in range(n_rows):
            for v in range(n_vectors):
                code.do(store_f32, c + given["c_stride"] * row + 64 * v, new[row][v])

    def rows(self, n_rows: int) -> None:
        """All columns of n_rows rows: as many vectors at once as registers hold, then fewer."""
        column, most = self.code.variable(0), _vectors_at_once(n_rows)
        for n_vectors in sorted({most, min(most, 4), 1}, reverse=True):
            last = self.given["n_columns"] - 16 * n_vectors
            with self.code.repeat(lambda last=last: column.value <= last):  # type: ignore[misc]   # bound early
                self.sums(n_rows, n_vectors, column.value)
                column.value += 16 * n_vectors


def multiply(code: Code, choices: tuple[int, ...], kind: str, ahead: bool, *values: Number) -> None:
    """A _Product in a function of its own; n_rows is raised to the next of `choices`, a and c have room for that."""

    def emit(code: Code, *values: Value) -> None:
        product = _Product(code, kind, ahead, values)
        for choice, below in zip(choices, (0, *choices), strict=False):
            with code.when((values[0] > below) & (values[0] <= choice)):
                product.rows(choice)

    name = f"edgert_multiply_{'_'.join(map(str, choices))}_{kind.replace(' ', '_')}_{int(ahead)}"
    code.function(name, len(_Product.arguments), emit, inline=False)(*values)


# ---- keys and values as floats ---------------------------------------------------------------------------------------
def wide_floats(d_head: int, width: int) -> int:
    """Floats of work space in which keys (d_head, 64) or values (64, width) and their scales are widened."""
    return BLOCK * max(d_head, width + -(-width // GROUP))


def _widen_halves(code: Code, source: Value, n: Value, to: Value) -> None:
    """n half floats, a multiple of 64, to floats."""
    with code.loop(0, n, 64) as i:
        at, out = source + i * 2, to + i * 4
        for line in (0, 64):
            _ask_for(code, at + (AHEAD + line))
        for part in range(4):
            code.do(store_f32, out + 64 * part, code.do(load_f16, at + 32 * part))


def widen_scales(code: Code, scales: Value, n: Value, to: Value) -> None:
    """Scales (n / 32, 64) of keys or values to floats."""
    with code.loop(0, (n + (GROUP - 1)) // GROUP * BLOCK, 16) as i:
        code.do(store_f32, to + i * 4, code.do(load_f16, scales + i * 2))


def _widen_int8(code: Code, source: Value, scale: Value, to: Value) -> None:
    """16 integers of one scale, or each of its own, to floats."""
    code.do(store_f32, to, code.do(to_f32, code.do(load_signed_bytes, source)) * scale)


def _widen_int8_keys(code: Code, source: Value, scales: Value, d_head: Value, to: Value) -> None:
    """Keys (d_head, 64) int8 with scales (d_head / 32, 64) to floats."""
    with code.loop(0, d_head, GROUP) as first:
        vectors = [code.do(load_f16, scales + first * (128 // GROUP) + 32 * i) for i in range(4)]
        with code.loop(first, code.smaller(first + GROUP, d_head)) as d:
            _ask_for(code, source + d * 64 + AHEAD)
            for i, scale in enumerate(vectors):
                _widen_int8(code, source + d * 64 + 16 * i, scale, to + d * 256 + 64 * i)


def _widen_int8_values(code: Code, source: Value, scales: Value, width: Value, to: Value) -> None:
    """Values (64, width) int8 with scales (width / 32, 64) to floats."""
    wide_scales = to + width * (4 * BLOCK)
    widen_scales(code, scales, width, wide_scales)
    with code.loop(0, 64) as position:
        row, out = source + width * position, to + width * position * 4
        with code.loop(0, width, GROUP) as first:
            scale = code.splat(code.do(load_float, wide_scales + first * (256 // GROUP) + position * 4))
            _ask_for(code, row + first + AHEAD)
            _widen_int8(code, row + first, scale, out + first * 4)
            with code.when(first + 16 < width):
                _widen_int8(code, row + first + 16, scale, out + first * 4 + 64)


def _transposed(code: Code, vectors: list[Value]) -> list[Value]:
    """16 vectors of 16 lanes as a square, transposed: dealing two halves out in turns, four times."""
    for _ in range(4):
        pairs = list(zip(vectors[:8], vectors[8:], strict=True))
        vectors = [code.do(deal, *pair) for pair in pairs for deal in (interleave_low, interleave_high)]
    return vectors


def turn(code: Code, kind: str, source: Value, scales: Value, n: Value, to: Value) -> Value:
    """Keys (n, 64), n a multiple of 16, as values (64, n), floats; scales: of int8, those of the keys."""

    def vector(d: Value, first: int) -> Value:
        """A dimension of 16 positions from `first` on."""
        at = source + (d * BLOCK + first) * ITEM[kind]
        if kind != "int8 keys":
            return code.do(load_f16 if kind == "half" else load_f32, at)
        scale = code.do(load_f16, scales + d // GROUP * (2 * BLOCK) + 2 * first)
        return code.do(to_f32, code.do(load_signed_bytes, at)) * scale

    with code.loop(0, n, 16) as d:
        _ask_for(code, source + d * BLOCK * ITEM[kind] + AHEAD)
        for first in range(0, BLOCK, 16):
            square = _transposed(code, [vector(d + i, first) for i in range(16)])
            for position, values in enumerate(square, first):
                code.do(store_f32, to + (n * position + d) * 4, values)
    return to


def widen(code: Code, kind: str, source: Value, scales: Value, n: Value, to: Value) -> Value:
    """Keys (n, 64) or values (64, n) as floats, at the address returned; `to` has room for wide_floats."""
    if kind == "half":
        _widen_halves(code, source, n * BLOCK, to)
    elif kind == "int8 keys":
        _widen_int8_keys(code, source, scales, n, to)
    elif kind == "int8 values":
        _widen_int8_values(code, source, scales, n, to)
    return source if kind == "float" else to

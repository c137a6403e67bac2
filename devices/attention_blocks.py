"""Attention of some rows over blocks of 64 positions, and how blocks are combined: the arithmetic of the inner loops.

A row is one query: a token and a head. Every number is its own chain of operations, in the order of
`edgert.devices.reference`, so rows may be taken in any number at a time. Knows a block of the cache in each type,
nothing of tokens, threads or layers. Written as LLVM code by Python functions: see quant/assembler.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.attention_products import BLOCK, GROUP, ITEM, multiply, turn, widen, widen_scales
from edgert.quant import reference
from edgert.quant.assembler import Code, Number, Record, Value, operation
from edgert.quant.jit import kernel
from edgert.quant.records import record
from edgert.quant.simd import (
    fma,
    keep_first,
    larger_or_second,
    largest_lane,
    round_i32,
    scale_by_power,
    sum_lanes,
    to_f32,
    zero_below,
)
from edgert.quant.simd_memory import load_f32, load_float, store_f32, store_float

PANEL = 96  # most rows that are taken together: a multiple of MANY, and of 16
AT_ONCE = (1, 2, 3, 4, 6, 8)  # rows in registers, where there are no more
MANY = 6  # and where there are
# Most rows that take keys and values as they are. Measured: widening halves first takes 8 rows 1.4 times as long, 4
# rows 1.7 times; widening int8 first takes one row 1.3 times as long. The others are not measured.
FEW = {"f16": 8, "f32": 8, "int8": 3}
_MORE = {"f16": (MANY,), "f32": (MANY,), "int8": (4, 6, 8)}
_KINDS = {"f16": ("half", "half"), "f32": ("float", "float"), "int8": ("int8 keys", "int8 values")}

RANGE = record("first last")
# Rows of one key/value head, and the blocks to attend to. queries: floats (n_rows, d_head), stride in bytes; the first
# is at `position` and is number `in_group` of the `group` of rows of one token. head: address of the blocks of the
# cache, other fields as in CACHE. ranges, scores, wide: work space, RANGE (n_rows,), floats (n_rows, 64) and
# wide_floats. part and state: see part_bytes. All with room for rows_in_registers(n_rows).
ROWS = record(
    "queries query_stride d_head width n_rows position in_group group window span first_block end_block"
    " head block_bytes n_blocks key_scales values value_scales ranges scores wide part state keep_apart",
    floats="scale",
)
_LOWEST = float(np.finfo(np.float32).min)  # where a running maximum starts: finite, so that differences are numbers


def rows_in_registers(code: Code, n_rows: Value) -> Value:
    """The number of rows that room must be there for, where n_rows are taken together."""
    few = n_rows + code.choose(n_rows.equals(5) | n_rows.equals(7), 1, 0)
    return code.choose(n_rows > AT_ONCE[-1], (n_rows + (MANY - 1)) // MANY * MANY, few)


# ---- scores, weights, parts ------------------------------------------------------------------------------------------
def _exp(code: Code, x: Value) -> Value:
    """e**x of 16 lanes that are not above 0, or not numbers; the same bits as reference.exp."""
    low = code.splat(float(reference.EXP_LOWEST))
    clamped = code.do(larger_or_second, low, x)
    exponent = code.do(round_i32, clamped * code.splat(float(reference.LOG2_E)))
    n = code.do(to_f32, exponent)
    r = code.do(fma, n, code.splat(-float(reference.LN2_HIGH)), clamped)
    r = code.do(fma, n, code.splat(-float(reference.LN2_LOW)), r)
    p, *others = (code.splat(float(coefficient)) for coefficient in reference.EXP_COEFFICIENTS)
    for coefficient in others:
        p = code.do(fma, p, r, coefficient)
    y = code.do(fma, p, r * r, r) + code.splat(1.0)
    return code.do(zero_below, code.do(scale_by_power, y, exponent), x, low)


def _weigh(
    code: Code, scores: Value, first: Value, last: Value, factor: Value, largest_at: Value, sum_at: Value
) -> None:
    """Turn 64 products into weights, 0 outside of first to last; their maximum and sum to largest_at and sum_at."""
    scale, lowest = code.splat(code.do(load_float, factor)), code.splat(-np.inf)
    scaled = [code.variable(code.do(load_f32, scores + 64 * i) * scale) for i in range(4)]
    with code.when((first > 0) | (last < BLOCK)):
        for i, part in enumerate(scaled):
            below = code.do(keep_first, part.value, last - 16 * i, lowest)
            part.value = code.do(keep_first, lowest, first - 16 * i, below)
    s = [part.value for part in scaled]
    # A score that is not a number may be lost here; its own weight is none either, and makes the sum none.
    pairs = [code.do(larger_or_second, s[i], s[i + 1]) for i in (0, 2)]
    largest = code.do(largest_lane, code.do(larger_or_second, *pairs))
    w = [_exp(code, score - code.splat(largest)) for score in s]
    for i in range(4):
        code.do(store_f32, scores + 64 * i, w[i])
    code.do(store_float, largest_at, largest)
    code.do(store_float, sum_at, code.do(sum_lanes, ((w[0] + w[1]) + w[2]) + w[3]))


def lanes_bytes(n_rows: Value) -> Value:
    """Bytes of a float for each row, and up to a multiple of 16 rows."""
    return (n_rows + 15) // 16 * 64


def part_bytes(code: Code, n_rows: Value, width: Value) -> Value:
    """Bytes of a part, the attention of rows over some positions.

    largest score, sum of weights and a spare float for each row (a multiple of 16 rows), then outputs (rows, width),
    not yet divided by the sum.
    """
    return lanes_bytes(n_rows) * 3 + rows_in_registers(code, n_rows) * width * 4


def clear(code: Code, part: Value, n_rows: Value, width: Value) -> None:
    """Make a part that of no positions."""
    lanes = lanes_bytes(n_rows)
    with code.loop(0, lanes, 64) as i:
        code.do(store_f32, part + i, code.splat(_LOWEST))
    with code.loop(lanes, part_bytes(code, n_rows, width), 64) as i:
        code.do(store_f32, part + i, code.splat(0.0))


def _add_sums(code: Code, total: Value, block: Value, n_rows: Value) -> None:
    """Add the sums of weights of one more block; the shares of both in the outputs are left in the block's part."""
    lanes = lanes_bytes(n_rows)
    with code.loop(0, lanes, 64) as i:
        before, here = code.do(load_f32, total + i), code.do(load_f32, block + i)
        largest = code.do(larger_or_second, before, here)
        old_share, share = _exp(code, before - largest), _exp(code, here - largest)
        code.do(store_f32, total + i, largest)
        code.do(store_f32, block + i, old_share)
        code.do(store_f32, block + lanes * 2 + i, share)
        sums, place = code.do(load_f32, block + lanes + i) * share, total + lanes + i
        code.do(store_f32, place, code.do(fma, code.do(load_f32, place), old_share, sums))


def _add_row(code: Code, total: Value, block: Value, lanes: Value, width: Value, row: Value, out: Value) -> None:
    """Add the output of one more block, which lies at `out`, to that of one row; without positions its sum is 0."""
    seen = code.do(load_float, block + lanes + row * 4)
    with code.when(Value(code.builder, code.builder.fcmp_unordered("!=", seen.llvm, seen.llvm.type(0.0)))):
        old_share = code.splat(code.do(load_float, block + row * 4))
        share = code.splat(code.do(load_float, block + lanes * 2 + row * 4))
        place = total + lanes * 3 + row * width * 4
        with code.loop(0, width * 4, 64) as i:
            here = code.do(load_f32, out + i) * share
            code.do(store_f32, place + i, code.do(fma, code.do(load_f32, place + i), old_share, here))


def add_part(code: Code, total: Value, block: Value, n_rows: Value, width: Value) -> None:
    """Add the part of one more block to the part of those before it; the block's is changed."""
    lanes = lanes_bytes(n_rows)
    _add_sums(code, total, block, n_rows)
    with code.loop(0, n_rows) as row:
        _add_row(code, total, block, lanes, width, row, block + lanes * 3 + row * width * 4)


# ---- blocks ----------------------------------------------------------------------------------------------------------
def span_start(code: Code, span: Value, position: Value) -> Value:
    """Where the stretch of `span` positions begins that a position is in; 0 where there are no stretches."""
    start = code.variable(0)
    with code.when(span > 0):
        start.value = position // span * span
    return start.value


def _set_ranges(code: Code, rows: Record, block: Value) -> None:
    """Which positions of a block each row attends to."""
    end, in_group = code.variable(rows.position + 1 - block * BLOCK), code.variable(rows.in_group)
    with code.loop(0, rows.n_rows) as row:
        here = code.record(rows.ranges + row * RANGE.itemsize, RANGE)
        first = code.choose(rows.window > 0, code.larger(0, end.value - rows.window), 0)
        begin = span_start(code, rows.span, end.value - 1 + block * BLOCK) - block * BLOCK
        here.first = code.larger(first, begin)
        here.last = code.smaller(BLOCK, end.value)
        next_token = (in_group.value + 1).equals(rows.group)
        end.value += code.choose(next_token, 1, 0)
        in_group.value = code.choose(next_token, 0, in_group.value + 1)


class _Blocks:
    """Attention of a ROWS record over its blocks, for a type of the cache and few rows, or more than that.

    Few rows take keys and values as they are, each read once. For more they are widened first, once for all of them.
    once: the last `width` dimensions of keys are the values, which the cache has not apart.
    """

    def __init__(self, code: Code, kv_type: str, rows: Record, few: bool, once: bool) -> None:
        self.code, self.rows, self.few, self.once = code, rows, few, once
        self.key_kind, self.value_kind = _KINDS[kv_type]
        self.choices = tuple(n for n in AT_ONCE if n <= FEW[kv_type]) if few else (1, *_MORE[kv_type])
        self.lanes, self.width_bytes = lanes_bytes(rows.n_rows), rows.width * 4
        self.together = code.choose(rows.n_rows > AT_ONCE[-1], MANY, rows_in_registers(code, rows.n_rows))
        self.added = rows.keep_apart.equals(0)  # to the state, rather than kept apart

    def range_of(self, row: Value) -> Record:
        """RANGE of a row."""
        return self.code.record(self.rows.ranges + row * RANGE.itemsize, RANGE)

    def numbers(self, kind: str, source: Value, scales: Value, n: Value) -> tuple[Value, Value]:
        """Addresses of keys or values, as they are multiplied with, and of their scales."""
        wide = self.rows.wide
        if not self.few:
            return widen(self.code, kind, source, scales, n, wide), wide
        if "int8" in kind:
            widen_scales(self.code, scales, n, wide)
        return source, wide

    def multiply(self, kind: str, n_rows: Value, a: Value, a_stride: Number, b: Value, *others: Number) -> None:
        """A product with numbers of a kind, or with what they are widened to."""
        multiply(self.code, self.choices, kind if self.few else "float", self.few, n_rows, a, a_stride, b, *others)

    def item(self, kind: str) -> int:
        """Bytes of a number."""
        return ITEM[kind if self.few else "float"]

    def run(self) -> None:
        """All blocks."""
        code, rows = self.code, self.rows
        part = code.variable(rows.part)
        with code.loop(rows.first_block, rows.end_block) as number:
            block = rows.head + number % rows.n_blocks * rows.block_bytes
            _set_ranges(code, rows, number)
            self.weigh(block, part.value)
            with code.when(self.added):
                _add_sums(code, rows.state, part.value, rows.n_rows)
            self.sum_values(block, part.value)
            part.value += code.choose(self.added, 0, part_bytes(code, rows.n_rows, rows.width))

    def weigh(self, block: Value, part: Value) -> None:
        """Weights of all rows; their largest scores and sums into the part."""
        code, rows, kind = self.code, self.rows, self.key_kind
        weigh = code.function("edgert_weigh", 6, _weigh)
        scale = rows.location + ROWS.fields["scale"][1]  # type: ignore[index]   # a record has fields
        keys, scales = self.numbers(kind, block, block + rows.key_scales, rows.d_head)
        stride = BLOCK * self.item(kind)
        with code.loop(0, rows.n_rows, self.together) as start:
            queries, scores = rows.queries + start * rows.query_stride, rows.scores + start * 256
            given = queries, rows.query_stride, keys, stride, scales, rows.d_head, BLOCK, scores, 256
            self.multiply(kind, self.together, *given)
            with code.loop(start, code.smaller(start + self.together, rows.n_rows)) as row:
                here = self.range_of(row)
                largest, total = part + row * 4, part + self.lanes + row * 4
                with code.either(here.first < here.last) as (then, otherwise):
                    with then:
                        weigh(rows.scores + row * 256, here.first, here.last, scale, largest, total)
                    with otherwise:
                        code.do(store_float, largest, _LOWEST)
                        code.do(store_float, total, 0.0)

    def values(self, block: Value) -> tuple[str, Value, Value]:
        """The kind of values, and addresses as of numbers()."""
        rows, kind = self.rows, self.key_kind
        if not self.once:
            found = self.numbers(self.value_kind, block + rows.values, block + rows.value_scales, rows.width)
            return self.value_kind, *found
        first = rows.d_head - rows.width
        scales = block + rows.key_scales + first // GROUP * (2 * BLOCK)
        turned = turn(self.code, kind, block + first * (BLOCK * ITEM[kind]), scales, rows.width, rows.wide)
        return "float", turned, rows.wide

    def sum_values(self, block: Value, part: Value) -> None:
        """Weighted sums of values, into the state or the part."""
        code, rows = self.code, self.rows
        kind, values, scales = self.values(block)
        stride, out = rows.width * self.item(kind), part + self.lanes * 3
        with code.loop(0, rows.n_rows, self.together) as start:
            end = code.smaller(start + self.together, rows.n_rows)
            first_row, last_row = self.range_of(start), self.range_of(end - 1)
            # One by one if need be: positions outside of a row's range must not touch it, they may be infinite.
            same = first_row.first.equals(last_row.first) & first_row.last.equals(last_row.last)
            step = code.choose(same, self.together, 1)
            with code.loop(start, end, step) as row, code.when(self.range_of(row).first < self.range_of(row).last):
                here = self.range_of(row)
                weights, there = rows.scores + row * 256 + here.first * 4, values + stride * here.first
                to = out + code.choose(self.added, row - start, row) * self.width_bytes
                given = weights, 256, there, stride, scales + here.first * 4, here.last - here.first, rows.width
                self.multiply(kind, step, *given, to, self.width_bytes)
            with code.when(self.added), code.loop(start, end) as row:
                place = out + (row - start) * self.width_bytes
                _add_row(code, rows.state, part, self.lanes, rows.width, row, place)


def _attend_blocks_operation(kv_type: str, once: bool) -> Any:
    def attend_blocks(code: Code, rows_address: Value) -> None:
        """Either path, for a type of the cache."""
        rows = code.record(rows_address, ROWS)
        with code.either(rows.n_rows <= FEW[kv_type]) as (then, otherwise):
            with then:
                _Blocks(code, kv_type, rows, True, once).run()
            with otherwise:
                _Blocks(code, kv_type, rows, False, once).run()

    return operation(1)(attend_blocks)


_TYPES = ("f16", "f32", "int8")
_attend_f16, _attend_f32, _attend_int8 = (_attend_blocks_operation(kv_type, False) for kv_type in _TYPES)
_once_f16, _once_f32, _once_int8 = (_attend_blocks_operation(kv_type, True) for kv_type in _TYPES)


@kernel
def attend_blocks_f16(rows: int) -> None:
    """Attention of a ROWS record over some blocks of half floats.

    Each block's part is left in a row of parts if `keep_apart`, otherwise all are added to the state.
    """
    _attend_f16(rows)


@kernel
def attend_blocks_f32(rows: int) -> None:
    """The same over floats."""
    _attend_f32(rows)


@kernel
def attend_blocks_int8(rows: int) -> None:
    """The same over int8."""
    _attend_int8(rows)


@kernel
def attend_once_f16(rows: int) -> None:
    """The same over half floats, where the last dimensions of a key are its value."""
    _once_f16(rows)


@kernel
def attend_once_f32(rows: int) -> None:
    """The same over floats."""
    _once_f32(rows)


@kernel
def attend_once_int8(rows: int) -> None:
    """The same over int8."""
    _once_int8(rows)


ATTEND_ONCE = {"f16": attend_once_f16, "f32": attend_once_f32, "int8": attend_once_int8}
ATTEND_BLOCKS = {"f16": attend_blocks_f16, "f32": attend_blocks_f32, "int8": attend_blocks_int8}

"""Kernels that multiply packed tiles with rows of activations: one for each format, number of rows and kind of rows.

They are written as LLVM instructions, with loops over rows and vectors unrolled here, in Python: accumulators stay in
registers, and numba has next to nothing to compile. Columns ascend; one fused multiply-add per group of columns, whose
dot product is exact in int32 (per column with float rows), so a row's result does not depend on its neighbours.

Rows come in blocks. A block of n rows holds, for each group of 32 columns, the int8 integers of each row, then n
scales, then n first and n second factors. Factors correct for a format's offset (int32, -offset * sum) or carry its
minimum (float32, scale * sum), for each half of the group where the format's groups are of 16. A block of one row holds
plain sums of both halves instead, so that it serves every format. Blocks of float rows hold n floats for each column.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from edgert.quant import simd, simd_memory
from edgert.quant.formats import FORMATS, GROUP, Format
from edgert.quant.jit import inner
from edgert.quant.llvm import F32, I8, I16, I32, V_F32, V_I8, V_I32
from edgert.quant.simd_paths import emit_dot4, emit_dot4_signed, emit_look_up, takes_signed

ROWS = (8, 4, 1)  # rows that a kernel computes at a time, the largest first
GROUP_BYTES = GROUP + 12  # of one row: integers, scale, two factors
_TABLE_OFFSET = 128  # added to the values of tables where the left side of a dot product is unsigned
_FLOAT_TILES = 4  # that one row of floats is multiplied with at a time: a single chain of additions would be waited for
# Bytes between a read and the read-ahead, which goes to the second-level cache: it waits for more lines at a time than
# the first. Measured with two threads: 93 % of what a plain loop reads; without it 63 %, into the first level 85 %.
_AHEAD = 4096

_I64 = ir.IntType(64)
_V_I16, _BYTES = ir.VectorType(I16, 32), ir.VectorType(I8, 16)


def offset(format: Format) -> int:
    """What the dot product takes from every integer of the format: a power of two, or 0 where it takes signed ones."""
    if _needs_8_bits(format):
        return 0 if takes_signed() else _TABLE_OFFSET
    return format.offset


def _needs_8_bits(format: Format) -> bool:
    """Whether integers fill a byte, as the dot product takes them, and an offset may make them signed."""
    return bool(format.table) or (format.bits == 8 and not format.has_minimum)


@functools.cache
def tile_kernel(name: str, rows: int, quantised: bool) -> Any:
    """The kernel for a format and a number of rows, int8 or float.

    It takes eight integers: address of the first tile; number of tiles; columns; address of the first block of rows;
    number of blocks; address of the output; floats from one of its rows to the next; address of 16 floats a tile that
    are added to each row, or 0.
    """

    kind = int(quantised)  # numba knows integers as literals, but not booleans

    def multiply_tiles(
        tiles: int, n_tiles: int, n_in: int, x: int, n_blocks: int, out: int, out_stride: int, bias: int
    ) -> None:
        _multiply_tiles(name, rows, kind, tiles, n_tiles, n_in, x, n_blocks, out, out_stride, bias)

    # A name of its own, since numba's cache goes by names: two processes that compile at the same time would else write
    # different kernels to one file.
    multiply_tiles.__name__ = multiply_tiles.__qualname__ = f"tiles_{name.replace('-', '_')}_{rows}_{kind}"
    return inner(multiply_tiles)


@intrinsic
def _multiply_tiles(
    typing_context: Any,
    name: Any,
    rows: Any,
    quantised: Any,
    tiles: Any,
    n_tiles: Any,
    n_in: Any,
    x: Any,
    n_blocks: Any,
    out: Any,
    out_stride: Any,
    bias: Any,
) -> Any:
    if not all(isinstance(value, types.Literal) for value in (name, rows, quantised)):
        return None
    format = FORMATS[name.literal_value]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        kind = _Integers if format.is_integer and quantised.literal_value else _Floats
        kind(builder, format, rows.literal_value).emit(*values[3:])
        return context.get_dummy_value()

    return types.void(name, rows, quantised, *[types.int64] * 8), generate


class _Kernel:
    """The loops over tiles and blocks of rows."""

    def __init__(self, builder: ir.IRBuilder, format: Format, rows: int) -> None:
        self.builder, self.format, self.rows = builder, format, rows

    def emit(
        self, tiles: Any, n_tiles: Any, n_in: Any, x: Any, n_blocks: Any, out: Any, stride: Any, bias: Any
    ) -> None:
        b, size = self.builder, _I64(self.format.block_bytes)
        tile_bytes = b.mul(b.udiv(n_in, _I64(self.format.block)), size)
        row_bytes = b.mul(n_in, _I64(4)) if self.takes_floats else b.mul(b.udiv(n_in, _I64(32)), _I64(GROUP_BYTES))
        block_bytes = b.mul(row_bytes, _I64(self.rows))

        def run(first: Any, count: Any, at_once: int) -> None:
            with cgutils.for_range(b, count) as step:
                index = b.add(first, b.mul(step.index, _I64(at_once)))
                tile = b.add(tiles, b.mul(index, tile_bytes))
                with cgutils.for_range(b, n_blocks) as block:
                    rows = b.add(x, b.mul(block.index, block_bytes))
                    totals = self.dot([self.plus(tile, b.mul(tile_bytes, _I64(i))) for i in range(at_once)], n_in, rows)
                    for i in range(at_once):
                        at = b.add(b.mul(b.add(index, _I64(i)), _I64(64)), out)
                        self.store(totals[i], at, block.index, stride, bias, b.sub(at, out))

        at_once = _FLOAT_TILES if self.takes_floats and self.rows == 1 else 1
        several = b.udiv(n_tiles, _I64(at_once))
        run(_I64(0), several, at_once)
        if at_once > 1:
            done = b.mul(several, _I64(at_once))
            run(done, b.sub(n_tiles, done), 1)

    takes_floats = False

    @property
    def table_offset(self) -> int:
        """What is added to the values of a table."""
        return _TABLE_OFFSET

    def dot(self, tiles: list[Any], n_in: Any, x: Any) -> list[list[Any]]:
        """Totals of each tile and row."""
        raise NotImplementedError  # _Integers and _Floats have it

    def store(self, totals: list[Any], at: Any, block: Any, stride: Any, bias: Any, bias_at: Any) -> None:
        """Write one tile's totals, a vector for each row."""
        b = self.builder
        added = cgutils.alloca_once_value(b, ir.Constant(V_F32, [0.0] * 16))
        with b.if_then(b.icmp_unsigned("!=", bias, _I64(0))):
            b.store(simd_memory.load_f32.emit(b, b.add(bias, bias_at)), added)
        row = b.mul(block, _I64(self.rows))
        for t, total in enumerate(totals):
            address = b.add(at, b.mul(b.mul(b.add(row, _I64(t)), stride), _I64(4)))
            plain = b.load(total)
            value = b.select(b.icmp_unsigned("!=", bias, _I64(0)), b.fadd(plain, b.load(added)), plain)
            simd_memory.store_f32.emit(b, address, value)

    # ---- small ones --------------------------------------------------------------------------------------------------
    def plus(self, address: Any, bytes_: Any) -> Any:
        """An address some bytes on."""
        return self.builder.add(address, bytes_ if isinstance(bytes_, ir.Value) else _I64(bytes_))

    def zeros(self, n: int) -> list[Any]:
        """n float accumulators, zero."""
        made = [cgutils.alloca_once(self.builder, V_F32) for _ in range(n)]
        for total in made:
            self.builder.store(ir.Constant(V_F32, [0.0] * 16), total)
        return made

    def splat(self, address: Any, kind: ir.Type) -> Any:
        """The one number at an address in all lanes."""
        return simd._splat(self.builder, simd._load(self.builder, address, kind))

    def vectors(self, at: Any) -> list[Any]:
        """The 8 vectors of unsigned bytes of 32 columns whose planes lie at an address."""
        b, bits = self.builder, self.format.bits
        if bits == 8:
            return [simd_memory.load_i8.emit(b, self.plus(at, 64 * j)) for j in range(8)]
        parts, position, plane_at = [], 0, 0
        for plane in (4, 2, 1):
            if bits & plane:
                shared = 8 // plane
                loaded = [simd_memory.load_i8.emit(b, self.plus(at, plane_at + 64 * i)) for i in range(8 // shared)]
                mask = (1 << plane) - 1
                parts.append([self.bits(loaded[j // shared], j % shared * plane, position, mask) for j in range(8)])
                position, plane_at = position + plane, plane_at + 64 * plane
        joined = parts[0]
        for other in parts[1:]:
            joined = [b.or_(low, high) for low, high in zip(joined, other, strict=True)]
        if self.format.table:
            table = tuple((value + self.table_offset) % 256 for value in self.format.table)
            return [emit_look_up(b, vector, table) for vector in joined]
        return joined

    def bits(self, packed: Any, start: int, position: int, mask: int) -> Any:
        """The bits of every byte from `start` on under a mask, moved to `position`."""
        b, words = self.builder, self.builder.bitcast(packed, _V_I16)
        if start > position:
            words = b.lshr(words, ir.Constant(_V_I16, [start - position] * 32))
        elif start < position:
            words = b.shl(words, ir.Constant(_V_I16, [position - start] * 32))
        return b.and_(b.bitcast(words, V_I8), ir.Constant(V_I8, [mask << position] * 64))

    def scale(self, at: Any, group: Any, of_minimum: bool) -> Any:
        """The 16 scales, or minima, of a group of the block at `at`; `group` is its number in the block."""
        b, f = self.builder, self.format
        table = self.plus(at, f.block // GROUP * f.chunk_bytes + (f.scale_bytes if of_minimum else 0))
        if f.is_e8m0:
            return self.powers(self.numbers(self.plus(table, b.mul(group, _I64(16)))))
        if not f.scale_bits:
            return simd_memory.load_f16.emit(b, self.plus(table, b.mul(group, _I64(32))))
        if f.scale_bits == 8:
            stored = self.numbers(self.plus(table, b.mul(group, _I64(16))))
        else:
            stored = self.small_numbers(table, group, 4)
            if f.scale_bits == 6:
                high = self.small_numbers(self.plus(table, f.block // f.group * 8), group, 2)
                stored = b.or_(stored, b.shl(high, ir.Constant(V_I32, [4] * 16)))
        if f.scale_offset and not of_minimum:
            stored = b.sub(stored, ir.Constant(V_I32, [f.scale_offset] * 16))
        both = 2 if f.has_minimum else 1
        above = self.plus(at, f.block // GROUP * f.chunk_bytes + both * f.scale_bytes + (32 if of_minimum else 0))
        return b.fmul(b.sitofp(stored, V_F32), simd_memory.load_f16.emit(b, above))

    def numbers(self, address: Any) -> Any:
        """16 bytes as unsigned integers."""
        return self.builder.zext(simd._load(self.builder, address, _BYTES), V_I32)

    def small_numbers(self, plane: Any, group: Any, bits: int) -> Any:
        """The 16 integers of a group in a plane of 4 or 2 bits, over vectors of 16 bytes."""
        b, shared = self.builder, 8 // bits
        loaded = self.numbers(self.plus(plane, b.mul(b.udiv(group, _I64(shared)), _I64(16))))
        shift = b.trunc(b.mul(b.urem(group, _I64(shared)), _I64(bits)), I32)
        return b.and_(b.lshr(loaded, simd._splat(b, shift)), ir.Constant(V_I32, [(1 << bits) - 1] * 16))

    def powers(self, exponents: Any) -> Any:
        """2**(e - 127) / 2 of 16 bytes; the lowest two are below the normal floats."""
        b = self.builder

        def number(n: int) -> Any:
            return ir.Constant(V_I32, [n] * 16)

        normal = b.shl(b.sub(exponents, number(1)), number(23))
        low = b.select(b.icmp_unsigned("==", exponents, number(0)), number(0x00200000), number(0x00400000))
        return b.bitcast(b.select(b.icmp_unsigned("<", exponents, number(2)), low, normal), V_F32)

    def group(self, chunk: Any, half: int) -> Any:
        """The number in its block of the group that half of a chunk of 32 columns belongs to."""
        b, columns = self.builder, self.format.group
        if columns == 16:
            return b.add(b.mul(chunk, _I64(2)), _I64(half))
        return b.udiv(chunk, _I64(columns // GROUP))


class _Integers(_Kernel):
    """int8 rows."""

    def dot(self, tiles: list[Any], n_in: Any, x: Any) -> list[list[Any]]:
        b, f = self.builder, self.format
        (tile,), totals = tiles, self.zeros(self.rows)
        chunks = f.block // GROUP
        with cgutils.for_range(b, b.udiv(n_in, _I64(f.block))) as block:
            at = self.plus(tile, b.mul(block.index, _I64(f.block_bytes)))
            block_x = self.plus(x, b.mul(block.index, _I64(chunks * self.rows * GROUP_BYTES)))
            with cgutils.for_range(b, _I64(chunks)) as chunk:
                rows = self.plus(block_x, b.mul(chunk.index, _I64(self.rows * GROUP_BYTES)))
                self.chunk(at, chunk.index, rows, totals)
        return [totals]

    def chunk(self, at: Any, chunk: Any, x: Any, totals: list[Any]) -> None:
        """Add what 32 columns give to the total of each row."""
        b, f = self.builder, self.format
        integers = self.plus(at, b.mul(chunk, _I64(f.chunk_bytes)))
        if self.rows == 1:
            for line in range(0, f.block_bytes * GROUP // f.block, 64):
                simd_memory.prefetch.emit(b, self.plus(integers, line + _AHEAD), level=2)
        vectors = self.vectors(integers)
        halves = 2 if f.group == 16 else 1
        width = 8 // halves
        for half in range(halves):
            group = self.group(chunk, half)
            scale = self.scale(at, group, False)
            minimum = self.scale(at, group, True) if f.has_minimum else None
            for t in range(self.rows):
                dots = self.start(x, t, half, halves)
                for j in range(half * width, half * width + width):
                    four = simd_memory.broadcast4.emit(b, self.plus(x, GROUP * t + 4 * j))
                    dots = self.dot4(dots, vectors[j], four)
                x_scale = self.splat(self.plus(x, GROUP * self.rows + 4 * t), F32)
                total = simd.fma.emit(b, b.sitofp(dots, V_F32), b.fmul(scale, x_scale), b.load(totals[t]))
                if minimum is not None:
                    total = simd.fma.emit(b, minimum, self.minimum_factor(x, t, half, halves), total)
                b.store(total, totals[t])

    def dot4(self, total: Any, weights: Any, x: Any) -> Any:
        """Add four products in each lane."""
        if _needs_8_bits(self.format):
            return (emit_dot4_signed if takes_signed() else emit_dot4)(self.builder, total, weights, x)
        return emit_dot4(self.builder, total, weights, x, below_128=self.format.bits < 8)

    @property
    def table_offset(self) -> int:
        """What is added to the values of a table."""
        return offset(self.format)

    def vectors(self, at: Any) -> list[Any]:
        """As unsigned bytes; signed ones where the dot product takes those."""
        made = super().vectors(at)
        if self.format.table or not _needs_8_bits(self.format) or not takes_signed():
            return made
        return [self.builder.xor(vector, ir.Constant(V_I8, [-128] * 64)) for vector in made]

    def factor_at(self, x: Any, t: int, half: int) -> Any:
        return self.plus(x, (GROUP + 4 + 4 * half) * self.rows + 4 * t)

    def sum(self, x: Any, half: int, halves: int) -> Any:
        """The sum of the one row's integers in a half, or all, of a group."""
        b = self.builder
        first = simd._load(b, self.factor_at(x, 0, half), I32)
        return first if halves == 2 else b.add(first, simd._load(b, self.factor_at(x, 0, 1), I32))

    def start(self, x: Any, t: int, half: int, halves: int) -> Any:
        """What a dot product starts from: the correction for the offset, in all lanes."""
        b, off = self.builder, offset(self.format)
        if not off:
            return ir.Constant(V_I32, [0] * 16)
        if self.rows == 1:
            return simd._splat(b, b.mul(self.sum(x, half, halves), I32(-off)))
        return self.splat(self.factor_at(x, t, half), I32)

    def minimum_factor(self, x: Any, t: int, half: int, halves: int) -> Any:
        b = self.builder
        if self.rows > 1:
            return self.splat(self.factor_at(x, t, half), F32)
        scale = simd._load(b, self.plus(x, GROUP), F32)
        return simd._splat(b, b.fmul(scale, b.sitofp(self.sum(x, half, halves), F32)))


class _Floats(_Kernel):
    """Float rows: the weights of a column are made floats, then multiplied."""

    takes_floats = True

    def dot(self, tiles: list[Any], n_in: Any, x: Any) -> list[list[Any]]:
        b, f = self.builder, self.format
        totals = [self.zeros(self.rows) for _ in tiles]
        chunks = max(1, f.block // GROUP)
        with cgutils.for_range(b, b.udiv(n_in, _I64(f.block))) as block:
            row_bytes = 4 * self.rows
            block_x = self.plus(x, b.mul(block.index, _I64(f.block * row_bytes)))
            blocks = [self.plus(tile, b.mul(block.index, _I64(f.block_bytes))) for tile in tiles]
            if not f.is_integer:
                for at, total in zip(blocks, totals, strict=True):
                    self.column(self.float_weights(at), block_x, total)
            else:
                with cgutils.for_range(b, _I64(chunks)) as chunk:
                    rows = self.plus(block_x, b.mul(chunk.index, _I64(GROUP * row_bytes)))
                    for at, total in zip(blocks, totals, strict=True):
                        self.chunk(at, chunk.index, rows, total)
        return totals

    def column(self, weights: Any, x: Any, totals: list[Any]) -> None:
        """Add one column's products to the total of each row."""
        b = self.builder
        for t, total in enumerate(totals):
            b.store(simd.fma.emit(b, weights, self.splat(self.plus(x, 4 * t), F32), b.load(total)), total)

    def float_weights(self, at: Any) -> Any:
        load = {"f16": simd_memory.load_f16, "bf16": simd_memory.load_bf16, "f32": simd_memory.load_f32}[
            self.format.name
        ]
        return load.emit(self.builder, at)

    def chunk(self, at: Any, chunk: Any, x: Any, totals: list[Any]) -> None:
        b, f = self.builder, self.format
        vectors = self.vectors(self.plus(at, b.mul(chunk, _I64(f.chunk_bytes))))
        for column in range(GROUP):
            if column % min(f.group, GROUP) == 0:
                group = self.group(chunk, column // 16)
                scale = self.scale(at, group, False)
                minimum = self.scale(at, group, True) if f.has_minimum else ir.Constant(V_F32, [0.0] * 16)
            number = b.bitcast(vectors[column // 4], V_I32)
            number = b.lshr(number, ir.Constant(V_I32, [column % 4 * 8] * 16))
            number = b.and_(number, ir.Constant(V_I32, [255] * 16))
            taken = _TABLE_OFFSET if f.table else f.offset
            number = b.sub(number, ir.Constant(V_I32, [taken] * 16))
            weights = simd.fma.emit(b, b.sitofp(number, V_F32), scale, minimum)
            self.column(weights, self.plus(x, 4 * self.rows * column), totals)

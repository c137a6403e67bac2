"""The two vector operations whose instructions differ between paths: the dot product of four bytes, and the byte table.

Every way is exact: integer products are widened before they could overflow or saturate. `isa` says which way is taken;
nothing here knows numba or a weight format. All work on 16 lanes of four bytes, cut to the machine's registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from edgert.quant import isa
from edgert.quant.llvm import I8, I16, I32, V_I8, V_I32, call, constant, joined, parts


# ---- dot products: total + the four products of each lane, for one register ------------------------------------------
def _vpdpbusd(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """x86 with VNNI: one instruction."""
    bits = 32 * total.type.count
    if not isa.vpdpbusd_takes_bytes(bits):
        unsigned, signed = builder.bitcast(unsigned, total.type), builder.bitcast(signed, total.type)
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{bits}", total.type, total, unsigned, signed)


_PMADDUBSW = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
_PMADDWD = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _pmadd(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """x86 without VNNI: pairs of bytes to int16, which saturates from 128 on; beyond, even and odd bytes, widened."""
    lanes = total.type.count
    words = ir.VectorType(I16, 2 * lanes)
    if below_128:
        pairs = call(builder, _PMADDUBSW[lanes], words, unsigned, signed)
        return builder.add(total, call(builder, _PMADDWD[lanes], total.type, pairs, constant(words, 1)))
    u, s, eight = builder.bitcast(unsigned, words), builder.bitcast(signed, words), constant(words, 8)
    u_even, s_even = builder.and_(u, constant(words, 255)), builder.ashr(builder.shl(s, eight), eight)
    total = builder.add(total, call(builder, _PMADDWD[lanes], total.type, u_even, s_even))
    u_odd, s_odd = builder.lshr(u, eight), builder.ashr(s, eight)
    return builder.add(total, call(builder, _PMADDWD[lanes], total.type, u_odd, s_odd))


def _usdot(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """ARM with i8mm: one instruction."""
    return call(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", total.type, total, unsigned, signed)


def _sdot(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """ARM with dotprod, signed times signed: u * s = (u - 128) * s + 128 * s; LLVM computes equal corrections once."""
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    if below_128:
        return call(builder, name, total.type, total, unsigned, signed)
    moved = builder.xor(unsigned, constant(unsigned.type, -128))
    zero, ones, seven = constant(total.type, 0), constant(signed.type, 1), constant(total.type, 7)
    correction = builder.shl(call(builder, name, total.type, zero, signed, ones), seven)
    return builder.add(call(builder, name, total.type, total, moved, signed), correction)


def _smull(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """Any 64-bit ARM: products in int16, where below 128 a sum of two still fits; else moved by 128 as in _sdot."""
    words, half = ir.VectorType(I16, 8), ir.VectorType(I32, 4)
    moved = unsigned if below_128 else builder.xor(unsigned, constant(unsigned.type, -128))
    products = [
        call(builder, "llvm.aarch64.neon.smull.v8i16", words, u, s)
        for u, s in zip(parts(builder, moved, 2), parts(builder, signed, 2), strict=True)
    ]

    def add_pairs(value: Any) -> Any:
        return call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", half, value)

    if below_128:
        pairs = call(builder, "llvm.aarch64.neon.addp.v8i16", words, *products)
        return builder.add(total, add_pairs(pairs))
    sums = call(builder, "llvm.aarch64.neon.addp.v4i32", half, *(add_pairs(product) for product in products))
    signed_sums = add_pairs(call(builder, "llvm.aarch64.neon.saddlp.v8i16.v16i8", words, signed))
    correction = builder.shl(signed_sums, constant(half, 7))
    return builder.add(builder.add(total, sums), correction)


def _portable(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool) -> Any:
    """What LLVM makes of vectors anywhere."""
    u, s = builder.bitcast(unsigned, total.type), builder.bitcast(signed, total.type)
    for byte in range(4):
        a = builder.and_(builder.lshr(u, constant(total.type, 8 * byte)), constant(total.type, 255))
        b = builder.ashr(builder.shl(s, constant(total.type, 24 - 8 * byte)), constant(total.type, 24))
        total = builder.add(total, builder.mul(a, b))
    return total


_DOT4: dict[str, Callable[..., Any]] = {
    "avx512-vnni": _vpdpbusd,
    "avx-vnni": _vpdpbusd,
    "avx512": _pmadd,
    "avx2": _pmadd,
    "neon-i8mm": _usdot,
    "neon-dotprod": _sdot,
    "neon": _smull,
    "portable": _portable,
}


def emit_dot4(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any, below_128: bool = False) -> Any:
    """total (i32x16) + the sum over each lane's four bytes of unsigned * signed (i8x64), exact in int32.

    Where all unsigned bytes are known to be below 128, say so: without VNNI or i8mm that saves half the instructions.
    """
    dot = _DOT4[isa.choose().name]
    operands = zip(*(_registers(builder, value) for value in (total, unsigned, signed)), strict=True)
    return joined(builder, [dot(builder, *values, below_128) for values in operands])


def takes_signed() -> bool:
    """Whether weights of 8 bits are better given signed, to emit_dot4_signed: ARM multiplies bytes of equal kind."""
    return isa.choose().name in ("neon-dotprod", "neon")


def emit_dot4_signed(builder: ir.IRBuilder, total: Any, weights: Any, signed: Any) -> Any:
    """emit_dot4 for signed weights; the other side must be above -128, as quantised activations are."""
    if takes_signed():  # they read all bytes as signed, and twice -128 * 127 fits an int16
        return emit_dot4(builder, total, weights, signed, below_128=True)
    moved = builder.xor(weights, constant(V_I8, -128))
    excess = emit_dot4(builder, constant(V_I32, 0), constant(V_I8, 64), signed)
    return builder.sub(emit_dot4(builder, total, moved, signed), builder.shl(excess, constant(V_I32, 1)))


def _registers(builder: ir.IRBuilder, value: Any) -> list[Any]:
    """A vector of 512 bits cut to registers of the path in use."""
    return parts(builder, value, 512 // (isa.choose().register_bits or 512))


# ---- tables of 16 bytes ----------------------------------------------------------------------------------------------
_LOOK_UP = {512: "llvm.x86.avx512.pshuf.b.512", 256: "llvm.x86.avx2.pshuf.b", 128: "llvm.aarch64.neon.tbl1.v16i8"}


def emit_look_up(builder: ir.IRBuilder, indexes: Any, table: tuple[int, ...]) -> Any:
    """For each of 64 bytes below 16, the byte of a table of 16 (values of either sign, -128 to 255)."""
    values = [value & 255 for value in table]
    bits = isa.choose().register_bits
    if bits is None:
        return _select(builder, indexes, values)
    register = ir.VectorType(I8, bits // 8)
    constants = ir.Constant(register, values * (bits // 128))
    found = [call(builder, _LOOK_UP[bits], register, constants, part) for part in _registers(builder, indexes)]
    return joined(builder, found)


def _select(builder: ir.IRBuilder, indexes: Any, table: list[int]) -> Any:
    """The table's bytes by a tree of selections, lowest bit of the index first."""
    values: list[Any] = [constant(V_I8, value) for value in table]
    for bit in (1, 2, 4, 8):
        clear = builder.icmp_unsigned("==", builder.and_(indexes, constant(V_I8, bit)), constant(V_I8, 0))
        values = [builder.select(clear, low, high) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]

"""Vector operations by themselves, on every instruction path: dot products, tables, half floats, not-a-number."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest

from edgert.errors import OptionError
from edgert.quant import isa, simd, simd_memory


def convert(halves: Any, floats: Any, out_floats: Any, out_halves: Any) -> None:
    """Widen 16 halves at a time, narrow 16 floats at a time."""
    for i in range(0, len(halves), 16):
        simd_memory.store_f32(out_floats[i:].ctypes.data, simd_memory.load_f16(halves[i:].ctypes.data))
    for i in range(0, len(floats), 16):
        simd_memory.store_f16(out_halves[i:].ctypes.data, simd_memory.load_f32(floats[i:].ctypes.data))
    for i in range(16):
        simd_memory.store_half(out_halves[i:].ctypes.data, floats[i])


@pytest.mark.parametrize("instruction", [True, False])
def test_half_floats(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if instruction and not isa.has_half_floats():
        pytest.skip("this CPU has no instruction for half floats")
    monkeypatch.setattr(isa, "has_half_floats", lambda: instruction)
    halves = np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    low = halves[:31744].view(np.float16).astype(np.float64)  # finite and positive, ascending
    ties = (low[:-1] + low[1:]) / 2
    edges = [
        65504,
        65519.996,
        65520,
        65536,
        1e38,
        np.inf,
        -np.inf,
        0,
        -0.0,
        2**-24,
        2**-25,
        2**-25 * 1.001,
        2**-14,
        1e-40,
        6e-5,
        7e-8,
    ]
    floats = np.concatenate(
        [bits.view(np.float32), ties.astype(np.float32), -ties.astype(np.float32), np.float32(edges)]
    )
    floats = floats[np.isfinite(floats) | np.isinf(floats)]
    floats = floats[: len(floats) // 16 * 16].copy()
    out_floats, out_halves = np.empty(len(halves), np.float32), np.empty(len(floats), np.uint16)
    numba.njit(convert)(halves, floats, out_floats, out_halves)
    with np.errstate(invalid="ignore"):  # ARM notes signalling not-a-numbers
        expected = halves.view(np.float16).astype(np.float32)
    number = ~np.isnan(expected)
    assert (out_floats[number] == expected[number]).all() and np.isnan(out_floats[~number]).all()
    assert (np.signbit(out_floats) == np.signbit(expected)).all()
    with np.errstate(over="ignore"):
        assert (out_halves == floats.astype(np.float16).view(np.uint16)).all()
    out_halves = np.empty(16, np.uint16)
    numba.njit(convert)(halves[:0], np.full(16, np.nan, np.float32), out_floats, out_halves)
    assert np.isnan(out_halves.view(np.float16)).all()


def test_not_a_number_is_never_laundered() -> None:
    import compiled

    from edgert.devices.buffers import aligned
    from edgert.quant import reference

    for place in (0, 5, 17, 31):
        x = aligned(128).view(np.float32)
        x[:] = 1.0
        x[place] = np.nan
        group = aligned(44)
        compiled.quantise_row(x.ctypes.data, 32, group.ctypes.data)
        assert np.isnan(group[32:36].view(np.float32)[0])
        compiled.rms_norm(x.ctypes.data, x.ctypes.data, x.ctypes.data, 32, 1e-5)
        assert np.isnan(x).all()
    assert np.isnan(reference.exp(np.float32([np.nan]))).all()


OPERATIONS = [  # with the weights and inputs that each may be given at the edges
    (simd.dot4, [0, 1, 127, 128, 255], [-128, -127, 127]),
    (simd.dot4_below_128, [0, 1, 126, 127], [-128, -127, 127]),
    (simd.dot4_signed, [-128, -127, 0, 127], [-127, 1, 127]),
]
TABLE = (-128, 127, 255, 0, 1, -1, 6, 7, 88, -99, 100, 11, 12, 13, 14, 215)


def dot_products(dot4: Any, unsigned: Any, signed: Any) -> Any:
    """What dot4 adds to -1,000,000 for each four of the bytes, whose number is a multiple of 64."""

    @numba.njit
    def run(unsigned: Any, signed: Any, out: Any) -> None:
        for i in range(0, len(unsigned), 64):
            total = simd.splat_i32(np.int32(-1_000_000))
            total = dot4(
                total, simd_memory.load_i8(unsigned[i:].ctypes.data), simd_memory.load_i8(signed[i:].ctypes.data)
            )
            simd_memory.store_f32(out[i // 4 :].ctypes.data, simd.to_f32(total))

    out = np.empty(len(unsigned) // 4, np.float32)
    run(unsigned.astype(np.uint8), signed.astype(np.int8), out)
    return out.astype(np.int64) + 1_000_000


def check_dot_products() -> None:
    """Every four of pairs of extreme bytes, and random ones, by each operation."""
    random = np.random.default_rng(0)
    for dot4, weights, inputs in OPERATIONS:
        pairs = np.array([(weight, value) for weight in weights for value in inputs])
        fours = np.stack(np.meshgrid(*[np.arange(len(pairs))] * 4), axis=-1).reshape(-1, 4)
        fours = np.resize(fours, (-(-len(fours) // 16) * 16, 4))  # fill the last vector
        random_pairs = [random.integers(min(edge), max(edge) + 1, 1 << 14) for edge in (weights, inputs)]
        for left, right in (pairs[fours].reshape(-1, 2).T, random_pairs):
            assert (dot_products(dot4, left, right) == (left * right).reshape(-1, 4).sum(axis=1)).all()


def check_look_up() -> None:
    """A table of 16 bytes."""
    look_up = simd.look_up(TABLE)

    @numba.njit
    def translate(indexes: Any, out: Any) -> None:
        found = look_up(simd_memory.load_i8(indexes.ctypes.data))
        for byte in range(4):
            simd_memory.store_f32(out[byte].ctypes.data, simd.to_f32(simd.unsigned_byte(found, np.int32(byte))))

    indexes, out = np.random.default_rng(0).integers(0, 16, 64, dtype=np.uint8), np.empty((4, 16), np.float32)
    indexes[:16] = range(16)
    translate(indexes, out)
    assert (out.T.reshape(64) == np.array(TABLE)[indexes] % 256).all()


@pytest.mark.parametrize("path", isa.PATHS, ids=lambda path: path.name)
def test_paths_are_exact(path: isa.InstructionPath, monkeypatch: pytest.MonkeyPatch) -> None:
    if not set(path.needs) <= isa.cpu_features():
        pytest.skip(f"this CPU lacks one of {', '.join(path.needs)}")
    monkeypatch.setattr(isa, "choose", lambda: path)
    check_dot_products()
    check_look_up()


# For each path of x86 a CPU, by LLVM's name, of which it is the best, so that nothing newer is compiled in.
BEFORE_AVX = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt"
AVX2 = f"{BEFORE_AVX},+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
CPUS = {
    "avx512-vnni": ("icelake-server", f"{AVX512},+avx512vnni", "vpdpbusd", "zmm"),
    "avx-vnni": ("alderlake", f"{AVX2},+avxvnni", "vpdpbusd", "ymm"),
    "avx512": ("skylake-avx512", AVX512, "vpmaddubsw", "zmm"),
    "avx2": ("haswell", AVX2, "vpmaddubsw", "ymm"),
    "portable": ("nehalem", BEFORE_AVX, "pmaddwd", "xmm"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 CPUs")
@pytest.mark.parametrize("name", CPUS)
def test_each_x86_cpu_takes_its_path(name: str) -> None:
    cpu, features, instruction, register = CPUS[name]
    if not set(features.replace("+", "").split(",")) <= isa.cpu_features():
        pytest.skip(f"this CPU lacks some of {features}")
    program = f"""if True:
        import re, numba, test_simd
        from edgert.quant import isa, simd, simd_memory
        assert isa.choose().name == "{name}", isa.explain()
        test_simd.check_dot_products()
        test_simd.check_look_up()
        test_simd.test_half_floats(isa.has_half_floats(), test_simd.pytest.MonkeyPatch())

        @numba.njit("void(int64, int64, int64)")
        def dot(unsigned, signed, out):
            total = simd.splat_i32(numba.int32(0))
            total = simd.dot4_below_128(total, simd_memory.load_i8(unsigned), simd_memory.load_i8(signed))
            simd_memory.store_f32(out, simd.to_f32(total))

        (code,) = dot.inspect_asm().values()
        assert re.search("{instruction}.*{register}", code), code
        wider = {{"xmm": "[yz]mm", "ymm": "zmm", "zmm": "nothing"}}["{register}"]
        assert not re.search(wider, code), code
    """
    env = {key: value for key, value in os.environ.items() if key != "EDGERT_ISA"}
    env |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_path_in_use_and_the_reason_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "choose", isa.choose.__wrapped__)
    monkeypatch.setattr(isa, "is_arm", lambda: False)
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx2", "avxvnni"}))
    monkeypatch.delenv("EDGERT_ISA", raising=False)
    reasons = dict(isa.explain())
    assert "neon" not in reasons and reasons["avx-vnni"].startswith("in use: the fastest")
    assert "needs avx512f" in reasons["avx512"] and reasons["portable"].startswith("possible, but slower")
    monkeypatch.setenv("EDGERT_ISA", "avx2")
    reasons = dict(isa.explain())
    assert "EDGERT_ISA names it" in reasons["avx2"] and "names another" in reasons["avx-vnni"]
    monkeypatch.setenv("EDGERT_ISA", "avx512")
    with pytest.raises(OptionError, match="EDGERT_ISA=avx512 needs avx512f, avx512bw"):
        isa.explain()
    monkeypatch.setenv("EDGERT_ISA", "sse9")
    with pytest.raises(OptionError, match="sse9 is not known; use one of avx512-vnni,"):
        isa.explain()


def test_bytes_are_widened_and_prefetching_harms_nothing() -> None:
    @numba.njit
    def widen(bytes: Any, out: Any) -> None:
        simd_memory.prefetch(bytes.ctypes.data)
        simd_memory.prefetch(0)
        simd_memory.store_f32(out.ctypes.data, simd.to_f32(simd_memory.load_bytes(bytes.ctypes.data)))

    out = np.empty(16, np.float32)
    for start in range(0, 256, 16):
        given = np.arange(start, start + 16).astype(np.uint8)
        widen(given, out)
        assert (out == given).all()

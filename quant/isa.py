"""Which instructions the compiled kernels may use on this machine, and why.

An instruction path changes speed alone: integer dot products are exact in int32 and the float operations are the same
on every path. EDGERT_ISA forces one by name, so that each can be tested where the machine has it.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass

from edgert.errors import OptionError


@dataclass(frozen=True)
class InstructionPath:
    """One way to do the integer dot product, with the CPU features (LLVM's names) that it needs."""

    name: str
    register_bits: int | None  # None: LLVM cuts vectors as it sees fit
    needs: tuple[str, ...]
    how: str  # in plain words


PATHS = (  # the fastest first
    InstructionPath("avx512-vnni", 512, ("avx512f", "avx512bw", "avx512vnni"), "vpdpbusd on 64 bytes"),
    InstructionPath("avx-vnni", 256, ("avx2", "avxvnni"), "vpdpbusd on 32 bytes"),
    InstructionPath("avx512", 512, ("avx512f", "avx512bw"), "vpmaddubsw and vpmaddwd on 64 bytes"),
    InstructionPath("avx2", 256, ("avx2",), "vpmaddubsw and vpmaddwd on 32 bytes"),
    InstructionPath("neon-i8mm", 128, ("neon", "dotprod", "i8mm"), "usdot on 16 bytes"),
    InstructionPath("neon-dotprod", 128, ("neon", "dotprod"), "sdot on 16 bytes"),
    InstructionPath("neon", 128, ("neon",), "smull and pairwise additions on 8 bytes"),
    InstructionPath("portable", None, (), "no instruction of any one CPU"),
)


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features, by LLVM's names, that numba compiles for: this CPU's, unless NUMBA_CPU_FEATURES names others."""
    from llvmlite import binding
    from numba.core import codegen, config

    features = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    named = frozenset(name[1:] for name in features.split(",") if name.startswith("+"))
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    return named | _arm_dot_products(cpu, features) if is_arm() else named


def is_arm() -> bool:
    """Whether this is a 64-bit ARM."""
    return platform.machine() in ("aarch64", "arm64")


def _arm_dot_products(cpu: str, features: str) -> frozenset[str]:
    """Dot products that LLVM has for this ARM: it lists them for no CPU, but shows them where it compiles one."""
    from llvmlite import binding

    source = """
        declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
        define i32 @probe(<16 x i8> %a, <16 x i8> %b) {
            %c = WIDEN <16 x i8> %a to <16 x i32>
            %d = sext <16 x i8> %b to <16 x i32>
            %e = mul <16 x i32> %c, %d
            %f = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %e)
            ret i32 %f
        }"""
    binding.initialize_native_target()  # as numba does, but perhaps not yet
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=2)
    found = set()
    for feature, widen, instruction in (("dotprod", "sext", "\tsdot\t"), ("i8mm", "zext", "\tusdot\t")):
        module = binding.parse_assembly(source.replace("WIDEN", widen))
        if instruction in machine.emit_assembly(module):
            found.add(feature)
    return frozenset(found)


def has_half_floats() -> bool:
    """Whether halves are converted by an instruction; LLVM would call a function that is not there instead."""
    return is_arm() or "f16c" in cpu_features()


def _missing(path: InstructionPath) -> str:
    """What keeps this machine from a path, or nothing."""
    from llvmlite import binding
    from numba.core import config

    missing = [need for need in path.needs if need not in cpu_features()]
    if not missing:
        return ""
    if config.CPU_FEATURES is not None:
        return f"needs {', '.join(missing)}, which NUMBA_CPU_FEATURES does not name"
    name = config.CPU_NAME or binding.get_host_cpu_name()
    return f"needs {', '.join(missing)}, which this CPU (to LLVM, {name}) does not have"


@functools.cache
def choose() -> InstructionPath:
    """The path in use: the one that EDGERT_ISA names, else the first that this machine can run."""
    forced = os.environ.get("EDGERT_ISA")
    names = [path.name for path in PATHS]
    if not forced:
        return next(path for path in PATHS if not _missing(path))
    if forced not in names:
        raise OptionError(f"EDGERT_ISA={forced} is not known; use one of {', '.join(names)}")
    path = PATHS[names.index(forced)]
    if _missing(path):
        raise OptionError(f"EDGERT_ISA={forced} {_missing(path)}")
    return path


def explain() -> list[tuple[str, str]]:
    """Each path that a machine of this kind may have, by name, with the reason why it is in use or not."""
    chosen, forced = choose(), os.environ.get("EDGERT_ISA")
    in_use = "in use, because EDGERT_ISA names it" if forced else "in use: the fastest that this CPU has"
    possible = "possible, but EDGERT_ISA names another" if forced else "possible, but slower"
    other_machines = ("avx",) if is_arm() else ("neon",)
    return [
        (path.name, f"{in_use if path is chosen else _missing(path) or possible}; {path.how}")
        for path in PATHS
        if not path.name.startswith(other_machines)
    ]


@functools.cache
def vpdpbusd_takes_bytes(bits: int) -> bool:
    """Whether this LLVM types the bytes of vpdpbusd as bytes; older ones type them as the int32 lanes they fill."""
    from llvmlite import binding

    name, total, value = f"@llvm.x86.avx512.vpdpbusd.{bits}", f"<{bits // 32} x i32>", f"<{bits // 8} x i8>"
    text = f"""
        declare {total} {name}({total}, {value}, {value})
        define {total} @probe({total} %a, {value} %b, {value} %c) {{
            %d = call {total} {name}({total} %a, {value} %b, {value} %c)
            ret {total} %d
        }}"""
    try:
        binding.parse_assembly(text).verify()  # a call is checked, a mere declaration is not
        return True
    except RuntimeError:
        return False

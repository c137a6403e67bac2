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
    needs: tuple[str, ...]


PATHS = (
    InstructionPath("avx512-vnni", ("avx512f", "avx512bw", "avx512vnni")),
    InstructionPath("avx2", ("avx2",)),
    InstructionPath("portable", ()),
)


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features, by LLVM's names, that numba compiles for: this machine's, unless NUMBA_CPU_NAME says otherwise."""
    from llvmlite import binding
    from numba.core import config

    if config.CPU_NAME and config.CPU_NAME != binding.get_host_cpu_name() and not config.CPU_FEATURES:
        return frozenset()  # what a named CPU has, only LLVM knows
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def has_half_floats() -> bool:
    """Whether halves are converted by an instruction; LLVM would call a function that is not there instead."""
    return platform.machine() == "aarch64" or "f16c" in cpu_features()


@functools.cache
def choose() -> InstructionPath:
    """The path in use: the one that EDGERT_ISA names, else the first that this machine can run."""
    forced = os.environ.get("EDGERT_ISA")
    names = [path.name for path in PATHS]
    if forced and forced not in names:
        raise OptionError(f"EDGERT_ISA={forced} is not known; use one of {', '.join(names)}")
    for path in PATHS:
        missing = [need for need in path.needs if need not in cpu_features()]
        if forced == path.name and missing:
            raise OptionError(f"EDGERT_ISA={forced} needs {', '.join(missing)}, which this CPU does not have")
        if not missing and forced in (None, "", path.name):
            return path
    raise AssertionError("the portable path needs nothing")


@functools.cache
def vpdpbusd_takes_bytes() -> bool:
    """Whether this LLVM types the bytes of vpdpbusd as bytes; older ones type them as the int32 lanes they fill."""
    from llvmlite import binding

    name, types = "@llvm.x86.avx512.vpdpbusd.512", "<16 x i32> {}, <64 x i8> {}, <64 x i8> {}"
    text = f"""
        declare <16 x i32> {name}({types.format("", "", "")})
        define <16 x i32> @probe({types.format("%a", "%b", "%c")}) {{
            %d = call <16 x i32> {name}({types.format("%a", "%b", "%c")})
            ret <16 x i32> %d
        }}"""
    try:
        binding.parse_assembly(text).verify()  # a call is checked, a mere declaration is not
        return True
    except RuntimeError:
        return False

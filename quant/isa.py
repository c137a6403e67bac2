"""Which instructions the compiled kernels may use on this machine, and why.

An instruction path changes speed alone: integer dot products are exact in int32 and the float operations are the same
on every path. EDGERT_ISA forces one by name, so that each can be tested where the machine has it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from edgert.errors import OptionError


@dataclass(frozen=True)
class InstructionPath:
    """One way to do the integer dot product, with the CPU features (LLVM's names) that it needs."""

    name: str
    needs: tuple[str, ...]


PATHS = (
    InstructionPath("avx512-vnni", ("avx512f", "avx512bw", "avx512vnni")),
    InstructionPath("portable", ()),
)


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features that LLVM reports for this machine."""
    from llvmlite import binding

    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


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

    text = "declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)"
    try:
        module = binding.parse_assembly(text)
        module.verify()
        return "<64 x i8>" in str(module)
    except RuntimeError:
        return False

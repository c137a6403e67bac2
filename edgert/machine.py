"""What this machine computes with, and why: the CPU, its instructions, threads, caches, and the compiled kernels.

Reads what the system tells; measures nothing.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from edgert.devices import cores
from edgert.quant import isa, jit

_CACHE_KINDS = {"Data": " data", "Instruction": " instructions", "Unified": ""}
_CACHE_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe() -> dict[str, Any]:
    """What `edgert inspect --cpu` prints; sizes in bytes."""
    threads = cores.choose_threads()
    return {
        "cpu": {
            "name": cpu_name(),
            "kind": _llvm_name(),
            "architecture": platform.machine(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
        },
        "instructions": {"chosen": isa.choose().name, **dict(isa.explain())},
        "threads": {"count": threads.n_threads, "reason": threads.reason, "cpus": threads.cpus},
        "caches": dict(caches()),
        "kernels": kernels(),
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo"), board: Path = Path("/sys/firmware/devicetree/base/model")) -> str:
    """The CPU by the name that people know: the system's, else the board's, else what LLVM takes it for."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    with contextlib.suppress(OSError):
        if name := board.read_text(errors="replace").strip("\0\n "):
            return name
    return _llvm_name()


def _llvm_name() -> str:
    """The CPU that numba compiles for, by LLVM's name."""
    from llvmlite import binding
    from numba.core import config

    return str(config.CPU_NAME or binding.get_host_cpu_name())


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the caches that the first core sees; nothing where the system does not say."""
    for index in sorted(folder.glob("index[0-9]*")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            unit = _CACHE_UNITS.get(size[-1:], 1)
            yield f"L{level}{_CACHE_KINDS[kind]}", int(size.rstrip("KMG")) * unit


def kernels() -> dict[str, Any]:
    """The folder of the compiled kernels of these sources, how many are in it, and their bytes."""
    folder = jit.cache_folder()
    sizes = []
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # another process may be tidying up
            sizes.append((path.suffix, path.stat().st_size))
    return {
        "folder": str(folder),
        "count": sum(suffix == ".nbc" for suffix, _ in sizes),
        "bytes": sum(size for _, size in sizes),
    }

"""How much RAM a model needs, before any of it is allocated, and how much there is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgert.errors import MemoryLimitError, OptionError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KIB": 1 << 10,
    "KB": 10**3,
    "M": 1 << 20,
    "MIB": 1 << 20,
    "MB": 10**6,
    "G": 1 << 30,
    "GIB": 1 << 30,
    "GB": 10**9,
    "T": 1 << 40,
    "TIB": 1 << 40,
    "TB": 10**12,
}
PROCESS_BYTES = 200 << 20  # Python, NumPy, numba with its compiled code, the tokenizer: measured 150 to 190 MiB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `loading` is needed only while weights are packed."""

    process: int
    hot: int
    cold: int
    kv: int
    work: int
    loading: int
    context: int
    kv_type: str

    @property
    def total(self) -> int:
        """What the process needs at its peak."""
        return self.process + self.hot + self.cold + max(self.kv + self.work, self.loading)

    def require(self, limit: int | None, name: str) -> None:
        """Raise MemoryLimitError if the plan does not fit `limit`, or the machine."""
        parts = ", ".join(
            f"{part} {getattr(self, part) / 2**20:,.0f}" for part in ("process", "hot", "cold", "kv", "work", "loading")
        )
        needed = f"{self.total / 2**20:,.0f} MiB ({parts})"
        if limit is not None and self.total > limit:
            raise MemoryLimitError(
                f"memory {limit / 2**20:,.0f} MiB is below what {name} needs, context {self.context}: {needed}; "
                f"use --memory {-(-self.total // 2**20)}MiB or a shorter --context"
            )
        free = available()
        if self.total > free:
            raise MemoryLimitError(
                f"{name} needs {needed}, context {self.context}, but only {free / 2**20:,.0f} MiB are available; "
                "close other programs, or use a smaller model or a shorter --context"
            )


def parse_size(size: str | int) -> int:
    """Bytes of "2GiB", "900MiB", "1.5GB" or a plain number."""
    if isinstance(size, int) and not isinstance(size, bool):
        n_bytes = float(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
        if not match or match[2].upper() not in _UNITS:
            raise OptionError(f"memory={size!r} is not a size; write for example 2GiB or 900MiB")
        n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= n_bytes < 2**60:
        raise OptionError(f"memory={size!r} must be above zero and below 2**60 bytes")
    return int(n_bytes)


def available() -> int:
    """Bytes that this process may still take: free memory, or what its cgroup leaves, plus what it holds already."""
    held = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available)
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            free = min(free, int((root / limit).read_text()) - int((root / usage).read_text()))
        except (OSError, ValueError):
            continue  # no cgroup of this kind, or no limit
    return max(free, 0) + held

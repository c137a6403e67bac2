"""How much RAM a model needs, before any of it is allocated, and how much there is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
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
# Measured: 160 MiB and 240 MiB on a first run, which compiles; 510 bytes a token at rest, 720 while it is built.
PROCESS_BYTES = 200 << 20  # Python, NumPy, numba with its compiled code: 150 to 185 MiB were measured
COMPILING_BYTES = 90 << 20  # what the first run on a machine takes more
TOKEN_BYTES = 800  # of the tokenizer, for each token of the vocabulary


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


def available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take, plus what it holds already: of the machine, and of each of its cgroups.

    The page cache does not count as taken: the kernel drops it when memory is asked for.
    """
    held = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available)
    for limit, usage, stat, cached in _cgroup_files(proc, cgroups):
        try:
            left = int(limit.read_text()) - int(usage.read_text())
        except (OSError, ValueError):
            continue  # no cgroup here, or no limit
        with contextlib.suppress(OSError, ValueError):
            left += int(dict(line.split() for line in stat.read_text().splitlines()).get(cached, 0))
        free = min(free, left)
    return max(free, 0) + held


def _cgroup_files(proc: Path, cgroups: Path) -> Iterator[tuple[Path, Path, Path, str]]:
    """Limit, usage and statistics of this process's memory cgroups and all above them, version 2 and version 1.

    The last is the name under which the statistics have the page cache that is not in use.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # A container may see its own group at the root, under a path of the host's: then the root alone is there.
        for depth in range(len(parts), -1, -1):
            group = root.joinpath(*parts[:depth])
            if controllers:
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            else:
                names = "memory.max", "memory.current", "inactive_file"
            yield group / names[0], group / names[1], group / "memory.stat", names[2]

"""The memory cgroups that a process is in, versions 1 and 2: limit, use, page cache, stalls.

Only reads what the kernel shows under /sys/fs/cgroup. What follows from the numbers is decided elsewhere (memory.py,
guard.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROC, ROOT = Path("/proc"), Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 shows a number near 2**63 where there is none


@dataclass(frozen=True)
class Group:
    """One memory cgroup."""

    folder: Path
    version: int

    @property
    def usage_file(self) -> Path:
        """Where the bytes stand that are charged to the group."""
        return self.folder / ("memory.usage_in_bytes" if self.version == 1 else "memory.current")

    @property
    def limit(self) -> int | None:
        """Bytes that the group may use; None where there is no limit, or no such file."""
        limit = _number(self.folder / ("memory.limit_in_bytes" if self.version == 1 else "memory.max"))
        return limit if limit is not None and limit < _NO_LIMIT else None

    @property
    def usage(self) -> int | None:
        """Bytes charged to the group, page cache and kernel memory included."""
        return _number(self.usage_file)

    @property
    def file_pages(self) -> int:
        """Bytes of page cache among them, which the kernel drops when memory is asked for."""
        prefix = "total_" if self.version == 1 else ""
        return sum(self._stat().get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))

    def _stat(self) -> dict[str, int]:
        try:
            lines = (self.folder / "memory.stat").read_text().splitlines()
            return {name: int(value) for name, value in (line.split() for line in lines)}
        except (OSError, ValueError):
            return {}


def groups(proc: Path = PROC, root: Path = ROOT) -> list[Group]:
    """This process's memory cgroup and all above it, in that order for each version; empty where there are none."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # A container may see its own group at the root, under a path of the host's: then the root alone is there.
        for depth in range(len(parts), -1, -1):
            found.append(Group(top.joinpath(*parts[:depth]), 1 if controllers else 2))
    return found


def limited(proc: Path = PROC, root: Path = ROOT) -> list[Group]:
    """Those that have a limit and say what they use."""
    return [group for group in groups(proc, root) if group.limit is not None and group.usage is not None]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

"""Makes the drive under a file slow for chosen processes: a cgroup whose reads the kernel limits, version 1 or 2.

For Linux with writable cgroups, as root. The limit holds for reads past the page cache too. A drive that a cgroup slows
down is no SD card: its reads come in bursts, on average at the limit.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from cage import ROOT, CageError

_V1_FILE = "blkio.throttle.read_bps_device"


def device_of(path: Path, root: Path = Path("/sys/dev/block")) -> str:
    """The "major:minor" of the drive that holds a file: limits are for whole drives. CageError: it lies on none."""
    number = os.stat(path).st_dev
    found = root / f"{os.major(number)}:{os.minor(number)}"
    if not found.exists():
        raise CageError(f"{path} does not lie on a drive of this machine, such as a disk")
    if (found / "partition").exists():
        return (found.resolve().parent / "dev").read_text().strip()
    return found.name


class SlowFlash:
    """A cgroup whose processes read the drive of `path` with at most bytes_per_s. Use as a context manager."""

    def __init__(self, path: Path, bytes_per_s: int) -> None:
        """Raises CageError where that cannot be."""
        device, first = device_of(path), ROOT / "blkio"
        is_first = (first / _V1_FILE).exists()
        if not is_first:
            with contextlib.suppress(OSError):  # it may be on already
                (ROOT / "cgroup.subtree_control").write_text("+io")
        self._group = (first if is_first else ROOT) / f"edgert-slow-{os.getpid()}-{time.monotonic_ns()}"
        line = f"{device} {bytes_per_s}" if is_first else f"{device} rbps={bytes_per_s}"
        try:
            self._group.mkdir()
            (self._group / (_V1_FILE if is_first else "io.max")).write_text(line)
        except OSError as problem:
            self.close()
            raise CageError(f"{self._group}: reads cannot be limited here ({problem.strerror})") from problem

    def add(self, process: int) -> None:
        """A process, with all its threads, is slow from now on."""
        (self._group / "cgroup.procs").write_text(str(process))

    def close(self) -> None:
        """Remove the group; its processes should have ended, and may be on their way out."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                self._group.rmdir()
                return
            if not self._group.exists():
                return
            time.sleep(0.05)

    def __enter__(self) -> SlowFlash:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

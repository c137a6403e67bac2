"""How to read each file system: the settings that `edgert doctor` measured here, kept in the user's cache folder.

A rate holds at the record size at which it was measured (an estimate at another size was wrong by 20 times elsewhere),
so each is kept with its size and date. What was never measured has defaults.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert.quant.jit import cache_root
from edgert.storage.aside import written_aside
from edgert.storage.flash import ALIGNMENT
from edgert.storage.reader import MOST_LANES

_VERSION = 1
_MOST_SIZES = 8  # record sizes that are kept of one file system: the newest
_LARGEST_CHUNK = 64 << 20
_SIMILAR = 2.0  # how far a record size may be from the measured one


@dataclass(frozen=True)
class FlashSettings:
    """How to read records of a file. The defaults are for what was never measured."""

    lanes: int = 4
    chunk_bytes: int = 512 << 10
    bytes_per_s: float | None = None  # records of about this size, several at a time
    measured: bool = False
    direct: bool | None = None  # FlashFile's: False where reads through the page cache were found to be faster
    record_bytes: int | None = None  # the size that was measured
    date: str = ""  # of the measurement, as 2026-01-31


@dataclass(frozen=True)
class FileSystem:
    """Where a path lies."""

    key: str  # stays the same over restarts as far as the system allows
    kind: str  # ext4
    device: str  # /dev/nvme0n1p2
    mount: str  # /home

    def __str__(self) -> str:
        return f"{self.kind} on {self.device}, mounted at {self.mount}"


def settings_path() -> Path:
    """The file that keeps what was measured."""
    return cache_root().parent / "flash.json"


def flash_settings(path: str | os.PathLike[str], record_bytes: int | None = None) -> FlashSettings:
    """How to read the file or folder `path`: as measured at about `record_bytes` (None: at the last size), or defaults.

    Whether the page cache was found to be faster holds for any size. Never raises: a file of settings that cannot be
    read or makes no sense counts as none.
    """
    kept = [settings for row in _rows(_load(), file_system(path).key) if (settings := _parse(row)) is not None]
    if not kept:
        return FlashSettings()
    if record_bytes is None:
        return kept[-1]

    def distance(settings: FlashSettings) -> float:
        return abs(math.log((settings.record_bytes or 1) / max(record_bytes, 1)))

    nearest = min(reversed(kept), key=distance)
    return nearest if distance(nearest) <= math.log(_SIMILAR) else FlashSettings(direct=nearest.direct)


def keep_settings(path: str | os.PathLike[str], settings: FlashSettings) -> Path:
    """Keep what was measured for the file system of `path`; the file it is in.

    Raises OSError if that cannot be written.
    """
    where, document, target = file_system(path), _load(), settings_path()
    rows = [row for row in _rows(document, where.key) if row.get("record_bytes") != settings.record_bytes]
    row = {key: value for key, value in asdict(settings).items() if key != "measured"}
    systems = document.get("file_systems")
    document = {"version": _VERSION, "file_systems": systems if isinstance(systems, dict) else {}}
    document["file_systems"][where.key] = {
        "description": str(where),
        "measured": [*rows, row][-_MOST_SIZES:],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(target) as aside:
        aside.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return target


def today() -> str:
    """The date of a measurement that is made now."""
    return datetime.date.today().isoformat()


def _load() -> dict[str, Any]:
    """The file of settings; empty if there is none that this version understands."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(settings_path().read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("version") == _VERSION:
            return document
    return {}


def _rows(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    systems = document.get("file_systems")
    system = systems.get(key) if isinstance(systems, dict) else None
    rows = system.get("measured") if isinstance(system, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _parse(row: dict[str, Any]) -> FlashSettings | None:
    """A row of the file as settings; None if it makes no sense."""
    lanes, chunk, size = (row.get(name) for name in ("lanes", "chunk_bytes", "record_bytes"))
    rate, direct, date = (row.get(name) for name in ("bytes_per_s", "direct", "date"))
    if type(lanes) is not int or not 1 <= lanes <= MOST_LANES:
        return None
    if type(chunk) is not int or not ALIGNMENT <= chunk <= _LARGEST_CHUNK or chunk % ALIGNMENT:
        return None
    if type(size) is not int or not 1 <= size < 1 << 40:
        return None
    if not isinstance(rate, (int, float)) or not 0 < rate < 1e13 or direct not in (None, False, True):
        return None
    return FlashSettings(lanes, chunk, float(rate), True, direct, size, str(date)[:10])


# ---- which file system -----------------------------------------------------------------------------------------------
def existing(path: str | os.PathLike[str]) -> Path:
    """The path, or the nearest folder above it that is there."""
    found = Path(path).absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    return found


def file_system(path: str | os.PathLike[str], root: Path = Path("/")) -> FileSystem:
    """Where a path lies; `root` holds proc/ and dev/.

    The key is the UUID of its device, else the id that the file system reports (ext4 and btrfs make it of their UUID),
    else the device number, which may change at a restart.
    """
    at = existing(path)
    number = at.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    mounts = list(_mounts(root))
    at_real = at.resolve()
    here = [m for m in mounts if at_real.is_relative_to(m[1])]
    # The later mount of the same place covers the earlier one. btrfs reports numbers that no mount has.
    here.sort(key=lambda m: (m[0] == device, len(m[1])))
    _, mount, kind, source = here[-1] if here else (device, "an unknown place", "a file system", device)
    uuid = next((name for name, rdev in _uuids(root) if rdev == number), None)
    fsid = os.statvfs(at).f_fsid
    key = f"uuid-{uuid}" if uuid else f"id-{fsid:x}" if fsid else f"device-{device}"
    return FileSystem(key, kind, source, mount)


def _mounts(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """(device number, mount point, kind, source) of what is mounted, as proc(5) describes mountinfo."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) >= 5 and len(rest) >= 2:
            yield fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])


def _unescape(text: str) -> str:
    """Blanks in a mount point are written as \\040."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _uuids(root: Path) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError):
        for link in sorted((root / "dev/disk/by-uuid").iterdir()):
            with contextlib.suppress(OSError):
                yield link.name, link.stat().st_rdev

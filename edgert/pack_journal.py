"""What of a bundle is already on disk while it is being packed: a journal, so that a killed pack goes on.

Each line is written after the data that it tells of are durable, and carries a check of itself: a line that was cut
short, and all behind it, count for nothing. Packing the same again gives the same bytes, so a line that is lost costs
time only.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any


class Journal:
    """The journal at `path` for a packing that `header` describes; `done` has the checksums of the items on disk.

    A journal of another header is begun anew.
    """

    def __init__(self, path: Path, header: Any) -> None:
        self.done: list[int] = []
        header = json.loads(json.dumps(header))
        kept, n_bytes = _read(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if kept and kept[0] == header:
            self.done = [checksum for line in kept[1:] for checksum in line]
            os.ftruncate(self._file, n_bytes)
        else:
            os.ftruncate(self._file, 0)
            n_bytes = 0
        os.lseek(self._file, n_bytes, os.SEEK_SET)
        if not n_bytes:
            self._append(header)

    def add(self, checksums: list[int]) -> None:
        """The next items are on disk."""
        if checksums:
            self._append(checksums)
            self.done += checksums

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        while line:
            line = line[os.write(self._file, line) :]
        os.fdatasync(self._file)


def _read(path: Path) -> tuple[list[Any], int]:
    """The sound lines at the start of a journal, and the bytes that they take."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines, n_bytes = [], 0
    for line in content.split(b"\n")[:-1]:
        value = _read_line(line)
        if value is None:
            break
        lines.append(value)
        n_bytes += len(line) + 1
    return lines, n_bytes


def _read_line(line: bytes) -> Any:
    """What a line says; None: it is damaged."""
    check, _, text = line.partition(b" ")
    try:
        return json.loads(text) if int(check, 16) == zlib.crc32(text) else None
    except ValueError:
        return None

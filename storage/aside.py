"""Small files that are there as a whole or not at all: written beside their place, and renamed into it.

What a process that was killed left over is removed by the next one that writes the same file. Nothing here is synced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from glob import escape
from pathlib import Path

_END = ".part"
_LONGEST = 230  # bytes of a name that leave room for the rest
_LEFT_S = 3600.0  # what nobody has touched for so long is nobody's


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end, unless something is raised. Raises OSError."""
    _remove_old(path)
    aside = _aside(path)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def check_writable(path: Path) -> None:
    """OSError now, not after the run that is to be written there; ValueError for what is no path."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    aside = _aside(path)
    aside.touch()
    aside.unlink()


def _aside(path: Path) -> Path:
    """A new name beside: threads of one process, or containers that share a folder, may write one file at once."""
    return path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}{_END}")


def _beginning(path: Path) -> str:
    """Of the names of files beside this one, which is not to make them longer than file systems take."""
    name = os.fsencode(path.name)
    return f".{path.name if len(name) <= _LONGEST else hashlib.sha256(name).hexdigest()}."


def _remove_old(path: Path) -> None:
    with contextlib.suppress(OSError):
        beginning = _beginning(path)
        for left in path.parent.glob(f"{escape(beginning)}*{_END}"):
            of_another = "." in left.name[len(beginning) : -len(_END)]  # of a.json, where this is a
            if not of_another and time.time() - left.stat().st_mtime > _LEFT_S:
                left.unlink()

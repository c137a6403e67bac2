"""The folder in which a bundle is made, beside where it will be: locked while a process packs, renamed at the end.

The lock is on the folder itself, so nothing is left over from it, and a killed process holds none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edgert.errors import OptionError
from edgert.storage.bundle import CHOICE, FILES, PROFILE

JOURNAL = "journal"
_MINE = {*FILES, PROFILE, CHOICE, JOURNAL}
_POLL_S = 0.1


class Place:
    """The folder `path` for a bundle to be published as `out`; in a `with` statement, which locks it.

    `is_mine` is False where another process held the lock and published, or gave up, before it came to us. `waiting`
    is called again and again while another process packs, and may raise.
    """

    def __init__(self, out: Path, waiting: Callable[[], None]) -> None:
        self.out, self.path = out, part_of(out)
        self._waiting = waiting
        self._lock = -1
        self.is_mine = False

    def __enter__(self) -> Place:
        while True:
            self.path.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process published in between
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                break
        try:
            while not try_lock(self._lock):
                self._waiting()
                time.sleep(_POLL_S)
            self.is_mine = self._is_still_there()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._lock))
        except FileNotFoundError:
            return False

    def publish(self) -> None:
        """Give the folder its name; a bundle that has it now is moved away first, and then removed."""
        _sync(self._lock)
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.path.rename(self.out)
        _sync_folder(self.out.parent)
        (self.out / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder and what is in it, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)


def part_of(out: Path) -> Path:
    """Where the bundle `out` is made."""
    return out.with_name(out.name + ".part")


def check_replaceable(out: Path) -> None:
    """OptionError if something is at `out` that no pack has put there."""
    if not out.exists() and not out.is_symlink():
        return
    names = {entry.name for entry in out.iterdir()} if out.is_dir() and not out.is_symlink() else {out.name}
    if names - _MINE:
        raise OptionError(
            f"{out} exists and is no bundle, it holds {min(names - _MINE)}: name another, or move it away"
        )


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no sync of folders
            raise


def try_lock(descriptor: int) -> bool:
    """Lock an open folder; False where another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # a file system without locks: two packs of one model would write the same bytes to the same places
    return True

"""The folder in which a long work keeps what it has done so far, locked while a process is at it.

The lock is on the folder itself, as in edgert.pack_place, so nothing is left over from it, and a killed process holds
none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgert.errors import OptionError, StorageError
from edgert.pack_place import try_lock


def work_of(out: Path) -> Path:
    """Where what is under way is kept for a bundle or profile."""
    return out.with_name(f"{out.name}.work")


@contextmanager
def locked_work(out: Path) -> Iterator[Path]:
    """The folder of the work on `out`, made if need be; removed at the end if it is empty.

    OptionError where another process is at work in it; StorageError where it cannot be made.
    """
    folder = work_of(out)
    try:
        lock = _lock(folder)
        while lock is not None and not _is_there(folder, lock):  # another process was done with it, and removed it
            os.close(lock)
            lock = _lock(folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made ({error.strerror}); name another file with --out") from error
    if lock is None:
        raise OptionError(
            f"another process is at work on {out}: wait until it is done, or name another file with --out"
        )
    try:
        yield folder
    finally:
        with suppress(OSError):  # there is something in it
            folder.rmdir()
        os.close(lock)


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """Turn what the disk says of the work on a profile into a StorageError with a remedy; what is done stays."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a connection
            raise
        folder = work_of(out)
        raise StorageError(
            f"{error.filename or folder} cannot be written ({error.strerror}); make room, or see to the disk, and "
            f"profile the same again, which goes on where it broke off, or remove {folder}"
        ) from error


def _lock(folder: Path) -> int | None:
    """A locked descriptor of the folder; None where another process holds the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # removed in between
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            break
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_there(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False

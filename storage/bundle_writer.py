"""Writing a large file slab by slab, past the page cache, while the next slab is being filled.

Memory is bounded by a few slabs and nothing piles up as dirty pages: slabs are written with O_DIRECT where the file
system takes it, else through the page cache, synced and dropped at once. What the bytes mean is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.quant.checksum import Checksum
from edgert.storage.bundle_manifest import PAGE, round_up

SLAB_BYTES = 8 << 20
_N_SLABS = 3  # one is filled, one written, one lies between
_SYNC_BYTES = 64 << 20  # what is written between two syncs

Bytes = npt.NDArray[np.uint8]


class SlabWriter:
    """Fills a file from `start` (a multiple of 4,096) on; what lies behind is cut off.

    Call take() for places to fill, one after the other, begin() and end() around each item. durable(position) is
    called by the writing thread when all before that position would survive a loss of power. OSError is raised by
    whichever call comes next.
    """

    def __init__(self, path: Path, start: int, durable: Callable[[int], None]) -> None:
        assert start % PAGE == 0
        self._file, self._direct = _open(path)
        self._durable = durable
        os.ftruncate(self._file, start)
        self._slabs = [_aligned(SLAB_BYTES) for _ in range(_N_SLABS)]
        self._slab, self._used, self._item = self._slabs.pop(), 0, 0  # where the open item's unsummed bytes begin
        self._position = start  # of the slab in the file
        self._unsynced, self._failed = 0, False
        self._checksum = Checksum()
        self._writing: deque[tuple[Future[None], Bytes]] = deque()
        self._thread = ThreadPoolExecutor(1, "edgert-pack")

    @property
    def position(self) -> int:
        """Where the next byte goes in the file."""
        return self._position + self._used

    def take(self, n_bytes: int) -> Bytes:
        """The next n_bytes of the file, to be filled before the next call; what they hold now is left over."""
        if self._used + n_bytes > len(self._slab):
            self._submit(n_bytes)
        self._used += n_bytes
        return self._slab[self._used - n_bytes : self._used]

    def pad(self, multiple: int) -> None:
        """Fill with zeros up to a multiple."""
        self.take(round_up(self.position, multiple) - self.position)[:] = 0

    def begin(self) -> None:
        """An item begins here, at a multiple of 4,096."""
        self.pad(PAGE)
        self._checksum, self._item = Checksum(), self._used

    def end(self) -> int:
        """The item ends here: its checksum."""
        self._checksum.update(self._slab[self._item : self._used])
        self._item = self._used
        return self._checksum.value()

    def finish(self) -> None:
        """Write what is left, up to a multiple of 4,096, and wait until all is durable."""
        self.pad(PAGE)
        self._submit(0)
        while self._writing:
            self._writing.popleft()[0].result()
        self._sync(self._position)

    def close(self) -> None:
        """Stop writing and close the file; what is under way is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _submit(self, needed: int) -> None:
        """Hand the slab's whole pages over to be written; the rest moves to the next slab, with room for `needed`."""
        whole = self._used // PAGE * PAGE
        if self._item < whole:
            self._checksum.update(self._slab[self._item : whole])
        rest = self._slab[whole : self._used]
        full = self._slab
        self._slab = self._free(needed + PAGE)
        self._slab[: len(rest)] = rest
        self._writing.append((self._thread.submit(self._write, full[:whole], self._position), full))
        self._position += whole
        self._used, self._item = len(rest), max(self._item - whole, 0)

    def _free(self, n_bytes: int) -> Bytes:
        """A slab that nothing is written from any more, large enough."""
        if self._slabs:
            slab = self._slabs.pop()
        else:
            written, slab = self._writing.popleft()
            written.result()
        return slab if len(slab) >= n_bytes else _aligned(n_bytes)

    def _write(self, data: Bytes, position: int) -> None:
        """In the thread: write whole pages, and sync now and then. After a failure nothing is written any more."""
        if self._failed:
            return
        try:
            self._write_pages(data, position)
            self._unsynced += len(data)
            if not self._direct or self._unsynced >= _SYNC_BYTES:
                self._sync(position + len(data))
            if not self._direct:
                os.posix_fadvise(self._file, position, len(data), os.POSIX_FADV_DONTNEED)
        except BaseException:
            self._failed = True  # what comes after a gap must not be called durable
            raise

    def _write_pages(self, data: Bytes, position: int) -> None:
        done = 0
        while done < len(data):
            written = os.pwrite(self._file, data[done:].data, position + done)
            if written < PAGE:  # a direct write has to go on at a whole page
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written // PAGE * PAGE

    def _sync(self, position: int) -> None:
        os.fdatasync(self._file)
        self._unsynced = 0
        self._durable(position)


def _open(path: Path) -> tuple[int, bool]:
    """A file to write to, and whether past the page cache."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        file = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # the file system refuses direct access, or the file as such: then this raises
        return os.open(path, flags, 0o644), False
    return file, True


def _aligned(n_bytes: int) -> Bytes:
    """Bytes that begin at a page."""
    return np.frombuffer(mmap.mmap(-1, round_up(n_bytes, PAGE)), np.uint8)

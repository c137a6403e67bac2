"""One file on flash, read at any position past the page cache: O_DIRECT where the file system takes it.

Bytes read this way are in RAM once, in the caller's buffer. Where direct reads are refused the file is read through the
page cache and its pages are dropped at once, with the reason at hand. What the bytes mean is not known here; reads that
should overlap are reader.py's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError, UnsupportedError

# Offset, address and size of a direct read are multiples of this. Many devices take 512; 4,096 is right for all, and
# what a bundle's records keep to.
ALIGNMENT = 4096
_HUGE_PAGE = 2 << 20
_BOUNCE_BYTES = 2 << 20  # of an unaligned read, at a time
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_MAY_ADVISE = hasattr(os, "posix_fadvise")
# The child keeps the addresses. With MADV_DONTFORK it would not: its own memory may come to lie there, and is lost when
# it closes what it inherited. Python has no name for this one, which Linux has had since 4.14.
_MADV_WIPEONFORK = 18


def aligned_buffer(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory whose address is a multiple of 4,096: uint8 (n_bytes,), given back with its last view.

    From 2 MiB on it is in huge pages where the system has them: direct reads of 3.4 MiB records into small pages make
    1.5 GB/s, into huge ones 2.1 (each page is looked up and pinned). A forked child finds zeros in it: kernels before
    5.19 may put bytes of a read that is under way during a fork into the child's copy. MemoryError if there is none.
    """
    alignment = _HUGE_PAGE if n_bytes >= _HUGE_PAGE else ALIGNMENT
    try:
        memory = mmap.mmap(-1, n_bytes + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes to read flash into: {error.strerror}") from error
    if sys.platform == "linux":
        memory.madvise(_MADV_WIPEONFORK)
    if n_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(memory, np.uint8)
    skip = -every.__array_interface__["data"][0] % alignment
    return every[skip : skip + n_bytes]


def is_aligned(offset: int, buffer: npt.NDArray[np.uint8]) -> bool:
    """Whether a direct read from `offset` can go straight into `buffer`."""
    return (offset | len(buffer) | int(buffer.__array_interface__["data"][0])) % ALIGNMENT == 0


class _Descriptor:
    """An open file's number, closed with the last reference: a read under way in another thread holds one.

    Else a close would leave the number free for the next file that anyone opens, and that read would get its bytes.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit there may be no `os` any more
        close(self.number)


class FlashFile:
    """An open file for positional reads from any number of threads.

    direct: True refuses a file that cannot be read so (UnsupportedError), False reads through the page cache, None
    takes what goes. Raises ModelFileError for a file that is absent, unreadable or not a regular one.
    """

    path: Path
    n_bytes: int  # when it was opened
    direct: bool  # whether reads go past the page cache
    reason: str  # why they do or do not, for a person

    def __init__(self, path: str | os.PathLike[str], *, direct: bool | None = None) -> None:
        self.path = Path(path)
        self.direct = False
        self._descriptor: _Descriptor | None = _Descriptor(open_regular(self.path))
        self.n_bytes = os.fstat(self._descriptor.number).st_size
        if _MAY_ADVISE:  # each read is then as large as it is asked for, not cut into 128 KiB: +50 % through the cache
            os.posix_fadvise(self._descriptor.number, 0, 0, os.POSIX_FADV_RANDOM)
        if direct is False:
            self.reason = "read through the page cache, as asked"
            return
        self.reason = self._turn_direct()
        if direct and not self.direct:
            self.close()
            raise UnsupportedError(f"{self.path}: {self.reason}; put the file on another file system")

    def _turn_direct(self) -> str:
        """Open the file once more for direct reads and try one, for some file systems refuse only that; the reason."""
        if not _O_DIRECT:
            return "read through the page cache: this system has no O_DIRECT"
        buffered = self._descriptor
        try:
            self._descriptor = _Descriptor(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT))
            os.preadv(self._descriptor.number, [aligned_buffer(ALIGNMENT).data], 0)
        except OSError as error:
            self._descriptor = buffered
            return f"read through the page cache: the file system refuses direct reads ({error.strerror})"
        self.direct = True
        return "read past the page cache (O_DIRECT)"

    def read(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 (n,) contiguous, with the bytes from `offset` on; any offset, size and address.

        Raises ModelFileError that names the file and the byte if they are not all there or cannot be read.
        """
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        if not self.direct or is_aligned(offset, out):
            self.fill(offset, out.data)
            return
        end = offset + len(out)
        first = offset - offset % ALIGNMENT
        if not len(out):
            return
        bounce = aligned_buffer(min(_round_up(end) - first, _BOUNCE_BYTES))
        for at in range(first, end, len(bounce)):
            needed = min(end - at, len(bounce))
            self.fill(at, bounce.data[: _round_up(needed)], needed)
            skip = max(offset - at, 0)
            out[at + skip - offset : at + needed - offset] = bounce[skip:needed]

    def fill(self, offset: int, view: memoryview, needed: int | None = None) -> None:
        """Fill `view` from `offset` on, both aligned if the file is read directly; at least `needed` bytes of it.

        The way without checks and copies, for lanes. Only EINTR is tried again: of an EIO the kernel and the device
        have given up already.
        """
        done, needed = 0, len(view) if needed is None else needed
        while done < needed:
            try:
                got = self._preadv(view[done:] if done else view, offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise self._error(offset + done, error) from error
            before, done = done, done + got
            if done < needed and self.direct:
                done -= done % ALIGNMENT  # a direct read has to go on at a whole block
            if done == before:
                raise self._too_short(offset + needed)
        if not self.direct:
            self.drop_pages(offset, needed)

    def _preadv(self, view: memoryview, offset: int) -> int:
        """The system's read; the one place where tests put faults and slowness."""
        descriptor = self._descriptor
        if descriptor is None:
            raise OSError(errno.EBADF, "the file was closed")
        return os.preadv(descriptor.number, [view], offset)

    def drop_pages(self, offset: int, n_bytes: int) -> None:
        """Take the pages just read out of the page cache: their bytes are in RAM twice."""
        descriptor = self._descriptor
        if _MAY_ADVISE and descriptor is not None:
            first = offset - offset % ALIGNMENT
            os.posix_fadvise(descriptor.number, first, _round_up(offset + n_bytes) - first, os.POSIX_FADV_DONTNEED)

    def _error(self, offset: int, error: OSError) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: reading at byte {offset:,} failed: {error.strerror}; check the drive, or copy the file again"
        )

    def _too_short(self, end: int) -> ModelFileError:
        descriptor = self._descriptor
        n_bytes = self.n_bytes if descriptor is None else os.fstat(descriptor.number).st_size
        return ModelFileError(
            f"{self.path}: the file has {n_bytes:,} bytes now, reading up to byte {end:,} gave too few;"
            " copy or pack it again"
        )

    def close(self) -> None:
        """Close the file as soon as no read is under way; later ones raise ModelFileError."""
        self._descriptor = None

    def __enter__(self) -> FlashFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _round_up(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def open_regular(path: Path, kind: str = "") -> int:
    """Open a regular file for reading: its number. `kind` is what messages call such a file, for example ".gguf ".

    O_NONBLOCK because opening a pipe would wait for a writer.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise ModelFileError(f"{path}: no permission to read it; change its owner or mode") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelFileError(f"{str(path)!r} cannot be opened: {reason}; check the path") from error
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise ModelFileError(f"{path}: {what}; name the {kind}file itself")

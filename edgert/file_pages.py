"""Gives back the pages of files that this process has read or mapped and needs no more.

A memory cgroup counts the page cache of whoever read it first. Of 320 MiB that a start takes there, 230 are libraries
and modules, mostly read ahead; LLVM alone is 170, and it has no work once the kernels are there.
Elsewhere the page cache is the kernel's affair and makes the next start faster: it is dropped under a limit only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_IDLE = "libllvmlite"  # the library that is left alone once kernels are compiled; others here are small, or a host's


@dataclass
class Mapping:
    """A mapped part of a file."""

    start: int
    n_bytes: int
    permissions: str
    path: str
    own_bytes: int = 0  # of pages that were written to: they are no longer the file's


def release(*, dropping: bool, compiling: bool = False) -> None:
    """Unmap the compiler, unless it has still work to do; dropping: drop libraries and modules from the page cache.

    Pages that stay mapped stay there. Takes 20 ms; what is used again is mapped or read again. Does nothing where the
    system has no such calls.
    """
    if not sys.platform.startswith("linux"):
        return
    mapped = [part for part in mappings() if part.path.startswith("/")]
    libraries = {part.path for part in mapped if "x" in part.permissions}
    for part in mapped:
        if not compiling and part.path in libraries and os.path.basename(part.path).startswith(_IDLE):
            _unmap(part)
    if dropping:
        drop([*libraries, *_modules()])


def drop(paths: Iterable[str | Path]) -> None:
    """Drop files from the page cache, except for pages that some process maps."""
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # a file system that has no cache
        finally:
            os.close(descriptor)


def mappings(smaps: Path = Path("/proc/self/smaps")) -> Iterator[Mapping]:
    """The mapped parts of files, in ascending address."""
    part: Mapping | None = None
    try:
        lines = smaps.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            if part is not None:
                yield part
            start, end = (int(address, 16) for address in words[0].split("-"))
            part = Mapping(start, end - start, words[1], words[5] if len(words) > 5 else "")
        elif part is not None and words[0] in ("Anonymous:", "Swap:"):
            part.own_bytes += int(words[1]) << 10
    if part is not None:
        yield part


def _unmap(part: Mapping) -> None:
    """Forget the pages of a mapping that are the file's; what is touched again comes back from there, page by page."""
    libc = ctypes.CDLL(None)
    advices = [mmap.MADV_RANDOM]  # no reading around: up to 8 MiB; newer kernels do so for code all the same
    if "w" not in part.permissions and not part.own_bytes:  # nothing would bring back what was written, as addresses
        advices.append(mmap.MADV_DONTNEED)
    for advice in advices:
        libc.madvise(ctypes.c_void_p(part.start), ctypes.c_size_t(part.n_bytes), advice)


def _modules() -> set[str]:
    """Files that Python's modules were read from."""
    found: list[object] = []
    for module in list(sys.modules.values()):
        with suppress(Exception):  # sys.modules holds anything; getattr would run what lazy modules do
            found += map(vars(module).get, ("__file__", "__cached__"))
    return {path for path in found if isinstance(path, str)}

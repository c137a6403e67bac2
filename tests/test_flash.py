"""Reading a file past the page cache: every byte right at any position, and each fault one clear error."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.storage import flash
from edgert.storage.flash import ALIGNMENT, FlashFile, aligned_buffer, is_aligned

SIZE = 300_007
DATA = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("flash") / "experts.bin"
    file.write_bytes(DATA.tobytes())
    return file


class Faulty(FlashFile):
    """A file whose reads are what `answer` makes of them: it gets the view, the offset and the real read."""

    answer: Callable[[memoryview, int, Callable[[memoryview, int], int]], int]

    def _preadv(self, view: memoryview, offset: int) -> int:
        return self.answer(view, offset, super()._preadv)


def read(file: FlashFile, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    out = np.full(n_bytes, 0xAA, np.uint8)
    file.read(offset, out)
    return out


@given(first=st.integers(0, SIZE), last=st.integers(0, SIZE), direct=st.booleans(), shift=st.integers(0, 70))
def test_any_stretch_into_any_address(path: Path, first: int, last: int, direct: bool, shift: int) -> None:
    first, last = sorted((first, last))
    memory = np.full(last - first + shift + 64, 0xAA, np.uint8)
    out = memory[shift : shift + last - first]
    with FlashFile(path, direct=None if direct else False) as file:
        file.read(first, out)
    assert (out == DATA[first:last]).all()
    assert (memory[:shift] == 0xAA).all() and (memory[shift + last - first :] == 0xAA).all()


def test_a_read_longer_than_the_bounce_buffer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_BOUNCE_BYTES", 2 * ALIGNMENT)
    with FlashFile(path) as file:
        for first, last in ((1, SIZE), (0, SIZE), (ALIGNMENT - 1, 5 * ALIGNMENT + 1), (8 * ALIGNMENT, SIZE - 1)):
            assert (read(file, first, last - first) == DATA[first:last]).all()


def test_aligned_reads_go_straight_into_the_buffer(path: Path) -> None:
    buffer = aligned_buffer(8 * ALIGNMENT)
    addresses = []

    def note(view: memoryview, offset: int, real: Callable[[memoryview, int], int]) -> int:
        addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(view)))
        return real(view, offset)

    with Faulty(path) as file:
        file.answer = note  # type: ignore[assignment]   # a plain function, not bound
        file.read(ALIGNMENT, buffer)
    assert addresses == [buffer.ctypes.data] and (buffer == DATA[ALIGNMENT : 9 * ALIGNMENT]).all()


@pytest.mark.parametrize("n_bytes", [0, 1, ALIGNMENT, 5000, 2 << 20, (2 << 20) + 1])
def test_buffers_are_aligned_and_outlive_their_maker(n_bytes: int) -> None:
    buffer = aligned_buffer(n_bytes)
    assert buffer.shape == (n_bytes,) and buffer.ctypes.data % ALIGNMENT == 0 and not buffer.any()
    assert is_aligned(ALIGNMENT, buffer) == (n_bytes % ALIGNMENT == 0) and not is_aligned(1, buffer)
    buffer[:] = 7  # writable to its end


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("step", [1, 511, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT])
def test_short_reads_go_on(path: Path, step: int, direct: bool | None) -> None:
    """A direct read that breaks off within a block goes on at its start; one that never gets on is an error."""

    def short(view: memoryview, offset: int, real: Callable[[memoryview, int], int]) -> int:
        if file.direct:
            assert offset % ALIGNMENT == 0 and len(view) % ALIGNMENT == 0
        return min(real(view, offset), step)

    with Faulty(path, direct=direct) as file:
        file.answer = short  # type: ignore[assignment]
        if file.direct and step < ALIGNMENT:
            with pytest.raises(ModelFileError, match="gave too few"):
                read(file, 5, 20_000)
        else:
            assert (read(file, 5, 20_000) == DATA[5:20_005]).all()


def test_a_signal_in_the_middle_is_no_error(path: Path) -> None:
    interrupted = []

    def interrupt(view: memoryview, offset: int, real: Callable[[memoryview, int], int]) -> int:
        if len(interrupted) < 3:
            interrupted.append(offset)
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return real(view, offset)

    with Faulty(path) as file:
        file.answer = interrupt  # type: ignore[assignment]
        assert (read(file, 0, 9000) == DATA[:9000]).all()
    assert len(interrupted) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE, errno.EINVAL])
def test_an_error_of_the_drive_names_file_byte_and_remedy(path: Path, number: int) -> None:
    attempts = []

    def fail(view: memoryview, offset: int, real: Callable[[memoryview, int], int]) -> int:
        attempts.append(offset)
        raise OSError(number, os.strerror(number))

    with Faulty(path) as file:
        file.answer = fail  # type: ignore[assignment]
        expected = f"{path}: reading at byte 8,192 failed: {os.strerror(number)}; check the drive"
        with pytest.raises(ModelFileError, match=re.escape(expected)):
            read(file, 2 * ALIGNMENT + 5, 100)
    assert len(attempts) == 1  # not tried again


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("left", [0, 1, ALIGNMENT, 100_000, SIZE - 1])
def test_a_file_that_shrinks_while_open(tmp_path: Path, left: int, direct: bool | None) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(DATA.tobytes())
    with FlashFile(path, direct=direct) as file:
        assert file.n_bytes == SIZE
        os.truncate(path, left)
        with pytest.raises(ModelFileError, match=f"has {left:,} bytes now, reading up to byte {SIZE:,} gave too few"):
            read(file, 3, SIZE - 3)
        assert (read(file, 0, left) == DATA[:left]).all()


def test_a_file_that_is_deleted_can_be_read_on(tmp_path: Path) -> None:
    path = tmp_path / "deleted"
    path.write_bytes(DATA.tobytes())
    with FlashFile(path) as file:
        path.unlink()
        assert (read(file, 0, SIZE) == DATA).all()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("none", "no such file"), ("pipe", "not a regular file"), (".", "a directory")):
        with pytest.raises(ModelFileError, match=words):
            FlashFile(tmp_path / name)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        FlashFile("nul\0character")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no file here that is known to refuse direct reads")
def test_a_file_system_without_direct_reads() -> None:
    with FlashFile("/proc/version") as file:
        assert not file.direct and "refuses direct reads" in file.reason
        assert (read(file, 1, 10) == np.frombuffer(Path("/proc/version").read_bytes()[1:11], np.uint8)).all()
    with pytest.raises(UnsupportedError, match="refuses direct reads"):
        FlashFile("/proc/version", direct=True)


def test_direct_reads_that_are_refused_only_when_tried(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(flash.os, "preadv", refuse)
    file = FlashFile(path)
    monkeypatch.undo()
    with file:
        assert not file.direct and "refuses direct reads (Invalid argument)" in file.reason
        assert (read(file, 0, SIZE) == DATA).all()


def test_a_system_without_direct_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_O_DIRECT", 0)
    monkeypatch.setattr(flash, "_MAY_ADVISE", False)
    with FlashFile(path) as file:
        assert not file.direct and "no O_DIRECT" in file.reason
        assert (read(file, 0, SIZE) == DATA).all()


def resident_pages(path: Path) -> int:
    """Pages of a file in the page cache, as mincore says."""
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        cell = ctypes.c_char.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(cell)), ctypes.c_size_t(len(view)), pages)
        del cell
        assert not failed
        return sum(page & 1 for page in pages)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mincore"), reason="this system does not tell what is in its cache")
@pytest.mark.parametrize("direct", [None, False])
def test_nothing_stays_in_the_page_cache(path: Path, direct: bool | None) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path):
        pytest.skip("this file system keeps its files in memory")
    with FlashFile(path, direct=direct) as file:
        assert (read(file, 5, SIZE - 10) == DATA[5:-5]).all()
    assert resident_pages(path) == 0


def test_a_read_that_a_close_overtakes_is_refused_and_nothing_leaks(path: Path) -> None:
    """Else the number of the closed file could be another file's when the read comes to it."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(view: memoryview, offset: int, real: Callable[[memoryview, int], int]) -> int:
        begun.set()
        assert go_on.wait(60)
        return real(view, offset)

    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    file = Faulty(path)
    file.answer = slow  # type: ignore[assignment]
    result: list[object] = []

    def late() -> None:
        try:
            result.append(read(file, 0, 100))
        except EdgertError as error:
            result.append(str(error))

    thread = threading.Thread(target=late)
    thread.start()
    assert begun.wait(60)
    file.close()
    go_on.set()
    thread.join()
    assert "the file was closed" in str(result[0])
    file.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_negative_offset_is_a_mistake_of_the_caller(path: Path) -> None:
    with FlashFile(path) as file, pytest.raises(ValueError, match="offset -1"):
        read(file, -1, 1)


INHERITED = """
import os, sys
import numpy as np
from edgert.storage.flash import aligned_buffer
inherited = aligned_buffer(4 << 20)
inherited[:] = 1
child = os.fork()
if child == 0:
    zeros = not inherited.any()
    own = [aligned_buffer(4 << 20) for _ in range(8)]
    for buffer in own:
        buffer[:] = 2
    del inherited  # takes nothing away but itself
    os._exit(0 if zeros and all((buffer == 2).all() for buffer in own) else 1)
_, status = os.waitpid(child, 0)
sys.exit(status or not (inherited == 1).all())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps what is read from a forked child")
def test_a_forked_child_inherits_addresses_and_no_bytes() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INHERITED], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

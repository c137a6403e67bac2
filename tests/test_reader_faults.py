"""Overlapping reads that fail or that nobody waits for: errors name the expert, and lanes, buffers, processes go."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import paced_file
import pytest
from paced_file import DATA, Paced, finish, make, right, until

from edgert.errors import EdgertError, ModelFileError
from edgert.storage.flash import ALIGNMENT, FlashFile, aligned_buffer
from edgert.storage.reader import Arrival, Read, Reader


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paced_file.write(tmp_path_factory.mktemp("reader") / "experts.bin")


# ---- faults ----------------------------------------------------------------------------------------------------------
def test_an_error_names_the_expert_and_the_next_read_is_fine(path: Path) -> None:
    bad, good = make(8, 8, key=17), make(32, 8, key=18)
    with (
        Paced(path, broken=frozenset([11])) as file,
        Reader(file, lanes=2, chunk_bytes=ALIGNMENT, name="layer 3, expert {}".format) as reader,
    ):
        reader.submit([bad, good])
        ends = {arrival.read.key: arrival for arrival in finish(reader)}
        words = f"layer 3, expert 17: {path}: reading at byte {11 * ALIGNMENT:,} failed: {os.strerror(errno.EIO)}"
        assert isinstance(ends[17].error, ModelFileError) and str(ends[17].error).startswith(words)
        assert ends[18] == Arrival(good, len(good.buffer)) and right(good)
        assert reader.idle and reader.check() == []


def test_a_file_that_is_truncated_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    path.write_bytes(DATA.tobytes())
    with FlashFile(path) as file, Reader(file, lanes=3, chunk_bytes=4 * ALIGNMENT) as reader:
        os.truncate(path, 100 * ALIGNMENT + 10)
        inside, across, beyond = make(0, 16, key=0), make(96, 16, key=1), make(200, 16, key=2)
        reader.submit([inside, across, beyond])
        errors = {arrival.read.key: arrival.error for arrival in finish(reader)}
        assert errors[0] is None and right(inside)
        for key in (1, 2):
            assert re.match(f"read {key}: {re.escape(str(path))}: the file has 409,610 bytes now", str(errors[key]))


def test_short_reads(path: Path) -> None:
    class Short(FlashFile):
        def _preadv(self, view: memoryview, offset: int) -> int:
            return min(super()._preadv(view, offset), ALIGNMENT + 100)

    with Short(path) as file, Reader(file, lanes=2, chunk_bytes=8 * ALIGNMENT) as reader:
        read = make(3, 30)
        reader.submit([read])
        assert finish(reader) == [Arrival(read, len(read.buffer))] and right(read)


def test_a_lane_survives_a_mistake_in_the_check(path: Path) -> None:
    def check(read: Read) -> None:
        raise ZeroDivisionError("in the check")

    def name(key: int) -> str:
        return ["the only one"][key]

    with FlashFile(path) as file, Reader(file, lanes=1, chunk_bytes=ALIGNMENT, check=check, name=name) as reader:
        for key, words in enumerate(("the only one", "read 1")):
            reader.submit([make(0, 1, key=key)])
            (arrival,) = finish(reader)
            assert str(arrival.error) == f"{words}: {path}: ZeroDivisionError: in the check"
            assert type(arrival.error) is EdgertError and isinstance(arrival.error.__cause__, ZeroDivisionError)
        assert reader.check() == []


def test_what_a_caller_may_not_do(path: Path) -> None:
    buffer = aligned_buffer(2 * ALIGNMENT)
    wrong = [
        Read(0, 1, buffer, (len(buffer),)),
        Read(0, 0, buffer[1:], (len(buffer) - 1,)),
        Read(0, 0, buffer[:0], (0,)),
        Read(0, 0, buffer, ()),
        Read(0, 0, buffer, (5,)),
        Read(0, 0, buffer, (0, len(buffer))),
        Read(0, 0, buffer, (9, 9, len(buffer))),
    ]
    with Paced(path, (0.01,)) as file, Reader(file, lanes=1, chunk_bytes=ALIGNMENT) as reader:
        for read in wrong:
            with pytest.raises(ValueError, match="read 0: "):
                reader.submit([read])
        read = make(0, 2)
        with pytest.raises(ValueError, match="submitted before"):
            reader.submit([read, read])
        reader.submit([read])
        with pytest.raises(ValueError, match="submitted before"):
            reader.submit([make(9, 1), read])
        finish(reader)
        assert reader.check() == []
    for lanes, chunk in ((0, ALIGNMENT), (65, ALIGNMENT), (1, 0), (1, 5000)):
        with pytest.raises(ValueError):
            Reader(file, lanes=lanes, chunk_bytes=chunk)


# ---- ends ------------------------------------------------------------------------------------------------------------
def test_nothing_leaks_with_or_without_close(path: Path) -> None:
    def lanes() -> int:
        return sum(thread.name.startswith("edgert-flash") for thread in threading.enumerate())

    before = lanes()
    with FlashFile(path) as file:
        for closing in (True, False):
            for _ in range(20):
                reader = Reader(file, lanes=3, chunk_bytes=ALIGNMENT)
                reader.submit([make(0, 8), make(9, 8, urgent=False)])
                if closing:
                    reader.close()
                del reader
            gc.collect()
            assert lanes() == before


def test_an_idle_reader_keeps_no_buffer(path: Path) -> None:
    with FlashFile(path) as file, Reader(file, lanes=3, chunk_bytes=ALIGNMENT) as reader:
        buffer = aligned_buffer(8 * ALIGNMENT)
        owners = sys.getrefcount(buffer)
        reader.submit([Read(0, 0, buffer, (len(buffer),))])
        assert len(finish(reader)) == 1
        until(lambda: sys.getrefcount(buffer) == owners)


def test_many_readers_of_one_file(path: Path) -> None:
    with FlashFile(path) as file:
        readers = [Reader(file, lanes=2, chunk_bytes=3 * ALIGNMENT) for _ in range(8)]
        reads = [[make(i + 8 * j, 20, key=i) for j in range(16)] for i in range(len(readers))]
        for reader, own in zip(readers, reads, strict=True):
            reader.submit(own)
        for reader, own in zip(readers, reads, strict=True):
            assert {arrival.read for arrival in finish(reader)} == set(own) and all(map(right, own))
            reader.close()


SCRIPT = """
import os, signal, sys, threading, time, warnings
from pathlib import Path
import numpy as np
from edgert.errors import EdgertError
from edgert.storage.flash import FlashFile, aligned_buffer
from edgert.storage.reader import Read, Reader
class Slow(FlashFile):
    def _preadv(self, view, offset):
        time.sleep(0.05)
        return super()._preadv(view, offset)
path = Path(sys.argv[1])
file = Slow(path)
reader = Reader(file, lanes=2, chunk_bytes=8192)
buffer = aligned_buffer(262144)
reader.submit([Read(0, 0, buffer, (262144,))])
"""


def run(path: Path, body: str) -> str:
    """What a process of its own prints, with reads under way; it has to end by itself and without a word on stderr."""
    command = [sys.executable, "-c", SCRIPT + body, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_a_process_ends_with_reads_under_way(path: Path) -> None:
    assert run(path, "print('over')") == "over\n"


def test_ctrl_c_ends_a_wait(path: Path) -> None:
    body = """
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        reader.wait()
except KeyboardInterrupt:
    print("interrupted")
reader.close()
print(len(reader.poll()), reader.pending, reader.check())
"""
    assert run(path, body) == "interrupted\n1 0 []\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_the_child_of_a_fork_leaves_the_lanes_alone(path: Path) -> None:
    body = """
warnings.simplefilter("ignore", DeprecationWarning)   # newer Pythons warn of a fork beside threads
child = os.fork()
if not child:
    for call in (reader.poll, reader.wait, lambda: reader.submit([]), lambda: reader.cancel([])):
        try:
            call()
        except EdgertError as error:
            assert "before fork" in str(error)
        else:
            os._exit(3)
    reader.close()
    own = np.zeros(100, np.uint8)
    file.read(5, own)
    with Reader(file, lanes=2, chunk_bytes=8192) as other:
        mine = aligned_buffer(8192)
        other.submit([Read(0, 0, mine, (8192,))])
        assert len(other.wait()) == 1 and bytes(mine[5:105]) == bytes(own)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
while reader.pending:
    reader.wait()
print(bytes(buffer) == path.read_bytes()[:262144])
"""
    assert run(path, body) == "True\n"

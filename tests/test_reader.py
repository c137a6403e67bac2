"""Overlapping reads: every byte right for any order of submits, promotions, cancels and faults, and nothing hangs."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import EdgertError, ModelFileError
from edgert.storage.flash import ALIGNMENT, FlashFile, aligned_buffer
from edgert.storage.reader import Arrival, Read, Reader

N_BLOCKS = 256
DATA = np.random.default_rng(1).integers(0, 256, N_BLOCKS * ALIGNMENT, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("reader") / "experts.bin"
    file.write_bytes(DATA.tobytes())
    return file


class Paced(FlashFile):
    """A file whose reads take the times in `delays_s` in turn, fail in the blocks in `broken`, or wait for `gate`."""

    def __init__(self, path: Path, delays_s: tuple[float, ...] = (), broken: frozenset[int] = frozenset()) -> None:
        super().__init__(path)
        self.delays_s, self.broken = delays_s, broken
        self.gate: threading.Semaphore | None = None
        self.begun: list[tuple[int, int]] = []  # offset and size in blocks of each piece, as lanes took them
        self.n_running = self.most_running = 0
        self._lock = threading.Lock()

    def _preadv(self, view: memoryview, offset: int) -> int:
        with self._lock:
            self.begun.append((offset // ALIGNMENT, len(view) // ALIGNMENT))
            number = len(self.begun)
            self.n_running += 1
            self.most_running = max(self.most_running, self.n_running)
        try:
            if self.gate is not None:
                assert self.gate.acquire(timeout=60)
            if self.delays_s:
                time.sleep(self.delays_s[number % len(self.delays_s)])
            if self.broken.intersection(range(offset // ALIGNMENT, (offset + len(view)) // ALIGNMENT)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super()._preadv(view, offset)
        finally:
            with self._lock:
                self.n_running -= 1


def make(first: int, n_blocks: int, *marks: int, urgent: bool = True, key: int = 0) -> Read:
    """A read of whole blocks into a new buffer."""
    size = n_blocks * ALIGNMENT
    return Read(key, first * ALIGNMENT, aligned_buffer(size), (*marks, size), urgent)


def right(read: Read, n_bytes: int | None = None) -> bool:
    """Whether the first bytes of a read are what the file has there."""
    n_bytes = len(read.buffer) if n_bytes is None else n_bytes
    return bool((read.buffer[:n_bytes] == DATA[read.offset : read.offset + n_bytes]).all())


def finish(reader: Reader) -> list[Arrival]:
    """All arrivals until nothing is under way."""
    arrivals = []
    while reader.pending:
        arrivals += reader.wait(60)
    assert reader.poll() == [] and reader.wait() == []
    return arrivals


def until(condition: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")


class Ledger:
    """What each read may still report, and that what was reported is true at that moment."""

    def __init__(self) -> None:
        self.marks: dict[Read, int] = {}  # reported of each
        self.ended: dict[Read, Arrival] = {}

    def book(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            read = arrival.read
            assert read not in self.ended, "an arrival after the last one"
            reported = self.marks.setdefault(read, 0)
            if arrival.error is None and not arrival.cancelled:
                assert arrival.mark == read.marks[reported], "marks come in order, each once"
                assert right(read, arrival.mark)
                self.marks[read] += 1
            else:
                assert arrival.mark == (read.marks[reported - 1] if reported else 0)
                assert not (arrival.error and arrival.cancelled)
                read.buffer[:] = 0xEE  # another record's now: nothing may write into it
            if self.marks[read] == len(read.marks) or arrival.error or arrival.cancelled:
                self.ended[read] = arrival

    def check(self, reads: list[Read]) -> None:
        assert set(self.ended) == set(reads)
        for read, last in self.ended.items():
            assert (read.buffer == 0xEE).all() if last.error or last.cancelled else right(read)


READS = st.tuples(
    st.integers(0, N_BLOCKS - 24), st.integers(1, 24), st.sets(st.integers(1, 23), max_size=3), st.booleans()
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(READS, min_size=1, max_size=4)),
        st.tuples(st.just("promote"), st.integers(0, 50)),
        st.tuples(st.just("cancel"), st.lists(st.integers(0, 50), max_size=3)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.0005, 60.0])),
        st.tuples(st.just("poll"), st.none()),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=250)
@given(
    steps=STEPS,
    lanes=st.integers(1, 5),
    chunk=st.sampled_from([1, 2, 3, 7, 64]),
    delays_s=st.sampled_from([(), (0.0, 0.0004, 0.0001), (0.0, 0.0, 0.002)]),
    broken=st.frozensets(st.integers(0, N_BLOCKS - 1), max_size=12),
    refused=st.sets(st.integers(0, 20), max_size=3),
)
def test_every_byte_whatever_happens(
    path: Path,
    steps: list[tuple[str, Any]],
    lanes: int,
    chunk: int,
    delays_s: tuple[float, ...],
    broken: frozenset[int],
    refused: set[int],
) -> None:
    """Any order of calls, at any pace, with broken blocks and failed checks: the ledger sees each read end once."""

    def check(read: Read) -> None:
        assert right(read), "checked before all bytes are there"
        if read.key in refused:
            raise ModelFileError("the checksum is wrong")

    reads: list[Read] = []
    ledger = Ledger()
    with (
        Paced(path, delays_s, broken) as file,
        Reader(file, lanes=lanes, chunk_bytes=chunk * ALIGNMENT, check=check, name="expert {}".format) as reader,
    ):
        for step, argument in steps:
            if step == "submit":
                new = []
                for first, n_blocks, marks, urgent in argument:
                    inner = (mark * ALIGNMENT - 64 * mark for mark in sorted(marks) if mark < n_blocks)
                    new.append(make(first, n_blocks, *inner, urgent=urgent, key=len(reads) + len(new)))
                reads += new
                reader.submit(new)
            elif step == "promote" and reads:
                reader.promote(reads[argument % len(reads)])
            elif step == "cancel" and reads:
                reader.cancel([reads[number % len(reads)] for number in argument])
            elif step == "wait":
                ledger.book(reader.wait(argument))
            elif step == "poll":
                ledger.book(reader.poll())
            assert reader.check() == []
        ledger.book(finish(reader))
        assert reader.idle and reader.pending == 0 and reader.check() == []
        assert reader.bytes_read <= sum(n_blocks for _, n_blocks in file.begun) * ALIGNMENT
    ledger.check(reads)
    for read, last in ledger.ended.items():
        first, size = read.offset // ALIGNMENT, len(read.buffer) // ALIGNMENT
        if last.error is not None:
            assert str(last.error).startswith(f"expert {read.key}: ")
            assert read.key in refused or broken.intersection(range(first, first + size))
        elif not last.cancelled:
            assert read.key not in refused and not broken.intersection(range(first, first + size))


# ---- order -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def gated(path: Path) -> Iterator[Paced]:
    """A file whose pieces begin at once and end one by one, when the gate is released."""
    with Paced(path) as file:
        file.gate = threading.Semaphore(0)
        yield file
        file.gate.release(10_000)


def test_lanes_work_on_the_first_read_together_and_on_urgent_ones_first(gated: Paced) -> None:
    assert gated.gate is not None
    with Reader(gated, lanes=2, chunk_bytes=2 * ALIGNMENT) as reader:
        reader.submit([make(0, 6), make(10, 2, urgent=False), make(20, 2, urgent=False)])
        until(lambda: len(gated.begun) == 2)
        reader.submit([make(30, 3)])
        gated.gate.release(100)
        finish(reader)
        assert gated.most_running == 2
    assert gated.begun == [(0, 2), (2, 2), (4, 2), (30, 2), (32, 1), (10, 2), (20, 2)]


def test_a_promoted_prefetch_overtakes_the_others(gated: Paced) -> None:
    assert gated.gate is not None
    first, second, third = (make(10 * i, 4, urgent=False, key=i) for i in range(3))
    with Reader(gated, lanes=1, chunk_bytes=2 * ALIGNMENT) as reader:
        reader.submit([first, second, third])
        until(lambda: len(gated.begun) == 1)
        reader.promote(third)
        reader.promote(third)
        gated.gate.release(100)
        arrivals = finish(reader)
        reader.promote(third)  # is done: nothing
    assert third.urgent and [arrival.read.key for arrival in arrivals] == [2, 0, 1]
    assert gated.begun == [(0, 2), (20, 2), (22, 2), (2, 2), (10, 2), (12, 2)]


def test_gate_and_up_arrive_before_down(gated: Paced) -> None:
    assert gated.gate is not None
    read = make(0, 6, 2 * ALIGNMENT - 64, 4 * ALIGNMENT)
    with Reader(gated, lanes=1, chunk_bytes=2 * ALIGNMENT) as reader:
        reader.submit([read])
        for mark in read.marks:
            assert reader.wait(0.0) == [] and not reader.idle
            gated.gate.release()
            assert reader.wait(60) == [Arrival(read, mark)]
        assert right(read) and reader.idle and reader.bytes_read == len(read.buffer) and reader.busy_s > 0


def test_pieces_that_end_in_another_order(gated: Paced, path: Path) -> None:
    """A mark is there when all bytes below it are, not when the piece that holds it is."""
    events = {offset: threading.Event() for offset in range(0, 8, 2)}

    class Ordered(FlashFile):
        def _preadv(self, view: memoryview, offset: int) -> int:
            assert events[offset // ALIGNMENT].wait(60)
            return super()._preadv(view, offset)

    read = make(0, 8, 4 * ALIGNMENT)
    with Ordered(path) as file, Reader(file, lanes=4, chunk_bytes=2 * ALIGNMENT) as reader:
        reader.submit([read])
        for offset in (6, 2, 4):
            events[offset].set()
            assert reader.wait(0.01) == []
        events[0].set()
        assert finish(reader) == [Arrival(read, 4 * ALIGNMENT), Arrival(read, 8 * ALIGNMENT)]
    assert right(read)


# ---- cancelling ------------------------------------------------------------------------------------------------------
def test_a_cancelled_read_is_reported_once_nothing_writes_into_its_buffer(gated: Paced) -> None:
    assert gated.gate is not None
    flying, queued = make(0, 6, key=1), make(10, 2, key=2)
    with Reader(gated, lanes=1, chunk_bytes=2 * ALIGNMENT) as reader:
        reader.submit([flying, queued])
        until(lambda: len(gated.begun) == 1)
        reader.cancel([flying, queued])
        reader.cancel([flying, queued])
        assert reader.poll() == [Arrival(queued, 0, cancelled=True)]
        assert reader.pending == 1 and not reader.idle and reader.wait(0.02) == []
        gated.gate.release()
        assert reader.wait(60) == [Arrival(flying, 0, cancelled=True)]
        flying.buffer[:] = 0xEE
        other = Read(3, 20 * ALIGNMENT, flying.buffer, flying.marks)
        reader.submit([other])
        gated.gate.release(100)
        assert finish(reader) == [Arrival(other, len(other.buffer))] and right(other)
    assert len(gated.begun) == 4


def test_a_cancel_after_the_last_byte_changes_nothing(path: Path) -> None:
    checking, go_on = threading.Event(), threading.Event()

    def check(read: Read) -> None:
        checking.set()
        assert go_on.wait(60)

    read = make(0, 4)
    with FlashFile(path) as file, Reader(file, lanes=2, chunk_bytes=ALIGNMENT, check=check) as reader:
        reader.submit([read])
        assert checking.wait(60)
        reader.cancel([read])
        go_on.set()
        assert finish(reader) == [Arrival(read, len(read.buffer))]
        reader.cancel([read])
        assert reader.wait() == [] and right(read)


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
def test_close_with_reads_under_way(path: Path) -> None:
    with Paced(path, (0.02,)) as file:
        reader = Reader(file, lanes=2, chunk_bytes=2 * ALIGNMENT)
        reads = [make(10 * i, 8, key=i) for i in range(6)]
        reader.submit(reads)
        until(lambda: len(file.begun) == 2)
        reader.close()
        assert file.n_running == 0 and len(file.begun) <= 4 and reader.pending == 6
        assert [arrival.cancelled for arrival in reader.poll()] == [True] * 6
        assert reader.pending == 0 and reader.wait() == [] and reader.idle and reader.check() == []
        with pytest.raises(EdgertError, match="the reader was closed"):
            reader.submit([make(0, 1)])
        reader.cancel(reads)
        reader.close()


def test_a_close_wakes_whoever_waits(gated: Paced) -> None:
    assert gated.gate is not None
    reader = Reader(gated, lanes=1, chunk_bytes=ALIGNMENT)
    reader.submit([make(0, 2)])
    got: list[list[Arrival]] = []
    waiter = threading.Thread(target=lambda: got.append(reader.wait()))
    waiter.start()
    gated.gate.release(10)
    reader.close()
    waiter.join(60)
    assert len(got) == 1


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

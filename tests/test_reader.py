"""Overlapping reads: every byte right for any order of submits, promotions, cancels and faults, and who comes first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paced_file
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paced_file import N_BLOCKS, Paced, finish, make, right, until

from edgert.errors import EdgertError, ModelFileError
from edgert.storage.flash import ALIGNMENT, FlashFile
from edgert.storage.reader import Arrival, Read, Reader


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paced_file.write(tmp_path_factory.mktemp("reader") / "experts.bin")


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


# ---- cancelling and closing ------------------------------------------------------------------------------------------
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

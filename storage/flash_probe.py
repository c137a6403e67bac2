"""How fast records are read from a drive: lanes by chunk size, past the page cache and through it.

Measured with the reader that the runtime uses, on random records of a large file, a few at a time as decoding asks for
them. The settings take turns in short slices, because the speed of a shared drive moves by half within seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgert.errors import ModelFileError, OptionError
from edgert.storage.flash import ALIGNMENT, FlashFile, aligned_buffer
from edgert.storage.flash_settings import FlashSettings, today
from edgert.storage.reader import Read, Reader

LANES = (1, 2, 4, 8)
CHUNKS = (128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20)
TEMPORARY_BYTES = 256 << 20
_AT_A_TIME = 4  # records in flight: top 8 experts, half of them resident
LEAST_RECORDS = 2 * _AT_A_TIME  # that a file must hold to be measured
_SLICE_S = 0.03  # a setting's turn, unless one group of records takes longer
_ROUNDS = (3, 25)  # at least and at most
_DROP_BELOW = (0.75, 0.02, 0.95)  # of the best: slower settings are left out after the first rounds, more after each
_DEFAULT = FlashSettings()

# On most drives many settings are equal and the noise picks the fastest: the default is taken if it comes this near to
# it, unless what it has in flight holds up an urgent read for long.
_DEFAULT_IS_NEAR = 0.9
_LONG_S = 0.01
# Else the smallest setting (lanes x chunk) within this of the fastest: less in flight lets an urgent read begin sooner.
_TIE = 0.96
# The page cache costs memory that experts could have, and processor time: it has to be faster by this.
_WORTH_THE_CACHE = 1.15


@dataclass
class Candidate:
    """One way to read, and the rates of its turns in bytes a second."""

    lanes: int
    chunk_bytes: int
    direct: bool
    rates: list[float] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """The median."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def in_flight(self) -> int:
        """Bytes that are being read when all lanes are at work."""
        return self.lanes * self.chunk_bytes

    def is_default(self) -> bool:
        """Whether files of unmeasured drives are read like this."""
        return (self.lanes, self.chunk_bytes) == (_DEFAULT.lanes, _DEFAULT.chunk_bytes)


@dataclass(frozen=True)
class FlashProbe:
    """What was measured of one file."""

    path: Path
    record_bytes: int
    direct: bool  # whether the file system takes direct reads
    reason: str
    candidates: tuple[Candidate, ...]

    def best(self) -> FlashSettings:
        """The setting to read with."""
        past = [one for one in self.candidates if one.direct]
        through = [one for one in self.candidates if not one.direct]
        kind = past or through
        if past and through and _fastest(through) > _WORTH_THE_CACHE * _fastest(past):
            kind = through
        good = [one for one in kind if one.bytes_per_s >= _TIE * _fastest(kind)]
        best = min(good, key=lambda one: (one.in_flight, one.lanes))
        for one in kind:
            near = one.bytes_per_s >= _DEFAULT_IS_NEAR * _fastest(kind)
            if one.is_default() and near and one.in_flight < _LONG_S * one.bytes_per_s:
                best = one
        # None, not True: the file may be copied to a drive that refuses direct reads, under the same mount point
        direct = None if best.direct or not past else False
        return FlashSettings(best.lanes, best.chunk_bytes, best.bytes_per_s, True, direct, self.record_bytes, today())


def _fastest(candidates: list[Candidate]) -> float:
    return max(one.bytes_per_s for one in candidates)


def chunks_for(record_bytes: int) -> tuple[int, ...]:
    """The chunk sizes that differ for records of this size: the last one holds a whole record."""
    return (
        *(chunk for chunk in CHUNKS if chunk < record_bytes),
        next((c for c in CHUNKS if c >= record_bytes), CHUNKS[-1]),
    )


def probe(
    path: str | os.PathLike[str],
    record_bytes: int,
    *,
    seconds: float = 8.0,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> FlashProbe:
    """Measure how fast records of `record_bytes` are read from the file at `path`, for about `seconds`.

    A slow drive takes longer: each setting has at least 3 turns of 4 records. Raises ModelFileError for a file that
    cannot be read or holds fewer than 8 records.
    """
    record_bytes = -(-record_bytes // ALIGNMENT) * ALIGNMENT
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(FlashFile(path))
        if file.n_bytes < LEAST_RECORDS * record_bytes:
            raise ModelFileError(
                f"{file.path}: {file.n_bytes:,} bytes are fewer than {LEAST_RECORDS} records of {record_bytes:,}; "
                "measure with a larger file"
            )
        buffered = stack.enter_context(FlashFile(path, direct=False)) if file.direct else file
        sizes = chunks_for(record_bytes)
        candidates = [Candidate(lanes, chunk, True) for lanes in LANES for chunk in sizes if file.direct]
        middle = [chunk for chunk in sizes if chunk <= _DEFAULT.chunk_bytes][-1:] if file.direct else list(sizes)
        candidates += [Candidate(lanes, chunk, False) for lanes in LANES for chunk in middle or sizes[:1]]
        turns = _Turns(file, buffered, record_bytes)
        _measure(candidates, turns, seconds, progress)
        return FlashProbe(file.path, record_bytes, file.direct, file.reason, tuple(candidates))


def _measure(
    candidates: list[Candidate], turns: _Turns, seconds: float, progress: Callable[[str, float], None]
) -> None:
    """Give each candidate its turns, in another order each round, and leave out the slow ones soon."""
    shuffle = random.Random(0).shuffle
    turns.run(candidates[0], 0.0)  # the drive wakes up
    started = time.perf_counter()
    left = list(candidates)
    for number in range(_ROUNDS[1]):
        shuffle(left)
        for index, candidate in enumerate(left):
            candidate.rates.append(turns.run(candidate, _SLICE_S))
            by_time = (time.perf_counter() - started) / seconds
            by_turns = (number + (index + 1) / len(left)) / _ROUNDS[0]
            progress("measuring the drive", min(by_time, by_turns, 1.0))
        extra = number + 1 - _ROUNDS[0]
        if extra >= 0:
            if time.perf_counter() - started > seconds:
                return
            left = _without_slow(left, min(_DROP_BELOW[0] + extra * _DROP_BELOW[1], _DROP_BELOW[2]))


def _without_slow(candidates: list[Candidate], least: float) -> list[Candidate]:
    """Those that reach `least` of the fastest of their kind, past the page cache or through it."""
    limits = {}
    for direct in {one.direct for one in candidates}:
        limits[direct] = least * _fastest([one for one in candidates if one.direct == direct])
    return [one for one in candidates if one.bytes_per_s >= limits[one.direct]]


class _Turns:
    """Reads random records of one file for a while."""

    def __init__(self, file: FlashFile, buffered: FlashFile, record_bytes: int) -> None:
        self.file, self.buffered, self.record_bytes = file, buffered, record_bytes
        self.random = random.Random(1)
        memory = aligned_buffer(_AT_A_TIME * record_bytes)
        memory[:] = 1  # no first touch while the clock runs
        self.slots = list(memory.reshape(_AT_A_TIME, record_bytes))

    def run(self, candidate: Candidate, seconds: float) -> float:
        """Bytes a second over about `seconds`; at least one group of records."""
        file = self.file if candidate.direct else self.buffered
        n_bytes, taken = 0, 0.0
        with Reader(file, lanes=candidate.lanes, chunk_bytes=candidate.chunk_bytes) as reader:
            while not n_bytes or taken < seconds:
                reads = self._group()
                if not file.direct:
                    for read in reads:
                        file.drop_pages(read.offset, self.record_bytes)
                started = time.perf_counter()
                reader.submit(reads)
                arrivals = []
                while reader.pending:
                    arrivals += reader.wait()
                taken += time.perf_counter() - started
                for arrival in arrivals:
                    if arrival.error is not None:
                        raise arrival.error
                n_bytes += len(reads) * self.record_bytes
        return n_bytes / taken

    def _group(self) -> list[Read]:
        places = self.random.sample(range(self.file.n_bytes // self.record_bytes), _AT_A_TIME)
        return [
            Read(number, place * self.record_bytes, slot, (self.record_bytes,))
            for number, (place, slot) in enumerate(zip(places, self.slots, strict=True))
        ]


@contextlib.contextmanager
def temporary_file(
    folder: Path, n_bytes: int, progress: Callable[[str, float], None] = lambda stage, fraction: None
) -> Iterator[Path]:
    """A file of random bytes in `folder` to measure with, written out to the drive, gone at the end.

    Raises OptionError if the folder has no room or takes no file.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * n_bytes:
        raise OptionError(
            f"{folder} has {free / 2**20:,.0f} MiB free, a measurement writes {n_bytes / 2**20:,.0f} MiB: "
            "name a large file that is there already"
        )
    try:
        number, name = tempfile.mkstemp(prefix=".edgert-doctor-", dir=folder)
    except OSError as error:
        raise OptionError(f"{folder} takes no file ({error.strerror}): name a large file that is there") from error
    try:
        with open(number, "wb", buffering=0) as file:
            block = np.random.default_rng(0).integers(0, 256, 4 << 20, dtype=np.uint8)
            for done in range(0, n_bytes, len(block)):
                _write_all(file.fileno(), block[: n_bytes - done])
                block += 1  # no two blocks are the same, in case the drive looks for that
                progress("writing a file to measure with", done / n_bytes)
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


def _write_all(number: int, block: npt.NDArray[np.uint8]) -> None:
    done = 0
    while done < len(block):
        done += os.write(number, block[done:].data)

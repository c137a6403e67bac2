"""The threads behind a reader, their queues, and what they report.

A lane takes the next piece of the first read, reads it without any lock, books it, and sleeps when nothing is queued.
The caller's side of the queues is here too, for both share one lock; what a caller may do is checked in reader.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import EdgertError
from edgert.storage.flash import FlashFile


@dataclass(eq=False)
class Read:
    """One stretch of the file, into memory of the caller, who leaves that alone until the last arrival."""

    key: int  # the caller's name for it
    offset: int  # in the file; like the buffer's address and size a multiple of 4,096
    buffer: npt.NDArray[np.uint8]  # (n_bytes,)
    marks: tuple[int, ...]  # bytes from the start, ascending: an arrival as soon as each is there; the last is n_bytes
    urgent: bool = True  # False: a prefetch


class Arrival(NamedTuple):
    """The first `mark` bytes of a read are there. With an error or cancelled it is the read's last arrival.

    After the last arrival, whichever it is, nothing writes into the buffer any more.
    """

    read: Read
    mark: int  # with an error or cancelled the one reported before, or 0
    error: EdgertError | None = None
    cancelled: bool = False


def _is_last(arrival: Arrival) -> bool:
    return arrival.mark == arrival.read.marks[-1] or arrival.error is not None or arrival.cancelled


class _Job:
    """How far a read has come."""

    __slots__ = ("error", "marked", "missing", "n_flying", "over", "read", "start", "view")

    def __init__(self, read: Read) -> None:
        self.read = read
        self.view = read.buffer.data
        self.start = 0  # of the next piece
        self.missing = [last - first for first, last in pairwise((0, *read.marks))]  # bytes, by mark
        self.marked = 0  # marks reported
        self.n_flying = 0  # pieces that a lane is reading
        self.error: EdgertError | None = None
        self.over = False  # failed or cancelled: no piece begins any more


# Measured, records of 3.4 MiB, 4 at a time: as fast as plain threads that do nothing but preadv, also while compiled
# threads keep every core busy. One read of 64 KiB takes 27 us more than the caller's own preadv; with a Condition in
# place of the SimpleQueue 33. Pieces that shrink towards the end, so that lanes end together, cost 5 to 10 %.
class Lanes:
    """The queues, the threads and what they share. `lock` guards all of it; no read and no check runs under it."""

    def __init__(
        self, file: FlashFile, chunk_bytes: int, check: Callable[[Read], None] | None, name: Callable[[int], str]
    ) -> None:
        self.file, self.chunk_bytes, self.check, self.name = file, chunk_bytes, check, name
        self.lock = threading.Lock()
        self.jobs: dict[Read, _Job] = {}  # all reads that are not done
        self.urgent: deque[_Job] = deque()  # jobs with pieces that have not begun
        self.prefetch: deque[_Job] = deque()
        self.arrived: SimpleQueue[Arrival] = SimpleQueue()
        self.wake: SimpleQueue[None] = SimpleQueue()  # one item for each lane taken off n_asleep
        self.n_pending = 0  # reads whose last arrival the caller has not got: the caller's own count
        self.n_asleep = 0
        self.n_flying = 0
        self.bytes_read = 0
        self.busy_before_s = 0.0
        self.busy_since_s = 0.0
        self.closed = False
        self.threads: list[threading.Thread] = []
        self.process = os.getpid()

    # ---- the caller's side -------------------------------------------------------------------------------------------
    def start(self, n_lanes: int) -> None:
        for number in range(n_lanes):
            thread = threading.Thread(target=self.run, name=f"edgert-flash-{number}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def check_process(self) -> None:
        """Before any lock: a thread that does not exist in a child may have held it at the fork."""
        if os.getpid() != self.process:
            raise EdgertError(f"{self.file.path} was opened for reading before fork; open it in the child")

    def submit(self, reads: list[Read]) -> None:
        with self.lock:
            if self.closed:
                raise EdgertError(f"{self.file.path}: the reader was closed; open it again")
            known = [read.key for read in reads if read in self.jobs]
            if known or len(set(reads)) < len(reads):
                raise ValueError(f"read {known or [read.key for read in reads]} was submitted before and is not done")
            for read in reads:
                job = self.jobs[read] = _Job(read)
                (self.urgent if read.urgent else self.prefetch).append(job)
            self.n_pending += len(reads)
            self._wake(sum(-(-len(read.buffer) // self.chunk_bytes) for read in reads))

    def promote(self, read: Read) -> None:
        with self.lock:
            job = self.jobs.get(read)
            if job is not None and not read.urgent:
                read.urgent = True
                if job in self.prefetch:
                    self.prefetch.remove(job)
                    self.urgent.append(job)

    def cancel(self, reads: Sequence[Read]) -> None:
        with self.lock:
            for read in reads:
                job = self.jobs.get(read)
                if job is not None and any(job.missing):
                    self._give_up(job)

    def wait(self, timeout_s: float | None) -> list[Arrival]:
        with self.lock:
            over = not self.jobs and self.arrived.empty()
        if over:  # whatever the count says: Ctrl-C may have come between taking arrivals and handing them out
            self.n_pending = 0
            return []
        with contextlib.suppress(Empty):
            return self.drain([self.arrived.get(timeout=timeout_s)])
        return []

    def drain(self, arrivals: list[Arrival]) -> list[Arrival]:
        """`arrivals` and all that are there now, which the caller gets."""
        with contextlib.suppress(Empty):
            while True:
                arrivals.append(self.arrived.get_nowait())
        self.n_pending -= sum(map(_is_last, arrivals))
        return arrivals

    def busy_s(self) -> float:
        with self.lock:
            return self.busy_before_s + (time.perf_counter() - self.busy_since_s if self.n_flying else 0.0)

    def is_idle(self) -> bool:
        with self.lock:
            return not (self.n_flying or self.urgent or self.prefetch)

    def stop(self) -> None:
        """End the lanes and wait for them; in a child of a fork there are none."""
        if os.getpid() != self.process:
            return
        with self.lock:
            self.closed = True
            for job in list(self.jobs.values()):
                if any(job.missing):
                    self._give_up(job)
            self._wake(len(self.threads))
        for thread in self.threads:
            if thread is not threading.current_thread():  # garbage may be collected on a lane
                thread.join()

    # ---- the lanes' side ---------------------------------------------------------------------------------------------
    def run(self) -> None:
        """What a lane does until the end: read pieces while there are any, sleep until woken."""
        while True:
            with self.lock:
                piece = self._take()
                if piece is None:
                    if self.closed:
                        return
                    self.n_asleep += 1
            if piece is None:
                self.wake.get()
                continue
            job, start, stop = piece
            try:
                self.file.fill(job.read.offset + start, job.view[start:stop])
                error = None
            except Exception as problem:  # whatever it is: the reader must not wait for ever
                error = self._explain(job.read, problem)
            if self._landed(job, start, stop, error):
                self._finish(job)
            del job, piece  # a sleeping lane keeps no buffer alive

    def _take(self) -> tuple[_Job, int, int] | None:
        """The next piece: its job, where it starts and where it stops."""
        queue = self.urgent or self.prefetch
        if not queue:
            return None
        job = queue[0]
        start = job.start
        stop = job.start = min(start + self.chunk_bytes, len(job.view))
        if stop == len(job.view):
            queue.popleft()
        job.n_flying += 1
        if not self.n_flying:
            self.busy_since_s = time.perf_counter()
        self.n_flying += 1
        return job, start, stop

    def _landed(self, job: _Job, start: int, stop: int, error: EdgertError | None) -> bool:
        """Book a piece that was read; whether all bytes of its read are there now, so that it is to be finished."""
        with self.lock:
            job.n_flying -= 1
            self.n_flying -= 1
            if not self.n_flying:
                self.busy_before_s += time.perf_counter() - self.busy_since_s
            if error is not None:
                self._give_up(job, error)
                return False
            self.bytes_read += stop - start
            if job.over:
                self._give_up(job)
                return False
            return self._count(job, start, stop)

    def _count(self, job: _Job, start: int, stop: int) -> bool:
        """Take a piece off what is missing and report marks that are complete, but for the last one; is that too?"""
        missing, marks = job.missing, job.read.marks
        below = 0
        for segment, mark in enumerate(marks):
            missing[segment] -= max(min(stop, mark) - max(start, below), 0)
            below = mark
        while job.marked < len(marks) - 1 and not missing[job.marked]:
            self.arrived.put(Arrival(job.read, marks[job.marked]))
            job.marked += 1
        return not any(missing)

    def _finish(self, job: _Job) -> None:
        """Check a read whose bytes are all there, and report its end."""
        error = None
        if self.check is not None:
            try:
                self.check(job.read)
            except Exception as problem:
                error = self._explain(job.read, problem)
        with self.lock:
            self._end(job, error)

    def _give_up(self, job: _Job, error: EdgertError | None = None) -> None:
        """Begin no more pieces of a job, and end it once none is under way; the first error counts."""
        job.error = job.error or error
        if not job.over:
            for queue in (self.urgent, self.prefetch):
                if job in queue:
                    queue.remove(job)
            job.over = True  # last: after Ctrl-C before it, the next call still takes the job off its queue
        if not job.n_flying:
            self._end(job, job.error)

    def _end(self, job: _Job, error: EdgertError | None) -> None:
        """Report the last of a read: all is there, or an error or a cancel and the mark that was reached before."""
        read = job.read
        if self.jobs.pop(read, None) is None:
            return  # Ctrl-C came between this and the arrival: the caller's books say so
        if error is None and not job.over:
            self.arrived.put(Arrival(read, read.marks[-1]))
        else:
            reached = read.marks[job.marked - 1] if job.marked else 0
            self.arrived.put(Arrival(read, reached, error, cancelled=error is None))

    def _wake(self, n_lanes: int) -> None:
        for _ in range(min(n_lanes, self.n_asleep)):
            self.wake.put(None)  # first: Ctrl-C between the two wakes a lane once too often, and never one too few
            self.n_asleep -= 1

    def _explain(self, read: Read, problem: Exception) -> EdgertError:
        """The error of a lane with the read's name before it."""
        try:
            name = self.name(read.key)
        except Exception:
            name = f"read {read.key}"
        if isinstance(problem, EdgertError):
            error: EdgertError = type(problem)(f"{name}: {problem}")
        else:
            error = EdgertError(f"{name}: {self.file.path}: {type(problem).__name__}: {problem}")
        error.__cause__ = problem
        return error

    def audit(self) -> list[str]:
        """What is wrong with the book-keeping."""
        with self.lock:
            queued = [*self.urgent, *self.prefetch]
            wrong = [f"{job.read.key} is queued and done" for job in queued if job.read not in self.jobs]
            flying = sum(job.n_flying for job in self.jobs.values())
            if flying != self.n_flying:
                wrong.append(f"{self.n_flying} pieces are under way, by reads {flying}")
            for job in self.jobs.values():
                if (job.start < len(job.view) and not job.over) != (job in queued):
                    wrong.append(
                        f"{job.read.key} has {len(job.view) - job.start} bytes to begin, queued: {job in queued}"
                    )
            wrong += [f"{lane.name} has died" for lane in self.threads if not (self.closed or lane.is_alive())]
        return wrong

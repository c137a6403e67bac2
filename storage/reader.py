"""Reads that overlap: a few threads (lanes) take pieces of the reads that were submitted, and report what has arrived.

Urgent reads go before prefetches and each in the order given; all lanes work on the first one. One thread at a time
submits and waits; the lanes only read, check and report. What a read holds is not known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType

from edgert.storage.flash import ALIGNMENT, FlashFile, is_aligned
from edgert.storage.lanes import Arrival as Arrival
from edgert.storage.lanes import Lanes
from edgert.storage.lanes import Read as Read

MOST_LANES = 64


class Reader:
    """Lanes over one file, which has to stay open as long as they do.

    check(read) is called on a lane once all bytes are there and raises EdgertError if they are wrong; name(key) is what
    messages call a read. After a fork the child has no lanes: there every call but close() raises EdgertError.
    """

    def __init__(
        self,
        file: FlashFile,
        *,
        lanes: int,
        chunk_bytes: int,
        check: Callable[[Read], None] | None = None,
        name: Callable[[int], str] = "read {}".format,
    ) -> None:
        if not 1 <= lanes <= MOST_LANES:
            raise ValueError(f"lanes={lanes} is not from 1 to {MOST_LANES}")
        if chunk_bytes < ALIGNMENT or chunk_bytes % ALIGNMENT:
            raise ValueError(f"chunk_bytes={chunk_bytes} is not a multiple of {ALIGNMENT}")
        self._lanes = Lanes(file, chunk_bytes, check, name)
        self._lanes.start(lanes)
        # The threads hold the Lanes, not this: so it can be collected while they wait. At exit it is called as well,
        # before buffers go that a read may still be writing to.
        self._finalizer = weakref.finalize(self, self._lanes.stop)

    def submit(self, reads: Sequence[Read]) -> None:
        """Queue reads behind those of the same urgency."""
        self._lanes.check_process()
        self._lanes.submit([_checked(read) for read in reads])

    def promote(self, read: Read) -> None:
        """Make a prefetch urgent: what is left of it goes behind the urgent reads. Nothing if it is done."""
        self._lanes.check_process()
        self._lanes.promote(read)

    def cancel(self, reads: Sequence[Read]) -> None:
        """Drop what has not begun. An arrival that says cancelled comes once nothing writes into the buffer.

        A read whose bytes were all there ends as if nothing had happened.
        """
        self._lanes.check_process()
        self._lanes.cancel(reads)

    def wait(self, timeout_s: float | None = None) -> list[Arrival]:
        """What has arrived, in order: at least one; [] after the timeout, and at once if nothing is under way."""
        self._lanes.check_process()
        return self._lanes.wait(timeout_s)

    def poll(self) -> list[Arrival]:
        """What has arrived, without waiting."""
        self._lanes.check_process()
        return self._lanes.drain([])

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the file."""
        return self._lanes.bytes_read

    @property
    def busy_s(self) -> float:
        """Time in which at least one piece was being read."""
        return self._lanes.busy_s()

    @property
    def pending(self) -> int:
        """Reads whose last arrival the caller has not got yet."""
        return self._lanes.n_pending

    @property
    def idle(self) -> bool:
        """Whether no piece is queued or being read."""
        return self._lanes.is_idle()

    def close(self) -> None:
        """Cancel what is queued, let pieces under way end, and end the lanes. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> list[str]:
        """What is wrong with the book-keeping; nothing, if all is well."""
        return self._lanes.audit()


def _checked(read: Read) -> Read:
    size, marks = len(read.buffer), read.marks
    if not is_aligned(read.offset, read.buffer) or not size:
        raise ValueError(f"read {read.key}: offset, address and size must be multiples of {ALIGNMENT}")
    if not marks or marks[0] <= 0 or marks[-1] != size or any(a >= b for a, b in pairwise(marks)):
        raise ValueError(f"read {read.key}: marks {marks} do not ascend to its {size} bytes")
    return read

"""Whose turn it is to use a loaded model: one answer or measurement at a time, other threads wait for theirs.

A turn belongs to the answer: any thread may read it on, or end it. The thread that read it last cannot ask for another
turn, because it would wait for itself, and is told so. It knows nothing of models.
"""

from __future__ import annotations

import os
import threading

from edgert.errors import BusyError, EdgertError

_CANCEL_POLL_S = 0.1  # how often an answer that waits for its turn looks whether it is still wanted


class Turn:
    """A lock that is not tied to the thread which took it, and that a child of the process refuses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that loaded the model: it has the memory, but not the threads."""
        return os.getpid() != self._process

    def take(self, cancelled: threading.Event | None = None) -> bool:
        """Wait for the model; False if `cancelled` was set meanwhile."""
        self._check_process()
        if self._reader is threading.current_thread():
            raise BusyError("this thread still reads another answer of this model: finish or close() that stream first")
        while not self._lock.acquire(timeout=-1 if cancelled is None else _CANCEL_POLL_S):
            if cancelled is not None and cancelled.is_set():
                return False
        self._reader = threading.current_thread()
        return True

    def go_on(self) -> None:
        """The answer is read on, by this thread."""
        self._check_process()
        self._reader = threading.current_thread()

    def give_back(self) -> None:
        """Let the next one have it; any thread may."""
        self._reader = None
        self._lock.release()

    def _check_process(self) -> None:
        if self.forked:
            raise EdgertError("this model was loaded before fork; load it in the child, or use the spawn start method")

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give_back()

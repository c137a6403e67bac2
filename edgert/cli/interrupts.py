"""Ctrl-C where it must not strike at once: while a model is loaded, and while it answers.

Compilers and kernels call back into Python; a KeyboardInterrupt raised there is swallowed or leaves half-made things.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.generation import Stream

Report = Callable[[str, float], None]


class Loading:
    """Remembers Ctrl-C while a model is loaded and raises it where that is safe; a second one leaves at once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._pressed = False
        self._compiling = False

    def press(self, _number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._pressed:
            if os.isatty(2):
                os.write(2, b"\r\x1b[K\x1b[?25h")  # the line of the bar, and the cursor that it hid
            os._exit(130)
        self._pressed = True

    def report(self, stage: str, fraction: float) -> None:
        """For the `progress` of load. KeyboardInterrupt if Ctrl-C was pressed and nothing is being compiled."""
        if not self._compiling:
            self.check()
        self._compiling = stage.startswith("compiling")
        self._report(stage, fraction)

    def check(self) -> None:
        """KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pressed:
            raise KeyboardInterrupt


@contextlib.contextmanager
def while_loading(report: Report) -> Iterator[Loading]:
    """Ctrl-C goes to what this yields; where the process was started to ignore Ctrl-C, it goes on doing so."""
    loading = Loading(report)
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield loading
        return
    signal.signal(signal.SIGINT, loading.press)
    try:
        yield loading
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def stops(stream: Stream) -> Iterator[None]:
    """Ctrl-C cancels the stream between two tokens; a second one interrupts whatever hangs."""
    presses = 0

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        stream.cancel()
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Turns:
    """Ctrl-C in a conversation: KeyboardInterrupt within a turn, once, and nothing between turns."""

    def __init__(self) -> None:
        self._within = False

    def press(self, _number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._within:
            self._within = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For as long as the conversation lasts."""
        before = signal.signal(signal.SIGINT, self.press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within it, Ctrl-C interrupts."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

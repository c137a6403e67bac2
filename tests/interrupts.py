"""Ctrl-C at a chosen line of what streams experts, again and again the same."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from edgert.experts import buffer, prefetch, slots, streamed
from edgert.storage import lanes, reader

INTERRUPTED = {module.__file__ for module in (streamed, buffer, slots, prefetch, reader, lanes)}


class Interrupt:
    """Raises KeyboardInterrupt in this thread at the n-th line of what streams experts, as Ctrl-C may."""

    def __init__(self, at_line: int) -> None:
        self.left = at_line

    def __enter__(self) -> Interrupt:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in INTERRUPTED else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.left -= 1
            if self.left <= 0 and not self._is_with(frame):
                raise KeyboardInterrupt
        return self._line

    def _is_with(self, frame: FrameType) -> bool:
        """Where a block is left that holds a lock: no signal is looked at between there and the lock's release."""
        return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")

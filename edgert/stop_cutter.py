"""Stop strings in a text that comes in pieces: what is certain to stay goes on, the beginning of one is held back."""

from __future__ import annotations

from collections.abc import Collection


class StopCutter:
    """Lets text through until it contains a stop string; holds back what may be the beginning of one.

    Of several, the one that is complete first counts, so that the cut does not depend on token borders.
    """

    def __init__(self, stop: Collection[str]) -> None:
        self.met: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is free to go now that `text` is there; nothing after a stop string."""
        if self.met is not None:
            return ""
        text = self._held + text
        found = [(place + len(s), place, s) for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            _, place, self.met = min(found)
            self._held = ""
            return text[:place]
        n_free = len(text) - max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[n_free:]
        return text[:n_free]

    @property
    def n_held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`, at most all but one."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)

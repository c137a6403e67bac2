"""Keeps the text of messages from being read as control tokens once a template has put it into a prompt.

Texts that come in are broken, by a private-use character, wherever they spell a control token, and at their ends where
they could complete one with what stands next to them. The mark is taken out after the prompt has been cut at its
control tokens, which then are those that the template wrote. So the mark is no secret, only unlikely in a text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Roles that a template may write inside a control token, as in '<|' + role + '|>'.
_ROLES = frozenset(
    {
        "system",
        "developer",
        "user",
        "assistant",
        "model",
        "tool",
        "function",
        "observation",
        "ipython",
        "tool_results",
        "tool_response",
        "environment",
    }
)
_PRIVATE_USE = frozenset(map(chr, range(0xE000, 0xF900)))  # no letters, digits or spaces: templates leave them alone


class ControlTextGuard:
    """Marks and unmarks texts.

    control_texts: how the control tokens are written, in any order. escapes: the template writes JSON in ASCII, so
    that marks come out as \\u escapes.
    """

    def __init__(self, control_texts: Iterable[str], *, escapes: bool = False) -> None:
        self._texts = sorted(filter(None, control_texts), key=len, reverse=True)
        free = sorted(_PRIVATE_USE.difference("".join(self._texts)))
        # Coded is a character that cannot be broken, or is one of these two: its number follows.
        self._mark, self._coded = random.SystemRandom().sample(free, 2)  # leaves the host's random numbers alone
        self._starts = {text[:2] for text in self._texts}  # a quick look: most texts hold none of these
        self._prefixes = {text[:i] for text in self._texts for i in range(1, len(text))}
        self._suffixes = {text[i:] for text in self._texts for i in range(1, len(text))}
        self._longest = max(map(len, self._texts), default=0)
        marks = [(character, rf"\\u{ord(character):04x}")[: 1 + escapes] for character in (self._mark, self._coded)]
        self._any_mark = re.compile(rf"(?:{'|'.join(marks[1])})(\d{{7}})?|{'|'.join(marks[0])}")

    def mark(self, text: str) -> str:
        """Break the control tokens in a text, and at its ends what could become one."""
        for own in (self._coded, self._mark):
            if own in text:
                text = text.replace(own, self._code(own))
        return self._mark_ends(self._break(text, self._texts))

    def mark_role(self, role: str) -> str:
        """The same for a message's role; the usual roles are left as they are."""
        if role in _ROLES:
            return role
        inside = any(role in text for text in self._texts)
        return self._mark + self._break(role, self._texts) + self._mark if inside else self.mark(role)

    def mark_key(self, key: str) -> str:
        """The same for the name of a field, which templates look up: nothing changes unless it looks dangerous."""
        return key if re.fullmatch(r"\w*", key) else self.mark(key)

    def protect(self, text: str, sources: Sequence[Any]) -> str:
        """Mark a text that a template has made by cutting or changing `sources`, where it spells what none did."""
        if not any(start in text for start in self._starts):
            return self._mark_ends(text)
        before = [
            part
            for source in sources
            for part in (source if isinstance(source, list | tuple) else (source,))
            if isinstance(part, str)
        ]
        new = [token for token in self._texts if token in text and not any(token in part for part in before)]
        return self._mark_ends(self._break(text, new))

    def unmark(self, text: str) -> str:
        """A text as it was before it was marked."""
        return self._any_mark.sub(lambda match: chr(min(int(match[1]), 0x10FFFF)) if match[1] else "", text)

    def _code(self, character: str) -> str:
        return f"{self._coded}{ord(character):07d}"

    def _break(self, text: str, tokens: list[str]) -> str:
        if any(start in text for start in self._starts):
            for token in tokens:
                if len(token) == 1:
                    text = text.replace(token, self._code(token))
                while token in text:  # again, because "aa" stands twice in "aaa"
                    text = text.replace(token, token[0] + self._mark + token[1:])
        return text

    def _mark_ends(self, text: str) -> str:
        core = text.strip()
        if not core or (core.isalnum() and core.isascii()):  # words; templates compare with such, as 'user' or 'text'
            return text
        inside = len(core) < self._longest and any(core in token for token in self._texts)
        lengths = range(1, min(self._longest, len(text) + 1))
        first = len(text) - len(text.lstrip())
        borders = {first, first + len(core)} if inside else set()
        for start, end in ((first, first + len(core)), (0, len(text))):  # templates may or may not strip it
            if any(text[max(start, end - i) : end] in self._prefixes for i in lengths):
                borders.add(end)
            if any(text[start : min(end, start + i)] in self._suffixes for i in lengths):
                borders.add(start)
        for border in sorted(borders, reverse=True):
            text = text[:border] + self._mark + text[border:]
        return text

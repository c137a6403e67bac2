"""The messages of a chat, and the file that keeps them. It knows nothing of models and terminals."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from edgert.errors import OptionError
from edgert.storage.aside import written_aside

FORMAT = "edgert chat 1"
ROLES = ("system", "user", "assistant", "tool")
REASONING = "reasoning_content"  # as templates call what an assistant thought before it answered
LARGEST_FILE = 64 << 20  # bytes; a chat is text that once fitted a context

Message = dict[str, str]


class Conversation:
    """Messages in order; a system message, if any, is the first."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    @property
    def system(self) -> str | None:
        """The system message's text."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or take it away with None; all else stays."""
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[: self.system is not None]

    def asking(self, text: str) -> list[Message]:
        """The messages with a question at the end; the conversation itself is unchanged."""
        return [*self.messages, {"role": "user", "content": text}]

    def add(self, question: str, answer: str, reasoning: str = "") -> None:
        """A turn that took place. Its reasoning is kept beside the answer: a template shows it again or drops it."""
        said = {"role": "assistant", "content": answer, **({REASONING: reasoning} if reasoning else {})}
        self.messages = [*self.asking(question), said]

    def save(self, path: Path, model: str) -> None:
        """Write the messages as JSON, aside, then renamed. OptionError where `path` is another thing."""
        document = {"format": FORMAT, "model": model, "messages": self.messages}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        try:
            if path.exists():
                read(path)  # only a saved chat is overwritten
            with written_aside(path) as aside:
                aside.write_bytes(text.encode(errors="replace"))
        except OSError as problem:
            message = f"{path} cannot be written ({problem.strerror}): name another file"
            raise OptionError(message) from problem

    def load(self, path: Path) -> None:
        """Take the messages of a saved chat in place of these; OptionError if it is none."""
        self.messages = read(path)


def read(path: Path) -> list[Message]:
    """The messages of a saved chat, or OptionError."""
    try:
        document = json.loads(_content(path).decode())
    except OSError as problem:
        raise OptionError(f"{path} cannot be read ({problem.strerror}): name a saved chat") from problem
    except OptionError:
        raise
    except (ValueError, RecursionError) as problem:
        raise OptionError(f"{path} is no saved chat: it is not JSON") from problem
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise OptionError(f'{path} is no saved chat: it has no "format": "{FORMAT}"')
    messages = document.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise OptionError(f"{path} is damaged: its messages are not pairs of role and content")
    return [{key: m[key] for key in ("role", "content", REASONING) if key in m} for m in messages]


def _content(path: Path) -> bytes:
    """A regular file of no more than LARGEST_FILE bytes; OSError, or OptionError for another thing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OptionError(f"{path} cannot be read (it is no regular file): name another file")
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise OptionError(f"{path} is too large for a saved chat: name another file")
    return content


def _is_message(value: Any) -> bool:
    """Whether it is a role and a text; JSON can spell halves of characters, which are no text."""
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        return False
    texts = [value.get("content"), value.get(REASONING, "")]
    return all(isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text) for text in texts)

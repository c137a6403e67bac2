"""Reading what a person types in a chat: several lines, a history that lasts, a prompt that survives Ctrl-C.

Enter sends; Alt-Enter, a backslash at the end of a line, or Enter within three quotes begins another line.
It knows nothing of models and commands.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'


def state_dir() -> Path:
    """Where this user's state belongs: $XDG_STATE_HOME/edgert, or ~/.local/state/edgert."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "edgert"


class LastingHistory(FileHistory):
    """A history file; where the disk refuses a line, the line is kept for this chat only."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history() -> History:
    """The history file of chats, readable by its owner alone; in memory where there can be none."""
    try:
        folder = state_dir()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "chat_history"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return InMemoryHistory()
    return LastingHistory(str(path))


class Terminal:
    """Reads one message after the other."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=open_history(), key_bindings=_keys(), multiline=True, prompt_continuation="  "
        )

    def read(self) -> str:
        """The next message. EOFError at Ctrl-D, KeyboardInterrupt at the key Ctrl-C on an empty line.

        A SIGINT from elsewhere is left to the handler installed: two of them in a row trip the editor's own.
        """
        text = self._session.prompt("> ", handle_sigint=False)
        return unquoted(text.encode(errors="replace").decode())  # bytes that are no UTF-8 come as surrogates


def unquoted(text: str) -> str:
    """`text` without the three quotes around it, if it has them."""
    bare = text.strip()
    if len(bare) >= 2 * len(QUOTES) and bare.startswith(QUOTES) and bare.endswith(QUOTES):
        return bare.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def unfinished(text: str) -> bool:
    """Whether Enter begins another line: three quotes are open."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2 == 1


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys

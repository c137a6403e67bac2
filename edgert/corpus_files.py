"""Documents of a corpus file: text, JSON lines or one JSON document, each read in parts from all over the file.

A large file is not read whole: a few parts, evenly spread. Each is checked to be UTF-8 and no binary. A document is a
text, or the messages of a conversation where it looks like one.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from edgert.errors import OptionError
from edgert.storage.bundle import is_bundle

Message = dict[str, str]  # role and content, as chat templates want them
Document = str | list[Message]
Whole = str | list[Document]  # of a file: plain text, or the documents of JSON

_JSON, _LINES = (".json",), (".jsonl", ".ndjson")
_MOST_JSON, _MOST_LINE = 256 << 20, 16 << 20
_MODEL = b"GGUF"
_NO_TEXT = "{path} is a model, no text: the model comes first, as in edgert profile MODEL --corpus FILE..."
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CONVERSATIONS = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog")
_ROLES, _CONTENTS = ("role", "from", "speaker"), ("content", "value", "text", "utterance")
_QUESTIONS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")
_TEXTS = ("text", "content")  # of records that have other things beside
_USER, _ASSISTANT = {"user", "human", "prompter"}, {"assistant", "gpt", "bot", "model", "chatgpt"}


def read_parts(path: Path, n_parts: int, part_bytes: int) -> list[list[Document]]:
    """The documents of a file, as one part if it is small; else of `n_parts` places, `part_bytes` or so from each.

    OptionError, in one line, for a file that cannot be read, is empty, binary, of another encoding or no JSON.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OptionError(f"{path} is no regular file: name files of text")
            if file.read(len(_MODEL)) == _MODEL:
                raise OptionError(_NO_TEXT.format(path=path))
            file.seek(0)
            parts = _parts(file, path, status.st_size, n_parts, part_bytes)
    except IsADirectoryError as error:
        is_model = is_bundle(path) or (path / "config.json").exists()
        problem = _NO_TEXT if is_model else "{path} cannot be read (Is a directory): name the files of text in it"
        raise OptionError(problem.format(path=path)) from error
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}): name a file of text, .json or .jsonl") from error
    except ValueError as error:  # a path with a null character
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{str(path)!r} cannot be read ({error}): name a file of text, .json or .jsonl") from error
    if not any(_has_text(document) for part in parts for document in part):
        raise OptionError(f"{path} holds {'no text' if status.st_size else 'nothing'}: name a file with text in it")
    return parts


def read_whole(path: Path) -> Whole:
    """All of a file; raises as read_parts does."""
    (documents,) = read_parts(path, 1, 1 << 62)
    if path.suffix.lower() in (*_JSON, *_LINES):
        return documents
    (text,) = documents
    assert isinstance(text, str)
    return text


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would be waited for


def _parts(file: BinaryIO, path: Path, size: int, n_parts: int, part_bytes: int) -> list[list[Document]]:
    suffix = path.suffix.lower()
    if suffix in _JSON:
        return [_json(file, path, size)]
    places = [0, size] if size <= n_parts * part_bytes else [size * part // n_parts for part in range(n_parts + 1)]
    read = _lines_of if suffix in _LINES else _text_of
    spans = itertools.pairwise(places)
    return [read(file, path, start, end, size if len(places) == 2 else part_bytes) for start, end in spans]


# ---- text ------------------------------------------------------------------------------------------------------------
def _text_of(file: BinaryIO, path: Path, start: int, end: int, most: int) -> list[Document]:
    """The lines that begin between two places, `most` bytes or so of them."""
    end = min(end, start + most)
    file.seek(max(start - 1, 0))
    content = file.read(end - file.tell() + most)
    first = _line_start(content, 1) if start else 0
    last = _line_start(content, end - start + (1 if start else 0))
    return [_decoded(content[first:last], path, max(start - 1, 0) + first)]


def _line_start(content: bytes, place: int) -> int:
    """Where the first line at or after `place` begins, or the character where there is no line."""
    if place >= len(content):
        return len(content)
    newline = content.find(b"\n", place - 1)
    if newline >= 0:
        return newline + 1
    while place < len(content) and content[place] & 0xC0 == 0x80:
        place += 1
    return place


def _decoded(content: bytes, path: Path, place: int) -> str:
    """UTF-8 as text; OptionError where it is none, or binary."""
    if place == 0 and content.startswith(_UTF16):
        raise OptionError(f"{path} is UTF-16: convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)")
    if (null := content.find(b"\0")) >= 0:
        raise OptionError(
            f"{path} has a null at byte {place + null:,}: it is binary, or not UTF-8; name a file of text"
        )
    try:
        return content.decode("utf-8-sig" if place == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is not UTF-8 at byte {place + error.start:,}: convert it first (iconv -t UTF-8 -f ENCODING)"
        ) from error


# ---- JSON ------------------------------------------------------------------------------------------------------------
def _lines_of(file: BinaryIO, path: Path, start: int, end: int, most: int) -> list[Document]:
    """The documents in the lines that begin between two places, `most` bytes or so of them."""
    file.seek(max(start - 1, 0))
    if start:
        file.readline(_MOST_LINE)  # up to the next line's begin
    found: list[Document] = []
    end = min(end, file.tell() + most)
    while (place := file.tell()) < end:
        line = file.readline(_MOST_LINE)
        if len(line) == _MOST_LINE:
            raise OptionError(
                f"{path} has a line of more than {_MOST_LINE >> 20} MiB at byte {place:,}: is it JSON lines?"
            )
        if line.strip():
            found += _documents(_parsed(_decoded(line, path, place), path, place))
    return found


def _json(file: BinaryIO, path: Path, size: int) -> list[Document]:
    """The documents of a whole JSON file: the items of a list, or one."""
    if size > _MOST_JSON:
        raise OptionError(
            f"{path} has {size:,} bytes, at most {_MOST_JSON:,} are read of a .json: write a document a line (.jsonl)"
        )
    value = _parsed(_decoded(file.read(), path, 0), path, None)
    items = value if isinstance(value, list) and _messages(value) is None else [value]
    return [document for item in items for document in _documents(item)]


def _parsed(text: str, path: Path, place: int | None) -> Any:
    """JSON's value. `place`: the byte where the line begins; None for a whole file."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at byte {place:,}" if place is not None else ""
        remedy = "mend or remove that line" if place is not None else "name it .jsonl if each line is a document"
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise OptionError(f"{path} is not JSON{where} ({said}): {remedy}") from error


def _documents(value: Any) -> Iterator[Document]:
    """What one JSON value says: a conversation, or the strings in it."""
    messages = _messages(value)
    if messages is not None:
        yield messages
    elif text := "\n".join(filter(None, _strings(value))):
        yield text


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value, in order; of an object that has a text beside other things, that alone."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
        elif isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            text = next((value[key] for key in _TEXTS if isinstance(value.get(key), str)), None)
            waiting += [text] if text is not None else reversed(value.values())


def _messages(value: Any) -> list[Message] | None:
    """A conversation as messages with the roles that templates know; None if it does not look like one."""
    if isinstance(value, dict):
        for key in _CONVERSATIONS:
            if isinstance(value.get(key), list):
                return _messages(value[key])
        return _instruction(value)
    if not isinstance(value, list) or not value:
        return None
    turns = [_turn(item) for item in value]
    found = [turn for turn in turns if turn is not None]
    if len(found) != len(turns):
        return None
    first = next((role for role, _ in found if role != "system"), "")
    return [
        {"role": _role(role, first, place), "content": "".join(_strings(text))}
        for place, (role, text) in enumerate(found)
    ]


def _turn(item: Any) -> tuple[str, str] | None:
    """Who speaks and what, in lower case the first."""
    if isinstance(item, dict):
        role, text = (next((item[key] for key in keys if key in item), None) for keys in (_ROLES, _CONTENTS))
    elif isinstance(item, list) and len(item) == 2:
        role, text = item
    else:
        return None
    return (role.lower(), text) if isinstance(role, str) and isinstance(text, str) else None


def _role(role: str, first: str, place: int) -> str:
    """A speaker as user, assistant or system; who is neither by name is the user if they speak first."""
    if role == "system" and place == 0:
        return "system"
    if role in _USER or (role not in _ASSISTANT and role == first):
        return "user"
    return "assistant"


def _instruction(value: dict[str, Any]) -> list[Message] | None:
    """A question and its answer as messages."""
    question, answer = (
        next((value[key] for key in keys if isinstance(value.get(key), str)), "") for keys in (_QUESTIONS, _ANSWERS)
    )
    if not question or not answer:
        return None
    more = value.get("input")
    asked = f"{question}\n\n{more}" if isinstance(more, str) and more else question
    return [
        {"role": role, "content": "".join(_strings(text))} for role, text in (("user", asked), ("assistant", answer))
    ]


def _has_text(document: Document) -> bool:
    texts = [document] if isinstance(document, str) else [message["content"] for message in document]
    return any(text.strip() for text in texts)

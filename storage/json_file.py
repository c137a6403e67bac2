"""JSON files that nobody has vetted: bounded in bytes, values and depth, and typed as they are asked for.

A key with the value null counts as absent, as Hugging Face's files mean it. Which keys there are and what they mean is
not known here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgert.errors import ModelFileError, UnsupportedError
from edgert.storage.flash import FlashFile

# Caps far above any real file (a tokenizer of 260,000 tokens has 34 MB and 2 million values). They bound time and
# memory: `[[],[],...` takes thirty times its size once it is parsed.
MAX_BYTES = 128 << 20
MAX_VALUES = 1 << 22
MAX_DIGITS = 40  # of a number

_REMEDY = "the file is damaged: download it again"


class JsonObject:
    """One object of a JSON file. `where` names it in messages; `values` are as Python's json gives them."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str) -> Any:
        """The value of a key as it stands, None where it is absent."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int = (1 << 31) - 1) -> int:
        """A whole number within bounds; without a default the key is required."""
        value = self._value(key, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            self.wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default the key is required."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            self.wrong(key, value, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if type(value) is not bool:
            self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self.wrong(key, value, "a string")
        return value

    def array(self, key: str) -> list[Any]:
        """A list, empty where the key is absent."""
        value = self._value(key, [])
        if not isinstance(value, list):
            self.wrong(key, value, "a list")
        return value

    def object(self, key: str) -> JsonObject:
        """An object, empty where the key is absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            self.wrong(key, value, "an object")
        return JsonObject(value, f"{self.where}: {key}")

    def objects(self, key: str) -> list[JsonObject]:
        """A list of objects, empty where the key is absent."""
        items = self.array(key)
        if (wrong := next((item for item in items if not isinstance(item, dict)), None)) is not None:
            self.wrong(key, wrong, "a list of objects")
        return [JsonObject(item, f"{self.where}: {key}[{number}]") for number, item in enumerate(items)]

    def wrong(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise ModelFileError: the value makes no sense."""
        raise ModelFileError(f"{self.where}: the key {key} is {short(value)}, not {expected}; {_REMEDY}")

    def refuse(self, key: str, remedy: str) -> NoReturn:
        """Raise UnsupportedError: the value makes sense, but edgert does not do it."""
        raise UnsupportedError(f"{self.where}: the key {key} is {short(self.get(key))}; {remedy}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelFileError(f"{self.where}: the key {key} is missing; the file is incomplete: download it again")
        return default


def read_json(path: Path) -> JsonObject:
    """The object that a JSON file holds.

    Raises ModelFileError for a file that is absent, unreadable, too large, too deep or not one JSON object in UTF-8.
    """
    return parse_json(read_text(path), str(path))


def read_text(path: Path, most: int = MAX_BYTES) -> bytes:
    """A whole file of at most `most` bytes; ModelFileError otherwise."""
    with FlashFile(path, direct=False) as file:
        if file.n_bytes > most:
            raise ModelFileError(f"{path}: it has {file.n_bytes:,} bytes, at most {most:,} are read; {_REMEDY}")
        raw = np.empty(file.n_bytes, np.uint8)
        file.read(0, raw)
    return raw.tobytes()


def parse_json(raw: bytes, where: str) -> JsonObject:
    """The object that JSON text holds; `where` names it in messages. Raises ModelFileError."""
    n_values = sum(map(raw.count, (b",", b"[", b"{")))
    if n_values > MAX_VALUES:
        raise ModelFileError(f"{where}: it may hold {n_values:,} values, at most {MAX_VALUES:,} are read; {_REMEDY}")
    try:
        values = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no Unicode
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or what the hooks below refuse
        said = "it is nested too deep" if isinstance(error, RecursionError) else short(error)
        raise ModelFileError(f"{where}: no sound JSON: {said}; {_REMEDY}") from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{where}: the JSON is {short(values)}, not an object; {_REMEDY}")
    return JsonObject(values, where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} is there twice")
            seen.add(key)
    return values


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:  # Python takes quadratic time for long ones
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def short(value: object) -> str:
    """A value for a message: on one line and not endless, whatever the file holds."""
    text = str(value) if isinstance(value, Exception) else ascii(value)
    text = text.replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:97]}..."

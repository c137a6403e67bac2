"""Documents that a manifest carries for others: plain JSON of bounded size, whose meaning is not known here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH, _MAX_VALUES, _MAX_TEXT, _MAX_INTEGER = 8, 1 << 16, 1 << 16, 1 << 63


def problem(document: Any) -> str:
    """What is wrong with a document, or nothing: it is an object, not deep or large, of texts and finite numbers."""
    if not isinstance(document, dict):
        return "it is not an object"
    left, level = _MAX_VALUES, [document]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            left -= 1
            if wrong := _wrong(value):
                return wrong
            if isinstance(value, Mapping):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            if len(below) > left:
                return f"it holds more than {_MAX_VALUES:,} values"
        level = below
    return f"it is nested deeper than {_MAX_DEPTH}" if level else ""


def _wrong(value: Any) -> str:
    """What is wrong with one value by itself."""
    if isinstance(value, str):
        unicode = value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
        return "" if unicode and len(value) <= _MAX_TEXT else "a text in it is no Unicode, or too long"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "a number in it is infinite or none"
    if isinstance(value, int):
        return "" if abs(value) < _MAX_INTEGER else "a number in it is too large"
    return "" if value is None or isinstance(value, (dict, list)) else "a value in it is none of JSON's"

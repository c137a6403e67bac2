"""What a template may take: a Meter for each rendering, and checks of calls before they are made.

Every step, and every value that a template makes, is paid for; how much there is follows the size of the input. No
signals, threads or processes: it works in any host program.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from jinja2 import TemplateRuntimeError
from jinja2.exceptions import SecurityError

SECONDS = 10.0  # for one rendering
_BASE_UNITS = 1_000_000  # steps, nodes of values, and sixteenths of characters, that any rendering may take
_BASE_SIZE = 4_000_000  # characters and nodes of one value
MAX_DEPTH = 64  # calls inside calls
_MAX_NUMBER = 100_000  # for a width, a count or a precision
_MAX_BITS = 4096  # of a product or power

# In a format: a width or precision of five digits, from an argument (%*d), or from a nested field ({:{w}}).
_COMPUTED_WIDTH = re.compile(r"%(?:\([^)]*\))?[-#0 +.\d]*?(?:\*|\d{5})|\{[^{}]*(?:\{|\d{5})")
_CONTAINERS = (list, tuple, dict, set, frozenset)

_Value = TypeVar("_Value")
Protect = Callable[[str, Sequence[Any]], str]  # (text, what it was made from) -> text


class LimitError(TemplateRuntimeError):
    """A template wants more than it may have."""


class Refusal(TemplateRuntimeError):
    """What a template says with raise_exception."""


class Meter:
    """What one rendering may still take.

    n_input: characters and nodes of what is rendered. protect: applied to texts that are cut or changed.
    """

    def __init__(self, n_input: int, protect: Protect | None = None) -> None:
        self._units = _BASE_UNITS + 32 * n_input
        self._max_size = _BASE_SIZE + 8 * n_input
        self._ends_at = time.monotonic() + SECONDS
        self.depth = 0
        self.protect = protect

    def spend(self, units: int = 1) -> None:
        """Pay for work; LimitError when there is nothing left or time is up."""
        self._units -= units
        if self._units < 0:
            raise LimitError("it takes too many steps or makes too much text")
        if time.monotonic() > self._ends_at:
            raise LimitError(f"it takes longer than {SECONDS:g} seconds")

    def check(self, size: int) -> None:
        """LimitError if a value of `size` characters is too large; to be called before it is made."""
        if size > self._max_size:
            raise LimitError(f"it makes a value of more than {self._max_size:,} characters")

    def hold(self, value: _Value) -> _Value:
        """Pay for a value that a template made, and return it."""
        if isinstance(value, str):
            self.check(len(value))
            self.spend(1 + len(value) // 16)
        elif isinstance(value, _CONTAINERS):
            self.measure(value)
        return value

    def measure(self, value: Any) -> tuple[int, int]:
        """Size (characters and nodes, shared parts as often as they occur) and depth of a value."""
        size, deepest, waiting = 0, 0, [(value, 1)]
        while waiting:
            part, depth = waiting.pop()
            self.spend()
            size += 1 + (len(part) if isinstance(part, str) else 0)
            deepest = max(deepest, depth)
            self.check(size)
            if isinstance(part, dict):
                waiting += [(inner, depth + 1) for pair in part.items() for inner in pair]
            elif isinstance(part, _CONTAINERS):
                waiting += [(inner, depth + 1) for inner in part]
        return size, deepest

    def derive(self, value: Any, sources: Sequence[Any]) -> Any:
        """Pay for a text or list of texts that was cut out of `sources`, or is one of them changed."""
        if self.protect is not None:
            if isinstance(value, str):
                value = self.protect(value, sources)
            elif isinstance(value, list | tuple):
                value = type(value)(self.protect(part, sources) if isinstance(part, str) else part for part in value)
        return self.hold(value)


METER: ContextVar[Meter] = ContextVar("METER")  # of the rendering under way; each thread has its own


# --- checks before the work is done: what a call would make, from its arguments


def check_numbers(arguments: Iterable[Any]) -> None:
    for number in arguments:
        if isinstance(number, int) and abs(number) > _MAX_NUMBER:
            raise LimitError(f"it asks for a width, count or precision of more than {_MAX_NUMBER:,}")


def _check_replace(text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    text = str(text)
    METER.get().check(len(text) + text.count(str(old)) * len(str(new)))


def check_join(separator: str, parts: Sequence[Any]) -> None:
    meter = METER.get()
    meter.check(sum(meter.measure(part)[0] for part in parts) + len(separator) * len(parts))


def _check_format(text: Any, *args: Any, **kwargs: Any) -> None:
    """For `%` and str.format: no widths from arguments, and no argument more often than fits."""
    if _COMPUTED_WIDTH.search(str(text)):
        raise LimitError("it formats with a width of more than 9,999 or one that is computed")
    meter = METER.get()
    size, _ = meter.measure((args, kwargs))
    n_fields = str(text).count("%") + str(text).count("{")
    meter.check(len(text) + n_fields * (size + 9999))


def _check_split(text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    METER.get().spend(text.count(sep) if sep else len(text) // 2)


def _check_indent(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    METER.get().check((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else abs(int(width))))


def _check_sum(_: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise SecurityError("the filter 'sum' adds numbers only")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_BITS:
            raise LimitError(f"it computes a number of more than {_MAX_BITS:,} bits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, str | list | tuple):
            size = len(value) if isinstance(value, str) else METER.get().measure(value)[0]
            METER.get().check(size * max(0, times))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and abs(right) * left.bit_length() > _MAX_BITS:
        raise LimitError(f"it computes a number of more than {_MAX_BITS:,} bits")


def _check_modulo(left: Any, right: Any) -> None:
    if isinstance(left, str):
        _check_format(left, right)


def _check_pad(_: str, width: Any = 0, fill: Any = "") -> None:
    check_numbers((width,))


def _check_lines(text: str, keepends: bool = False) -> None:
    METER.get().spend(len(text))


FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "format": _check_format,
    "indent": _check_indent,
    "sum": _check_sum,
}
METHOD_CHECKS: dict[str, Callable[..., None]] = {
    "replace": _check_replace,
    "format": _check_format,
    "join": check_join,
    "split": _check_split,
    "rsplit": _check_split,
    "splitlines": _check_lines,
    "center": _check_pad,
    "ljust": _check_pad,
    "rjust": _check_pad,
    "zfill": _check_pad,
}
OPERATOR_CHECKS: dict[str, Callable[[Any, Any], None]] = {"*": _check_product, "**": _check_power, "%": _check_modulo}

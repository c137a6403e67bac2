"""What every command shares on the way out: errors, progress, text from a model, sizes a person can read.

A model's text goes to stdout as it is, never through rich; on a terminal its control characters are made
harmless. Everything about the work itself (progress, notes, errors) goes to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

import edgert
from edgert.cli.interrupts import while_loading
from edgert.errors import EdgertError

if TYPE_CHECKING:
    from rich.console import Console

    from edgert.generation import Completion, Stream
    from edgert.model import Model

PATIENCE_S = 1.0  # a prompt that takes longer than this to read is said to be read

_DERIVED = ("tokens_per_s", "hit_rate", "flash_wait_share")  # of a usage, beside what it counts

# What ends a command, or a turn of a chat, in one line; want of memory shows as any of the last four.
FAILURES = (KeyboardInterrupt, EdgertError, OSError, MemoryError, SystemError, ImportError)

_with_bar: ContextVar[Console | None] = ContextVar("_with_bar", default=None)  # the console that a bar is drawn on

# ESC and its kin would let a model's text drive the terminal
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def console(*, stderr: bool = False) -> Console:
    """A rich console that takes nothing for markup; styles show on terminals only."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def harmless(text: str) -> str:
    """`text` without characters that drive a terminal."""
    return text.translate(_HARMLESS)


def write(text: str, *, dim: bool = False) -> None:
    """A model's text to stdout, at once; dim: pale, on a terminal that can."""
    if sys.stdout.isatty():
        text = harmless(text)
        if dim and os.environ.get("TERM", "dumb") != "dumb":
            text = f"\x1b[2m{text}\x1b[22m"
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(document: Any, *, in_one_line: bool = False) -> None:
    """One JSON document to stdout."""
    text = json.dumps(document, indent=None if in_one_line else 2, ensure_ascii=False, default=_plain)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """What JSON has no name for, as what it has."""
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def note(text: str) -> None:
    """A remark for the person, on stderr; above a bar, where there is one."""
    with contextlib.suppress(OSError):
        (_with_bar.get() or console(stderr=True)).print(text, style="dim")


def error(message: object) -> None:
    """One line `error: ...` on stderr."""
    line = harmless(" ".join(str(message).split()))
    with contextlib.suppress(OSError):
        try:
            from rich.text import Text

            console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", line))
        except (MemoryError, SystemError, ImportError):  # no room for more than this
            sys.stderr.write(f"error: {line}\n")


def reason(problem: BaseException) -> str:
    """What went wrong, for a person."""
    if isinstance(problem, MemoryError):
        return str(problem) or "there is not enough memory: use a smaller --memory or --context"
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(problem) if isinstance(problem, EdgertError) else f"{type(problem).__name__}: {problem}"


def failed(problem: BaseException) -> int:
    """Say what went wrong; the exit code. What could not be written to stdout is dropped.

    2 is for an error, 130 for Ctrl-C and 141 for a closed pipe, as shells count signals.
    """
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would try once more at its end: let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(problem, KeyboardInterrupt):
        return 130
    if isinstance(problem, BrokenPipeError):
        return 141
    error(reason(problem))
    return 2


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with failures turned into exit codes; it takes `debug`, which shows their traceback."""

    @functools.wraps(command)
    def run(*, debug: bool, **arguments: Any) -> None:
        try:
            command(**arguments)
            sys.stdout.flush()
        except FAILURES as problem:
            if debug and not isinstance(problem, (KeyboardInterrupt, BrokenPipeError)):
                traceback.print_exc()
            raise typer.Exit(failed(problem)) from None

    return run


@contextlib.contextmanager
def progress(first: str, *, live: bool = True) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, on terminals only: call it with (what is going on, fraction from 0 to 1).

    live: a thread keeps its clock going; without one it is drawn at the calls alone.
    """
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda stage, fraction: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    stage_column = TextColumn("{task.description}", markup=False)
    columns = (stage_column, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, auto_refresh=live) as bar:
        task, before = bar.add_task(first, total=1.0), _with_bar.set(screen)
        try:
            yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction, refresh=True)
        finally:
            _with_bar.reset(before)


@contextlib.contextmanager
def open_model(name: str | None, runtime: Mapping[str, Any]) -> Iterator[Model]:
    """The model by path or name (None: the embedded one), loaded with a progress bar, closed at the end."""
    with progress("loading") as report, while_loading(report) as loading:
        model = edgert.load(name, progress=loading.report, **runtime)
    with model:
        loading.check()
        for words in filter(None, (model.memory.warning, model.tokenizer.warning, model.skipped)):
            note(words)
        yield model


class Waiting:
    """Says on a terminal that the prompt is being read, if that takes long. stop() before the first text that shows."""

    def __init__(self) -> None:
        screen = console(stderr=True)
        self._status = screen.status("reading the prompt")
        self._timer = threading.Timer(PATIENCE_S, self._show)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._over = not screen.is_terminal

    def _show(self) -> None:
        with self._lock:
            if not self._over:
                self._status.start()

    def __enter__(self) -> Waiting:
        if not self._over:
            self._timer.start()
        return self

    def say(self, what: str) -> None:
        """Say something else from now on."""
        with self._lock:
            if not self._over:
                self._status.update(what)

    def stop(self) -> None:
        """Take the line away, if it is there."""
        with self._lock:
            if not self._over:
                self._over = True
                self._timer.cancel()
                self._status.stop()

    def __exit__(self, *_: object) -> None:
        self.stop()


def read_out(stream: Stream, *, silent: bool = False) -> Completion:
    """Read a stream to its end, writing each piece at once unless `silent`; the whole answer.

    Reasoning is shown on terminals only, pale and before the answer: what goes into a file or a pipe is the answer.
    """
    shown = ("answer", "reasoning") if sys.stdout.isatty() else ("answer",)
    last = ""
    with stream, Waiting() as waiting:
        for piece in stream:
            if piece.kind not in shown:
                waiting.say("thinking")
                continue
            waiting.stop()
            if piece.text and not silent:
                write(("\n\n" if last not in ("", piece.kind) else "") + piece.text, dim=piece.kind == "reasoning")
                last = piece.kind
    return stream.completion


def note_full_context(completion: Completion, model: Model, *, may_think_less: bool = False) -> None:
    """Say that an answer broke off because the context is full, or before it began, if it did, and how to go on.

    may_think_less: the model has a switch for thinking, and it is on.
    """
    if completion.finish_reason == "context":
        note(f"the context of {model.n_context:,} tokens is full: start again with a larger --context")
    elif completion.finish_reason == "length" and completion.reasoning and not completion.text:
        less = ", or use --no-think" if may_think_less else ""
        note(f"the model was still thinking when --max-tokens ended it: allow more{less}")


def as_json(completion: Completion, model: Model, before: str = "") -> dict[str, Any]:
    """What --json prints for an answer; `before` is text that goes before the answer's."""
    usage = completion.usage
    return {
        "model": model.name,
        "text": before + completion.text,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "stop": completion.stop,
        "usage": {**asdict(usage), **{name: getattr(usage, name) for name in _DERIVED}},
    }


def binary_size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves one or more: 129337952 is '123.3 MiB'."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:,.0f} bytes" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.2f} GiB"

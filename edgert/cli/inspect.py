"""`edgert inspect`: what a model file holds and what it needs, without loading its weights; and the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from edgert.cli import output
from edgert.cli.options import Chosen, Json, TablesName, command
from edgert.errors import OptionError

Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", help="The context that memory is counted for.", show_default=False),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="[SIZE]",
        help="Plan for this budget, such as 900MiB or 50%; without SIZE, for what load would take.",
        show_default=False,
    ),
]
Cpu = Annotated[
    bool, typer.Option("--cpu", help="Show the machine instead: instructions, threads, caches, compiled kernels.")
]

_SIZE = re.compile(r"auto|\d+(\.\d+)?\s*([A-Za-z]{0,3}|%)")

# Which numbers are sizes in bytes: all in these sections but the counts among them, and these keys anywhere.
_BYTE_SECTIONS = {"bytes", "tensor_types", "memory", "caches"}
_BYTE_KEYS = {"bytes", "bytes_each", "working_set", "n_bytes"}
_COUNTS = {"context", "chunk", "threads"}
_NAMES = {"floor": "smallest budget"}
_SHARES = {"widths", "formats"}  # sections of numbers that add up to one
_LONGEST_BAR = 30


class InspectCommand(TyperCommand):
    """Lets --memory stand without a size, which typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put "auto" behind a --memory that no size follows."""
        for at in reversed(range(len(args))):
            if args[at] == "--memory" and not _SIZE.fullmatch("".join(args[at + 1 : at + 2])):
                args.insert(at + 1, "auto")
        return super().parse_args(ctx, args)


@command(runtime=False)
def inspect_model(
    model: TablesName = None,
    context: Context = None,
    memory: Memory = None,
    cpu: Cpu = False,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Show a model's architecture, sizes, experts, tokenizer, template and memory; or the machine, with --cpu."""
    if cpu:
        if model is not None or context is not None or memory is not None:
            raise OptionError("--cpu shows the machine alone: leave the model, --context and --memory away")
        from edgert import machine

        description = machine.describe()
    else:
        from edgert.describing import describe

        description = describe(model, context=context, memory=memory)
    if json:
        output.write_json(description)
    else:
        show_model(description)


def show_model(description: Mapping[str, Any]) -> None:
    """A description, with how bits were chosen and the proof in words."""
    if "chosen" in description.get("bits", {}):
        from edgert.chosen_bits import words

        bits = dict(description["bits"])
        description = {**description, "bits": {**bits, "chosen": words(bits["chosen"])}}
    if "proof" in description:
        from edgert.proof import Proof

        description = {**description, "proof": Proof.from_document(description["proof"], "the proof").words()}
    show(description)


def show(description: Mapping[str, Any]) -> None:
    """A nested description in two columns: plain values first, then a section for each mapping.

    Lines are as long as they are: a pipe gets a value whole, whatever the width of a terminal.
    """
    table = list(rows(description))
    width = max((len(name) for _, name, _ in table if name is not None), default=0) + 4
    screen = output.console()
    for section, name, value in table:
        if name is None:
            screen.print(f"\n{_words(section)}", style="bold")
        else:
            label = ("  " if section else "") + _words(name)
            screen.print(f"{label:<{width}}{value}")


def rows(description: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """(section, name, value as text); name None opens a section, and "" is the model as a whole."""
    for key, value in description.items():
        if not isinstance(value, Mapping):
            yield "", key, as_text(key, value, key in _BYTE_KEYS)
    for section, values in description.items():
        if isinstance(values, Mapping):
            yield section, None, ""
            yield from _section_rows(section, section, values)


def _section_rows(
    section: str, kind: str, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """The rows of a section; a mapping within it goes on with its name before each."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _section_rows(section, key, value, f"{prefix}{key} ")
        elif kind in _SHARES:
            yield section, f"{prefix}{key}", f"{value:6.1%} {'#' * round(_LONGEST_BAR * value)}".rstrip()
        else:
            in_bytes = key in _BYTE_KEYS or (kind in _BYTE_SECTIONS and key not in _COUNTS)
            yield section, f"{prefix}{key}", as_text(key, value, in_bytes)


def as_text(key: str, value: Any, in_bytes: bool) -> str:
    """One value for a person: sizes in binary units, counts with separators."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        if in_bytes:
            return output.binary_size(value)
        return f"{value / 1e6:,.1f} million ({value:,})" if key == "parameters" else f"{value:,}"
    if isinstance(value, float):
        if key == "residency":
            return f"{value:.1%}"
        return f"{value:,.4g}"
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str):
        return ", ".join(as_text(key, one, in_bytes) for one in value) or "none"
    return output.harmless(str(value))


def _words(key: str) -> str:
    """A key as words: tensor_types is 'tensor types', Q4_0 stays."""
    key = _NAMES.get(key, key)
    return output.harmless(key.replace("_", " ") if key.islower() else key)

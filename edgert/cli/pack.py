"""`edgert pack`: make a bundle of a model; and how packing and verifying show that they go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.interrupts import while_loading
from edgert.cli.options import Chosen, Json, command

_LINE_S = 5.0  # between two lines about the same work

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A GGUF file (of a split model the first) or a Hugging Face folder.")
]
Out = Annotated[
    Path | None,
    typer.Argument(metavar="OUT.edge", help="The folder to make; beside SOURCE if not set.", show_default=False),
]


@command(runtime=False)
def pack(source: Source, out: Out = None, json: Json = False, *, chosen: Chosen) -> None:
    """Pack a model into a bundle: the form that is read from flash, expert by expert.

    What is there and current is left as it is; what an interrupted pack left is gone on with. The source stays.
    """
    with reporting("packing") as report:
        from edgert.pack import default_out, pack_model
        from edgert.pack_place import part_of

        try:
            packed = pack_model(source, out, progress=report)
        except KeyboardInterrupt:
            if (part := part_of(out or default_out(source))).exists():
                output.note(f"stopped; {part} is kept: pack again to go on, or remove it")
            raise
    if json:
        output.write_json(
            {
                "bundle": str(packed.path),
                "bytes": packed.n_bytes,
                "written": packed.written,
                "resumed": packed.resumed,
                "seconds": packed.seconds,
                "inexact": packed.inexact,
            }
        )
        return
    size = output.binary_size(packed.n_bytes)
    if not packed.written and not packed.resumed:
        output.write(f"{packed.path}: packed already, {size}\n")
        return
    rate = f"{packed.written / packed.seconds / 1e6:,.0f} MB/s"
    earlier = f", {output.binary_size(packed.resumed)} of it by an earlier pack" if packed.resumed else ""
    output.write(f"{packed.path}: {size} in {packed.seconds:.1f} s, {rate}{earlier}\n")
    for kind, loss in packed.inexact.items():
        output.write(f"not exact: {kind} {loss}\n")


@contextlib.contextmanager
def reporting(first: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else lines on stderr, when the work changes and now and then; Ctrl-C is raised there."""
    if output.console(stderr=True).is_terminal:
        with output.progress(first) as draw, while_loading(draw) as waiting:
            yield waiting.report
    else:
        with while_loading(_lines()) as waiting:
            yield waiting.report


def _lines() -> Callable[[str, float], None]:
    before, last = "", 0.0

    def report(stage: str, fraction: float) -> None:
        nonlocal before, last
        kind, now = stage.partition(":")[0], time.monotonic()
        if kind != before or now - last >= _LINE_S:
            output.note(f"{stage} ({fraction:.0%})" if fraction else stage)
            before, last = kind, now

    return report

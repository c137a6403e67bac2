"""`edgert doctor`: what this machine has for edgert, what is in the way, and how fast its flash is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, command

if TYPE_CHECKING:
    from rich.table import Table

    from edgert.doctor import Report
    from edgert.findings import Finding
    from edgert.storage.flash_probe import FlashProbe

_NAME_WIDTH = 17

Where = Annotated[
    str | None,
    typer.Argument(
        metavar="PATH",
        help="A model, or a folder on the drive to measure; none: where edgert keeps packed models.",
        show_default=False,
    ),
]


@command(runtime=False)
def doctor(path: Where = None, json: Json = False, *, chosen: Chosen) -> None:
    """Look at the machine and measure its flash; the best way to read it is kept and used from then on.

    Takes about ten seconds, longer on slow drives. Close other programs first, and run it once for each drive that
    holds models. Ends with 1 where something keeps models from running, else with 0, also if there is advice.
    """
    with output.progress("looking around") as report:
        from edgert.doctor import examine

        found = examine(path, progress=report)
    if json:
        output.write_json(found.as_dict())
    else:
        show(found)
    if found.stops:
        raise typer.Exit(1)


def show(report: Report) -> None:
    """Findings by area, then the table of rates and what was chosen."""
    screen = output.console()
    for index, (area, rows) in enumerate(_by_area(report.findings)):
        screen.print(("\n" if index else "") + area, style="bold")
        _show_findings(rows)
    record = output.binary_size(report.flash.record_bytes)
    screen.print(f"\nGB/s by lanes and chunk size, random records of {record}", style="bold")
    screen.print(rates(report.flash), soft_wrap=False)
    chosen = report.settings
    how = "through the page cache" if not report.flash.direct or chosen.direct is False else "past the page cache"
    rate = (chosen.bytes_per_s or 0.0) / 1e9
    screen.print(
        f"\nchosen  {chosen.lanes} lane{'s' * (chosen.lanes != 1)} of {_chunk(chosen.chunk_bytes)} {how}: "
        f"{rate:.2f} GB/s, {_duration(report.flash.record_bytes / rate / 1e9)} a record",
        style="bold",
        soft_wrap=False,
    )
    screen.print(output.harmless(f"kept in {report.kept_in}"), style="dim")


def _by_area(findings: tuple[Finding, ...]) -> Iterator[tuple[str, list[Finding]]]:
    for area in dict.fromkeys(finding.area for finding in findings):
        yield area, [finding for finding in findings if finding.area == area]


def _show_findings(findings: list[Finding]) -> None:
    """Name, value and reason, the remedy below; a terminal folds them within their column, a pipe gets them whole."""
    from rich.table import Table
    from rich.text import Text

    screen = output.console()
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=_NAME_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        line = Text(output.harmless(finding.value))
        if finding.reason:
            line.append(f"  ({output.harmless(finding.reason)})", style="dim")
        if finding.remedy:
            line.append(f"\n-> {finding.remedy}", style="bold red" if finding.stops else "yellow")
        if screen.is_terminal:
            table.add_row(f"  {finding.name}", line)
        else:
            name = f"  {finding.name:<{_NAME_WIDTH}}"
            screen.print(name + line.plain.replace("\n", "\n" + " " * len(name)))
    if screen.is_terminal:
        screen.print(table, soft_wrap=False)


def rates(probe: FlashProbe) -> Table:
    """Rows are lanes, columns chunk sizes; reads through the page cache below, the fastest in bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chunks = sorted({one.chunk_bytes for one in probe.candidates})
    fastest = max(one.bytes_per_s for one in probe.candidates)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("lanes")
    for chunk in chunks:
        table.add_column(_chunk(chunk).replace(" ", "").removesuffix("iB"), justify="right", no_wrap=True)
    for direct in (True, False):
        kind = {(one.lanes, one.chunk_bytes): one for one in probe.candidates if one.direct == direct}
        for lanes in sorted({lanes for lanes, _ in kind}):
            cells = []
            for chunk in chunks:
                one = kind.get((lanes, chunk))
                text = f"{one.bytes_per_s / 1e9:.2f}" if one else ""
                cells.append(Text(text, style="bold green" if one and one.bytes_per_s == fastest else ""))
            last = direct and lanes == max(lanes for lanes, _ in kind)
            table.add_row(str(lanes) if direct else f"{lanes}, page cache", *cells, end_section=last)
    return table


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def _chunk(n_bytes: int) -> str:
    """128 KiB, 4 MiB."""
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"

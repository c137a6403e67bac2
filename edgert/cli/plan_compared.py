"""Forecasts beside measurements, for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgert.cli import output
from edgert.cli.plan_tables import plain_table

if TYPE_CHECKING:
    from edgert.plan_verify import Compared


def show(rows: Sequence[Compared]) -> None:
    """The table, and what to make of it."""
    screen = output.console()
    screen.width = max(screen.width, 120)
    table = plain_table(
        "forecast against measurement", "in RAM", "forecast", "range", "measured", "left alone", "off by"
    )
    for row in rows:
        low, high = sorted((row.forecast.slow, row.forecast.fast))
        table.add_row(
            row.what,
            f"{row.residency:.0%}",
            f"{row.forecast.usual:.3g}",
            f"{low:.3g} to {high:.3g}",
            f"{row.measured:.3g}",
            f"{row.alone:.3g}" if row.disturbed else "",
            f"{row.off:+.0%}" if row.tells else "?",
        )
    screen.print()
    screen.print(table)
    screen.print()
    for line in words(rows):
        screen.print(line)


def words(rows: Sequence[Compared]) -> Iterator[str]:
    """A sentence on the forecasts, and one on what else ran."""
    telling = [row for row in rows if row.tells]
    if telling:
        yield f"{sum(row.within for row in telling)} of {len(telling)} forecasts within 25 % of what was measured."
    if any(row.disturbed for row in rows):
        yield (
            "Other programs took the processors for part of the time: 'left alone' is what the run would have been "
            "without, as the system counts it; ? where they took more than half. Measure again when nothing else runs."
        )

"""`edgert report`: what a profile knows of a model, as a page with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, command

Subject = Annotated[
    Path, typer.Argument(metavar="PROFILE|BUNDLE", help="What `edgert profile` or `edgert pack --profile` made.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="The page; NAME.report.html beside it if not set.", show_default=False
    ),
]


@command(runtime=False)
def report(subject: Subject, out: Out = None, *, chosen: Chosen) -> None:
    """Write one HTML page on a model's experts: which are used, how well they are kept and guessed, bits, speed.

    The page is complete in itself and opens without a network. Takes half a minute for a small model, minutes for a
    large one; needs matplotlib.
    """
    with output.progress("reading the profile") as progress:
        from edgert.report import write_report

        written = write_report(subject, out, progress)
    output.write(f"{written}\n")

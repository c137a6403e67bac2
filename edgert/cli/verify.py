"""`edgert verify`: read a bundle from end to end and say what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, command
from edgert.cli.pack import reporting

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgert pack` made.")]


@command(runtime=False)
def verify(bundle: BundlePath, json: Json = False, *, chosen: Chosen) -> None:
    """Check every checksum of a bundle. Exits with 0 if it is sound, with 2 if not."""
    with reporting("verifying") as report:
        from edgert.verify import verify as find_problems

        problems = find_problems(bundle, report)
    if json:
        output.write_json({"bundle": str(bundle), "sound": not problems, "problems": problems})
    elif not problems:
        output.write(f"{bundle}: sound\n")
    else:
        for problem in problems:
            output.error(problem)
    if problems:
        raise typer.Exit(2)

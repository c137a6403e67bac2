"""The console script. Ctrl-C is quiet from its first line on, so everything is imported within."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; it always ends with SystemExit."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    """The command line between streams that can be written to."""
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")
    from edgert.cli import output

    if sys.stdout is None:
        output.error("stdout is closed: there is nowhere to write to")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]   # None was looked after
    try:
        from edgert.cli.app import app

        app()
    except output.FAILURES as problem:  # of the usage and the help: a command looks after its own
        sys.exit(output.failed(problem))

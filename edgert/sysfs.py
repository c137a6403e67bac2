"""Files in which a system tells what it is: one value each, and none of them certain to be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path("/")  # what holds sys/, proc/ and etc/, where nobody says otherwise


def text(path: Path) -> str:
    """What a file says, without blanks around it; nothing if it is not there or not to be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n")
    except (OSError, ValueError):
        return ""


def number(path: Path) -> int | None:
    """A file's whole number; None for anything else."""
    found = text(path)
    return int(found) if re.fullmatch("-?[0-9]+", found) else None

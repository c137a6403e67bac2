"""What a Jetson tells of itself: release of Jetson Linux, power mode, and, through jetson-stats, its clocks.

Reads files; the power mode is what nvpmodel left in its status. jetson-stats is asked only where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from edgert import sysfs

_JETPACK = {"32": "4", "35": "5", "36": "6", "38": "7"}  # by Jetson Linux's release


@dataclass(frozen=True)
class PowerMode:
    """The mode that nvpmodel set; names: of all modes by number; fastest: the number of the one that limits least."""

    number: int
    names: dict[int, str]

    @property
    def name(self) -> str:
        """As nvpmodel -q says it."""
        return self.names.get(self.number, str(self.number))

    @property
    def fastest(self) -> int:
        """MAXN_SUPER, MAXN, else the one with the most watts in its name."""
        return max(self.names, key=lambda number: _rank(self.names[number]), default=self.number)


def _rank(name: str) -> tuple[int, int]:
    """Larger for what limits less."""
    watts = re.search("([0-9]+)W", name.upper())
    return 2 * name.upper().startswith("MAXN") + ("SUPER" in name.upper()), int(watts[1]) if watts else 0


@dataclass(frozen=True)
class Stats:
    """What jetson-stats says. version: of the package; clocks: whether jetson_clocks holds them at their most, None if
    its service does not answer, for the reason in `problem`."""

    version: str
    clocks: bool | None = None
    problem: str = ""


def release(root: Path = Path("/")) -> str:
    """ "36.4.3 (JetPack 6)"; empty on what is no Jetson."""
    found = re.match(r"# R([0-9]+) \(release\), REVISION: ([0-9.]+)", sysfs.text(root / "etc/nv_tegra_release"))
    if found is None:
        return ""
    jetpack = _JETPACK.get(found[1])
    return f"{found[1]}.{found[2]}" + (f" (JetPack {jetpack})" if jetpack else "")


def power_mode(root: Path = Path("/")) -> PowerMode | None:
    """The present mode; None where nvpmodel has not been."""
    conf = sysfs.text(root / "etc/nvpmodel.conf")
    modes = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=([0-9]+)\s+NAME=(\S+)\s*>", conf, re.MULTILINE)
    names = {int(number): name for number, name in modes}
    status = re.search("pmode:([0-9]+)", sysfs.text(root / "var/lib/nvpmodel/status"))
    chosen = status or re.search(r"<\s*PM_CONFIG\s+DEFAULT=([0-9]+)\s*>", conf)
    return PowerMode(int(chosen[1]), names) if chosen else None


def stats() -> Stats | None:
    """What jetson-stats tells; None where it is not installed for this Python."""
    try:
        found = Stats(importlib.metadata.version("jetson-stats"))
        jtop = importlib.import_module("jtop")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None
    try:
        with jtop.jtop() as board:
            if board.ok():
                return Stats(found.version, bool(board.jetson_clocks))
    except (OSError, AttributeError, jtop.JtopException) as error:
        return Stats(found.version, problem=str(error).splitlines()[0] if str(error) else type(error).__name__)
    return found

"""How hot a board is, and whether it slows itself down: thermal zones, cooling devices, counters of events.

Only reads what Linux shows under /sys (Documentation/ABI/testing/sysfs-class-thermal). What follows from it is decided
elsewhere: cooling.py takes threads away, bench says it with the figures, doctor what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from edgert import sysfs

# °C, where a zone does not say when it slows the board down: a Raspberry Pi from 80, most x86 processors from 95 to 105
USUAL_LIMIT, PC_LIMIT = 80.0, 95.0
_SENSIBLE = range(40, 130)  # °C of a trip point; some firmware has 0 or -273
# Zones that follow neither the arithmetic nor the memory, and what slows processors down among cooling devices, which
# are fans too, or another chip's.
_ELSEWHERE = re.compile("wifi|batt|charger|modem|nvme|pch|int3400", re.IGNORECASE)
_PC = re.compile("x86_pkg_temp|TCPU")
_SLOWING = re.compile("(thermal-)?cpufreq-.+|.*throttle-alert|hot-surface-alert|Processor")
_PI_BITS = {0: "too low a voltage", 1: "the clock is capped", 2: "throttled", 3: "the soft limit of temperature"}


class Zone(NamedTuple):
    """One sensor. limit: °C from which the system slows the board down; told: by the zone itself."""

    name: str
    celsius: float
    limit: float
    told: bool

    @property
    def margin(self) -> float:
        """Degrees below the limit."""
        return self.limit - self.celsius

    def __str__(self) -> str:
        return f"{self.name} {self.celsius:.0f} °C, limit {self.limit:.0f} °C"


@dataclass(frozen=True)
class Signs:
    """Signs of throttling. now: what slows the board down at this moment; counts: events that only grow, by name;
    clock_khz: the most that the slowest processor may run at."""

    now: frozenset[str] = frozenset()
    counts: dict[str, int] = field(default_factory=dict)
    clock_khz: int | None = None


def zones(root: Path = Path("/")) -> list[Zone]:
    """Zones that follow the arithmetic, the one nearest its limit first; `root` holds sys/."""
    found = []
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, millidegrees = sysfs.text(folder / "type") or folder.name, sysfs.number(folder / "temp")
        if millidegrees is None or not 0 < millidegrees < 150_000 or _ELSEWHERE.search(name):
            continue  # some zones answer only while their unit has power
        trips = [celsius for kind, celsius in _trips(folder) if kind == "passive"]
        usual = PC_LIMIT if _PC.fullmatch(name) else USUAL_LIMIT
        found.append(Zone(name, millidegrees / 1000, min(trips, default=usual), bool(trips)))
    return sorted(found, key=lambda zone: zone.margin)


def _trips(zone: Path) -> Iterator[tuple[str, float]]:
    """(kind, °C) of a zone's trip points."""
    for path in zone.glob("trip_point_*_type"):
        millidegrees = sysfs.number(path.with_name(path.name.replace("_type", "_temp")))
        if millidegrees is not None and millidegrees // 1000 in _SENSIBLE:
            yield sysfs.text(path), millidegrees / 1000


def signs(root: Path = Path("/")) -> Signs:
    """What there is to see of throttling at this moment; `root` holds sys/."""
    clocks = [sysfs.number(path) for path in (root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_max_freq")]
    return Signs(frozenset(_now(root)), _counts(root), min((khz for khz in clocks if khz), default=None))


def slows(root: Path = Path("/")) -> dict[str, int]:
    """Cooling devices that slow processors down, and by how many steps they do at this moment."""
    found = dict[str, int]()
    for folder in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        kind, state = sysfs.text(folder / "type"), sysfs.number(folder / "cur_state")
        if state is not None and _SLOWING.fullmatch(kind):
            found[kind] = max(state, found.get(kind, 0))
    return found


def _now(root: Path) -> Iterator[str]:
    yield from (kind for kind, state in slows(root).items() if state > 0)
    for path in (root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"):  # a Raspberry Pi's
        bits = sysfs.text(path).removeprefix("0x")
        flags = int(bits, 16) if re.fullmatch("[0-9a-fA-F]+", bits) else 0
        yield from (name for bit, name in _PI_BITS.items() if flags >> bit & 1)
    for folder in (root / "sys/class/hwmon").glob("hwmon*"):
        if sysfs.text(folder / "name") == "rpi_volt" and sysfs.number(folder / "in0_lcrit_alarm") == 1:
            yield _PI_BITS[0]


def _counts(root: Path) -> dict[str, int]:
    """Events since the start of the system."""
    found = dict[str, int]()
    if events := _processor_events(root):
        found["thermal events of the processor"] = events
    for path in (root / "sys/class/hwmon").glob("hwmon*/oc[0-9]*_event_cnt"):  # soctherm_oc of Jetson Orin and Thor
        kind = "events of too low a voltage" if path.name.startswith("oc1_") else "over-current events"
        if value := sysfs.number(path):
            found[kind] = found.get(kind, 0) + value
    return found


def _processor_events(root: Path) -> int:
    """Thermal events of cores and of packages: each CPU tells those of the core and the package that it is in."""
    units = dict[tuple[str, ...], int]()
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
        cpu = path.parent.parent
        place = [sysfs.text(cpu / "topology" / name) for name in ("physical_package_id", "die_id", "core_id")]
        kind = path.name.partition("_")[0]
        unit = (kind, *(place[:1] if kind == "package" else place if place[2] else [cpu.name]))
        units[unit] = max(sysfs.number(path) or 0, units.get(unit, 0))
    return sum(units.values())


def throttled(before: Signs, after: Signs) -> tuple[str, ...]:
    """What slowed the board down between two moments, at either of them or by count; empty if nothing did."""
    found = sorted(before.now | after.now)
    for name, value in after.counts.items():
        if value > before.counts.get(name, 0):
            found.append(f"{value - before.counts.get(name, 0):,} {name}")
    if before.clock_khz and after.clock_khz and after.clock_khz < before.clock_khz:
        found.append(f"the clock was capped at {after.clock_khz / 1e6:.2f} GHz, {before.clock_khz / 1e6:.2f} before")
    return tuple(found)

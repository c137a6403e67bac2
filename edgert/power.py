"""Energy that a board takes while something runs, where it tells: INA sensors of Jetsons and others, RAPL of x86.

An INA sensor knows the watts of a moment, so it is read while the run goes on; RAPL counts joules itself. What a sensor
covers is said with every figure: a module, some of its rails, or processor and memory alone.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edgert import sysfs

_EVERY_S = 0.1  # between two readings of a sensor: each takes about a millisecond on the I2C bus
# Rails that hold all others, and one that VIN_SYS_5V0 holds (NVIDIA's Jetson Linux Developer Guide, "Power Monitor").
_WHOLE = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN")
_WITHIN = frozenset({"VDDQ_VDD2_1V8AO"})
_UNCONNECTED = "NC"


@dataclass(frozen=True)
class Rail:
    """One channel of a sensor. power: a file of watts in `unit`; without it, files of millivolts and milliamperes."""

    name: str
    power: Path | None = None
    unit: float = 1e-6
    volts: Path = Path()
    amperes: Path = Path()

    def watts(self) -> float | None:
        """Now; None if the sensor does not answer."""
        if self.power is not None:
            found = sysfs.number(self.power)
            return None if found is None else found * self.unit
        volts, amperes = sysfs.number(self.volts), sysfs.number(self.amperes)
        return None if volts is None or amperes is None else volts * amperes * 1e-6


@dataclass(frozen=True)
class Counter:
    """Microjoules that a RAPL zone has counted; after `most` it begins again at 0."""

    name: str
    file: Path
    most: int

    def joules(self, before: int, after: int) -> float:
        """Between two values of the file."""
        return (after - before + (self.most if after < before else 0)) / 1e6


@dataclass(frozen=True)
class Source:
    """What tells the energy: rails or counters, or neither, with the problem. covers: of what, for people."""

    rails: tuple[Rail, ...] = ()
    counters: tuple[Counter, ...] = ()
    covers: str = ""
    problem: str = ""

    @property
    def tells(self) -> bool:
        """Whether there is a figure."""
        return bool(self.rails or self.counters)

    def watts(self) -> float | None:
        """At this moment; of counters, over a tenth of a second. None if it does not tell."""
        if self.rails:
            known = [watts for rail in self.rails if (watts := rail.watts()) is not None]
            return sum(known) if len(known) == len(self.rails) else None
        meter = Meter(self)
        meter.start()
        time.sleep(_EVERY_S)
        return meter.stop()


def power_source(root: Path = Path("/")) -> Source:
    """What tells the energy of this machine; `root` holds sys/."""
    rails = [rail for rail in _rails(root) if rail.watts() is not None]
    for name in _WHOLE:
        found = [rail for rail in rails if rail.name.upper() == name]
        if found:
            whole = "the board with what it carries" if name == "VIN" else "the module"
            return Source(rails=(found[0],), covers=f"{found[0].name}: {whole}")
    if rails:
        some = tuple(rail for rail in rails if rail.name not in _WITHIN)
        return Source(rails=some, covers=f"{' + '.join(rail.name for rail in some)}: rails, less than the whole board")
    return _rapl(root)


# ---- sensors ---------------------------------------------------------------------------------------------------------
def _rails(root: Path) -> Iterator[Rail]:
    """Channels of the INA sensors that are on I2C, as hwmon has them, or iio in the kernel of JetPack 4."""
    drivers = root / "sys/bus/i2c/drivers"
    for folder in sorted(drivers.glob("ina*/*/hwmon/hwmon*")):
        yield from _hwmon(folder, folder.parent.parent.parent.name)
    for label in sorted(drivers.glob("ina*/*/iio:device*/rail_name_*")):
        name, place = sysfs.text(label), label.name.removeprefix("rail_name_")
        if name and name != _UNCONNECTED:
            yield Rail(name, label.parent / f"in_power{place}_input", 1e-3)


def _hwmon(folder: Path, driver: str) -> Iterator[Rail]:
    """Rails of one sensor: three with labels (ina3221), or one whose watts it computes itself."""
    for label in sorted(folder.glob("in[123]_label")):
        name, place = sysfs.text(label), label.name[2]
        if name and name != _UNCONNECTED and "shunt" not in name:
            yield Rail(name, volts=folder / f"in{place}_input", amperes=folder / f"curr{place}_input")
    if (folder / "power1_input").exists():
        yield Rail("VIN" if driver == "ina238" else driver, folder / "power1_input")


def _rapl(root: Path) -> Source:
    """The zones that together are the most: the whole platform, or all packages and their memory."""
    zones = {}
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        most = sysfs.number(folder / "max_energy_range_uj")
        if name := sysfs.text(folder / "name"):
            zones[folder.name] = Counter(name, folder / "energy_uj", most or 1 << 32)
    platform = [zone for zone in zones.values() if zone.name == "psys"]
    packages = [zone for zone in zones.values() if re.fullmatch("package-[0-9]+|dram", zone.name)]
    chosen = tuple(platform or packages)
    if not chosen:
        return Source(problem="no sensor that tells power is known here: neither INA nor RAPL")
    if any(sysfs.number(zone.file) is None for zone in chosen):
        files = root / "sys/class/powercap/intel-rapl:*/energy_uj"
        return Source(problem=f"RAPL counts energy here, but for root alone: sudo chmod a+r {files}")
    names = " + ".join(zone.name for zone in chosen)
    what = "the platform" if platform else "processor and memory" if "dram" in names else "the processor"
    return Source(counters=chosen, covers=f"RAPL, {names}: {what} alone")


# ---- measuring -------------------------------------------------------------------------------------------------------
class Meter:
    """Mean watts from start() to stop(). Sensors are read ten times a second by a thread; counters need none."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._counts: list[int | None] = []
        self._began = 0.0
        self._readings: list[tuple[float, float | None]] = []  # (seconds, watts)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to count."""
        self._counts, self._began = self._count(), time.perf_counter()
        if self._source.rails:
            self._readings, self._ended = [self._read()], threading.Event()
            self._thread = threading.Thread(target=self._watch, name="edgert-power", daemon=True)
            self._thread.start()

    def stop(self) -> float | None:
        """Mean watts since start(); None if nothing tells them."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            self._readings.append(self._read())
            return _mean(self._readings)
        total, seconds = 0.0, time.perf_counter() - self._began
        for counter, before, after in zip(self._source.counters, self._counts, self._count(), strict=True):
            if before is None or after is None:
                return None
            total += counter.joules(before, after)
        return total / seconds if self._source.counters and seconds > 0 else None

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._readings.append(self._read())

    def _read(self) -> tuple[float, float | None]:
        began, watts = time.perf_counter(), self._source.watts()
        return (began + time.perf_counter()) / 2, watts

    def _count(self) -> list[int | None]:
        return [sysfs.number(counter.file) for counter in self._source.counters]


def _mean(readings: list[tuple[float, float | None]]) -> float | None:
    """Of (seconds, watts), by trapezoids; a reading that failed is left out, None where all but one did."""
    known = [(seconds, watts) for seconds, watts in readings if watts is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return None
    joules = sum((one[1] + other[1]) / 2 * (other[0] - one[0]) for one, other in pairwise(known))
    return joules / (known[-1][0] - known[0][0])

"""What doctor finds of a board: its power mode, heat, throttling and sensors of energy, on a Jetson and elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgert import jetson, sysfs, thermal
from edgert.findings import Finding
from edgert.jetson import PowerMode, Stats
from edgert.power import power_source

_WARM = 10.0  # degrees below the limit
_OLDEST_JETPACK = 6  # whose Python edgert's wheels are for


def board_findings(root: Path) -> Iterator[Finding]:
    """Findings on the board; `root` holds sys/, etc/ and var/."""
    yield from _jetson(root)
    yield from _offline(root)
    yield from _governor(root)
    yield from _heat(root)
    yield _energy(root)


def _jetson(root: Path) -> Iterator[Finding]:
    release, mode = jetson.release(root), jetson.power_mode(root)
    if release:
        jetpack = release.partition("JetPack ")[2].rstrip(")")
        old = jetpack.isdigit() and int(jetpack) < _OLDEST_JETPACK
        reason = "its Python and glibc are older than edgert needs" if old else "its Python and glibc suit edgert"
        remedy = f"install JetPack {_OLDEST_JETPACK}, or run edgert in a container" if old else ""
        yield Finding("board", "Jetson Linux", release, reason, remedy)
    if mode is not None:
        yield _mode(mode)
    if release:
        yield _stats(jetson.stats())


def _mode(mode: PowerMode) -> Finding:
    if mode.number not in mode.names:
        reason = "what it limits is not told: /etc/nvpmodel.conf does not name it"
        return Finding("board", "power mode", f"mode {mode.number}", reason)
    value = f"{mode.name} (mode {mode.number})"
    others = ", ".join(name for number, name in mode.names.items() if number != mode.number) or "none"
    if mode.number == mode.fastest:
        return Finding("board", "power mode", value, f"the fastest of this board; others: {others}")
    fastest = mode.names[mode.fastest]
    return Finding(
        "board",
        "power mode",
        value,
        f"limits clocks, and in some modes cores; others: {others}",
        f"for speed: sudo nvpmodel -m {mode.fastest} ({fastest}), if power supply and cooling allow it",
    )


def _stats(found: Stats | None) -> Finding:
    name = "jetson-stats"
    if found is None:
        return Finding("board", name, "not installed here", "clocks that jetson_clocks holds are not told; all else is")
    if found.clocks is None:
        problem = found.problem or "its service does not answer"
        return Finding("board", name, found.version, problem, "sudo systemctl restart jtop")
    if found.clocks:
        return Finding("board", name, found.version, "jetson_clocks holds the clocks at their most: steady, and warm")
    reason = "jetson_clocks is off: clocks rise with the load, which short answers notice"
    return Finding("board", name, found.version, reason)


def _offline(root: Path) -> Iterator[Finding]:
    """Processors that are there but switched off."""
    cpus = root / "sys/devices/system/cpu"
    offline = sysfs.text(cpus / "offline")
    present, online = sysfs.text(cpus / "present"), sysfs.text(cpus / "online")
    if offline and present != online:
        reason = f"of {present}: switched off by the power mode or by hand, and not computed with"
        yield Finding("board", "processors offline", offline, reason, "a faster power mode, if there is one")


def _governor(root: Path) -> Iterator[Finding]:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor = sysfs.text(folder / "scaling_governor")
    if not governor:
        return
    slow = governor == "powersave" and "intel_pstate" not in sysfs.text(folder / "scaling_driver")
    remedy = "for speed: sudo cpupower frequency-set -g schedutil" if slow else ""
    reason = "keeps the clock low" if slow else "lets the clock follow the load, or holds it"
    yield Finding("board", "clock governor", governor, reason, remedy)
    most, now = sysfs.number(folder / "cpuinfo_max_freq"), sysfs.number(folder / "scaling_max_freq")
    if most and now and now < 0.95 * most:
        reason = f"of {most / 1e6:.2f} GHz: held there by the power mode, by heat or by hand"
        yield Finding("board", "clock limit", f"{now / 1e6:.2f} GHz", reason, "a faster power mode, or better cooling")


def _heat(root: Path) -> Iterator[Finding]:
    zones = thermal.zones(root)
    if zones:
        nearest = zones[0]
        told = "" if nearest.told else ", as is usual"
        reason = (
            f"{nearest.name} of {len(zones)} sensors; from {nearest.limit:.0f} °C{told} the board slows itself down"
        )
        hot = nearest.margin < _WARM
        remedy = "better cooling, or --power cool, which takes fewer threads while it is hot" if hot else ""
        yield Finding("board", "temperature", f"{nearest.celsius:.0f} °C", reason, remedy)
    found = thermal.signs(root)
    slowing = sorted(found.now)
    events = ", ".join(f"{count:,} {name}" for name, count in found.counts.items())
    if slowing:
        since = f"; since the start: {events}" if events else ""
        reason = f"speeds measured now are too low{since}"
        remedy = "better cooling, a stronger power supply, or a lower power mode"
        yield Finding("board", "throttled now", ", ".join(slowing), reason, remedy)
    elif zones or events or thermal.slows(root):
        reason = f"since the start: {events}" if events else "no sign of it since the start"
        yield Finding("board", "throttled now", "no", reason)


def _energy(root: Path) -> Finding:
    source = power_source(root)
    if not source.tells:
        remedy = source.problem.partition("alone: ")[2]
        reason = source.problem.partition(": sudo")[0]
        return Finding("board", "energy", "not told", f"{reason}; edgert bench shows no tokens a joule", remedy)
    watts = source.watts()
    value = "told" if watts is None else f"{watts:.1f} W"
    return Finding("board", "energy", value, f"{source.covers}; edgert bench shows tokens a joule")

"""Directory trees laid out as Linux lays out /sys, /etc and /var on boards, with the links that are there."""

from __future__ import annotations

import os
from pathlib import Path

NVPMODEL = """# Jetson Orin Nano
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
CPU_ONLINE CORE_0 1
< PM_CONFIG DEFAULT=1 >
"""


def write(root: Path, **files: object) -> None:
    """Files below root; / in a path is written __."""
    for name, content in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def link(root: Path, name: str, to: str) -> None:
    """A link below root to another place there, as sysfs has them: relative."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(root / to, path.parent))


def ina3221(root: Path, address: str, rails: dict[str, tuple[int, int]]) -> Path:
    """A power monitor with (mV, mA) by rail, and the sum of shunt voltages that is no rail; its hwmon folder."""
    device, number = f"sys/devices/platform/bus@0/c240000.i2c/i2c-1/{address}", 1 + int(address[-1])
    hwmon = root / device / "hwmon" / f"hwmon{number}"
    for place, (name, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        write(hwmon, **{f"in{place}_label": name, f"in{place}_input": millivolts, f"curr{place}_input": milliamperes})
    write(hwmon, name="ina3221", in7_label="sum of shunt voltages", in7_input=12)
    link(root, f"sys/bus/i2c/drivers/ina3221/{address}", device)
    return hwmon


def orin_nano(root: Path, *, celsius: float = 48.0, mode: int = 1) -> None:
    """A Jetson Orin Nano with JetPack 6."""
    write(root, etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64")
    write(root, var__lib__nvpmodel__status=f"pmode:{mode:04}", **{"etc/nvpmodel.conf": NVPMODEL})
    thermal = root / "sys/class/thermal"
    for number, (name, degrees, trips) in enumerate(
        (
            ("cpu-thermal", celsius, {"active": 51, "passive": 99, "critical": 104.5}),
            ("gpu-thermal", celsius - 2, {"passive": 99, "critical": 104.5}),
            ("tj-thermal", celsius + 0.5, {"passive": 99, "critical": 104.5}),
        )
    ):
        zone = thermal / f"thermal_zone{number}"
        write(zone, type=name, temp=int(1000 * degrees))
        for place, (kind, at) in enumerate(trips.items()):
            write(zone, **{f"trip_point_{place}_type": kind, f"trip_point_{place}_temp": int(1000 * at)})
    write(thermal / "thermal_zone3", type="cv0-thermal", temp=-256000)  # its unit has no power
    for number, (kind, state) in enumerate((("pwm-fan", 2), ("cpu-throttle-alert", 0), ("cpufreq-cpu0", 0))):
        write(thermal / f"cooling_device{number}", type=kind, cur_state=state, max_state=3)
    write(root / "sys/class/hwmon/hwmon3", name="soctherm_oc", oc1_event_cnt=0, oc2_event_cnt=0, oc3_event_cnt=0)
    cpus = root / "sys/devices/system/cpu"
    write(cpus, present="0-5", online="0-5", offline="")
    write(cpus / "cpufreq/policy0", scaling_max_freq=1728000, cpuinfo_max_freq=1728000)
    write(cpus / "cpu0/cpufreq", scaling_governor="schedutil", scaling_max_freq=1728000, cpuinfo_max_freq=1728000)
    rails = {"VDD_IN": (4960, 1480), "VDD_CPU_GPU_CV": (4960, 520), "VDD_SOC": (4960, 290)}
    ina3221(root, "1-0040", rails)


def rapl(root: Path, **zones: int) -> dict[str, Path]:
    """RAPL's zones with their microjoules, name by name; their energy files."""
    found = {}
    for number, (name, energy) in enumerate(zones.items()):
        folder = f"sys/devices/virtual/powercap/intel-rapl/intel-rapl:{number}"
        write(root / folder, name=name.replace("_", "-"), energy_uj=energy, max_energy_range_uj=262143328850)
        link(root, f"sys/class/powercap/intel-rapl:{number}", folder)
        found[name] = root / folder / "energy_uj"
    return found

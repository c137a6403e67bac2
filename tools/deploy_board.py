"""What a board is: asked with plain sh, read into facts, and judged. Knows nothing of connections.

A board may be too old for Python to be asked, so the questions are shell, and every answer may be missing.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
PYTHON, GLIBC = (3, 10), (2, 28)  # the least that edgert and its wheels need
SPARE_BYTES = 64 * MIB  # over what a model was counted to take at most, with a tenth of it
SYSTEM_SHARE = 0.30  # of a board's memory, left to its system where nobody states a budget

PROBE = r"""
say() { printf '\n@@ %s\n' "$1"; }
say system; uname -s
say machine; uname -m
say bits; getconf LONG_BIT
say release; cat /etc/nv_tegra_release
say model; cat /proc/device-tree/model || cat /sys/firmware/devicetree/base/model
say os; . /etc/os-release; echo "$PRETTY_NAME"
say glibc; getconf GNU_LIBC_VERSION
say pythons
for name in python3 python3.10 python3.11 python3.12 python3.13 python3.14; do
  at=$(command -v $name) && $at -c 'import sys, venv; print("%d.%d" % sys.version_info[:2], sys.argv[1])' "$at"
done
say memory; cat /proc/meminfo
say cores; getconf _NPROCESSORS_ONLN
say home; echo "$HOME"
say user; id -un
say uid; id -u
say flash; at=$ROOT; while [ ! -d "$at" ]; do at=$(dirname "$at"); done; df -Pk "$at"
say power; nvpmodel -q || cat /var/lib/nvpmodel/status
say modes; cat /etc/nvpmodel.conf
say sudo; sudo -n true && echo yes
say systemd; command -v systemctl && [ -d /run/systemd/system ] && echo running
say served; systemctl show --value -p MemoryCurrent edgert; systemctl --user show --value -p MemoryCurrent edgert
say session; [ -S "/run/user/$(id -u)/systemd/private" ] && echo yes
say end
"""

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_JETPACKS = (  # https://developer.nvidia.com/embedded/jetpack-archive
    ("38.4", "7.1"),
    ("38.2", "7.0"),
    ("36.5", "6.2.2"),
    ("36.4.4", "6.2.1"),
    ("36.4.3", "6.2"),
    ("36.4", "6.1"),
    ("36.3", "6.0"),
    ("36", "6"),
    ("38", "7"),
    ("35", "5"),
    ("34", "5"),
    ("32", "4"),
)
_PLANNED = (  # words of the device tree's model -> the name that `edgert plan --board` has for it
    ("Orin Nano", "jetson-orin-nano"),
    ("Orin NX", "jetson-orin-nx"),
    ("AGX Orin", "jetson-agx-orin"),
    ("Thor", "jetson-agx-thor"),
    ("Xavier NX", "jetson-xavier-nx"),
    ("TX2", "jetson-tx2"),
    ("Raspberry Pi 5", "raspberry-pi-5"),
    ("RK3588", "rk3588"),
    ("Rock 5B", "rk3588"),
    ("Orange Pi 5", "rk3588"),
)


class DeployError(Exception):
    """What went wrong and what to do, in one line."""


@dataclass(frozen=True)
class Python:
    """An interpreter of the board that has the module venv."""

    version: tuple[int, int]
    path: str


@dataclass(frozen=True)
class Facts:
    """What a board said of itself; empty or 0 where it did not."""

    system: str = ""
    machine: str = ""
    bits: int = 0
    l4t: str = ""  # NVIDIA's release, such as 36.4.3
    release: str = ""  # its line, as it stands
    model: str = ""  # of the device tree
    os: str = ""
    glibc: tuple[int, int] = (0, 0)
    pythons: tuple[Python, ...] = ()
    ram: int = 0
    ram_free: int = 0
    served: int = 0  # of what is not free, by this tool's own service
    cores: int = 0
    home: str = ""
    user: str = ""
    uid: int = -1
    flash_free: int = 0
    flash_device: str = ""
    power: str = ""  # the mode by name, as far as it is known
    power_modes: tuple[str, ...] = ()
    sudo: bool = False  # without a password
    systemctl: bool = False
    systemd: bool = False  # running
    session: bool = False  # systemd of the user

    @property
    def jetpack(self) -> str:
        """NVIDIA's name for the release; empty for what is no Jetson."""
        return next((name for l4t, name in _JETPACKS if f"{self.l4t}.".startswith(f"{l4t}.")), "") if self.l4t else ""

    @property
    def planned_as(self) -> str:
        """The board's name for `edgert plan`; empty where there is none."""
        return next((name for words, name in _PLANNED if words.lower() in self.model.lower()), "")

    def python(self, wanted: tuple[int, int] | None = None) -> Python | None:
        """The interpreter to use: of the wanted version, or the first that is new enough."""
        fitting = [one for one in self.pythons if one.version >= PYTHON and wanted in (None, one.version)]
        return fitting[0] if fitting else None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. problem: what is in the way; `refused`: so much that nothing is done."""

    name: str
    value: str
    problem: str = ""
    remedy: str = ""
    refused: bool = False

    @property
    def line(self) -> str:
        """The problem and its remedy."""
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


def probe_command(root: str) -> list[str]:
    """What to run on the board; its folder may start with ~/."""
    place = f'"$HOME"/{shlex.quote(root[2:])}' if root.startswith("~/") else shlex.quote(root)
    return ["sh", "-c", f"exec 2>/dev/null; ROOT={place}\n{PROBE}"]


# ---- reading ---------------------------------------------------------------------------------------------------------
def plain(said: Any) -> Any:
    """What a board said, text or JSON, without what a terminal obeys: control and direction characters, surrogates."""
    if isinstance(said, str):
        return _OBEYED.sub("", said)
    if isinstance(said, list):
        return [plain(one) for one in said]
    return {plain(key): plain(one) for key, one in said.items()} if isinstance(said, dict) else said


def read_facts(text: str) -> Facts:
    """The facts in a probe's output. DeployError: it is none."""
    parts = dict(re.findall(r"^@@ (\w+)\n(.*?)(?=^@@ |\Z)", plain(text), re.MULTILINE | re.DOTALL))
    if "end" not in parts:
        raise DeployError("the board did not answer as a Unix shell does: is it Linux, and is its login shell one?")
    said = defaultdict(str, {name: value.strip() for name, value in parts.items()})
    memory = {key: int(value) << 10 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", said["memory"], re.M)}
    device, free = _flash(said["flash"])
    modes = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", said["modes"]))
    return Facts(
        system=said["system"],
        machine=said["machine"],
        bits=_number(said["bits"]),
        l4t=read_l4t(said["release"]),
        release=said["release"].splitlines()[0] if said["release"] else "",
        model=" ".join(said["model"].split()),
        os=" ".join(said["os"].split()),
        glibc=_version(said["glibc"]),
        pythons=tuple(_pythons(said["pythons"])),
        ram=memory.get("MemTotal", 0),
        ram_free=memory.get("MemAvailable", 0),
        served=sum(min(_number(line), memory.get("MemTotal", 0)) for line in said["served"].splitlines()),
        cores=_number(said["cores"]),
        home=said["home"],
        user=said["user"],
        uid=_number(said["uid"], -1),
        flash_free=free,
        flash_device=device,
        power=read_power(said["power"], modes),
        power_modes=tuple(modes.values()),
        sudo=said["sudo"] == "yes" or said["uid"] == "0",
        systemctl=bool(said["systemd"]),
        systemd=said["systemd"].endswith("running"),
        session=said["session"] == "yes",
    )


def read_l4t(release: str) -> str:
    """36.4.3 of "# R36 (release), REVISION: 4.3, GCID: ..."; empty for anything else."""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", release)
    return f"{match[1]}.{match[2]}" if match else ""


def read_power(said: str, modes: dict[str, str]) -> str:
    """The power mode by name, from `nvpmodel -q` or its status file."""
    if match := re.search(r"NV Power Mode:\s*(?:MODE_)?(\S+)", said):
        return match[1]
    match = re.search(r"pmode:(\d+)", said)
    return modes.get(str(int(match[1])), f"mode {int(match[1])}").removeprefix("MODE_") if match else ""


def _pythons(said: str) -> Iterator[Python]:
    seen = set()
    for version, path in re.findall(r"^(\d+\.\d+) (/.+)$", said, re.MULTILINE):
        if version not in seen:
            seen.add(version)
            yield Python(_version(version), path)


def _flash(said: str) -> tuple[str, int]:
    """Device and free bytes of df's last line."""
    words = said.splitlines()[-1].split() if said else []
    return (words[0], _number(words[3]) << 10) if len(words) >= 6 else ("", 0)


def _version(text: str) -> tuple[int, int]:
    match = re.search(r"([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _number(text: str, default: int = 0) -> int:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else default


# ---- judging ---------------------------------------------------------------------------------------------------------
def judge(facts: Facts, *, any_board: bool = False, wanted: tuple[int, int] | None = None) -> list[Finding]:
    """What was found, and what of it is in the way. wanted: the Python that a given wheel is made for."""
    return [
        *_board(facts, any_board),
        _machine(facts),
        _python(facts, wanted),
        _glibc(facts),
        Finding("memory", f"{size(facts.ram)}, {size(facts.ram_free)} of it free"),
        Finding("flash", f"{size(facts.flash_free)} free on {facts.flash_device or 'its drive'}"),
        *_power(facts),
        _systemd(facts),
    ]


def _board(facts: Facts, any_board: bool) -> Iterator[Finding]:
    yield Finding("board", facts.model or "not named by a device tree")
    named = f"JetPack {facts.jetpack} (L4T {facts.l4t})" if facts.jetpack else f"L4T {facts.l4t}" if facts.l4t else ""
    if named or any_board:
        yield Finding("system", f"{named or 'no JetPack'}, {facts.os or facts.system or 'unknown'}")
        return
    yield Finding(
        "system",
        facts.os or facts.system,
        "it is no Jetson: there is no /etc/nv_tegra_release",
        "check the host's name, or add --any-board for a Raspberry Pi and the like",
        refused=True,
    )


def _machine(facts: Facts) -> Finding:
    good = facts.system == "Linux" and facts.machine in ("aarch64", "x86_64") and facts.bits == 64
    value = f"{facts.system} {facts.machine}, {facts.bits} bits, {facts.cores} cores"
    if good:
        return Finding("processor", value)
    problem = f"edgert's libraries have no wheels for {facts.machine or 'this machine'} with {facts.bits} bits"
    return Finding("processor", value, problem, "install a 64-bit Linux system", refused=True)


def _python(facts: Facts, wanted: tuple[int, int] | None) -> Finding:
    found = facts.python(wanted)
    value = ", ".join("{}.{}".format(*one.version) for one in facts.pythons) or "none with the module venv"
    if found:
        return Finding("Python", "{}.{} at {}".format(*found.version, found.path))
    least = "{}.{}".format(*(wanted or PYTHON))
    problem = f"Python {value}, but {'the given wheel' if wanted else 'edgert'} needs {least}" + " or newer" * (
        not wanted
    )
    if facts.jetpack.startswith(("4", "5")):
        remedy = f"JetPack {facts.jetpack} is too old: flash JetPack 6, or install python3.10 beside its own"
    elif wanted:
        remedy = f"give the wheel for Python {value}, or install python{least}"
    else:
        remedy = f"install python{least} beside its own; it is found by that name"
    return Finding("Python", value, problem, remedy, refused=True)


def _glibc(facts: Facts) -> Finding:
    value = "{}.{}".format(*facts.glibc)
    if facts.glibc >= GLIBC:
        return Finding("glibc", value)
    problem = f"glibc {value if facts.glibc > (0, 0) else 'is not there'}, but the wheels need {GLIBC[0]}.{GLIBC[1]}"
    return Finding("glibc", value, problem, "use a newer system; on a Jetson JetPack 6", refused=True)


def _power(facts: Facts) -> Iterator[Finding]:
    if not facts.power:
        if facts.l4t:
            yield Finding("power mode", "not known", "nvpmodel does not tell", "set the fastest: sudo nvpmodel -m 0")
        return
    if facts.power.startswith("MAXN"):
        yield Finding("power mode", facts.power)
        return
    others = f" of {', '.join(name.removeprefix('MODE_') for name in facts.power_modes)}" if facts.power_modes else ""
    yield Finding(
        "power mode",
        facts.power + others,
        f"power mode {facts.power} holds the clocks down, so tokens will be slower than planned",
        "sudo nvpmodel -m with the number of MAXN, then sudo jetson_clocks",
    )


def _systemd(facts: Facts) -> Finding:
    if not facts.systemctl:
        return Finding("systemd", "none", "there is no systemd: no service is installed")
    rights = (
        "as root" if facts.uid == 0 else "with sudo" if facts.sudo else "without sudo" + ", the user's" * facts.session
    )
    return Finding("systemd", ("running, " if facts.systemd else "not running, ") + rights)


def judge_room(free: int, needed: int, what: str) -> Finding:
    """Whether flash has room for what is copied and installed."""
    value = f"{size(needed)} needed of {size(free)} free"
    if needed <= free:
        return Finding("room", value)
    problem = f"the flash has {size(free)} free, but {size(needed)} are needed ({what})"
    return Finding(
        "room", value, problem, f"free {size(needed - free)}, or name a --folder on another drive", refused=True
    )


def judge_memory(facts: Facts, budget: int, floor: int, stated: bool) -> Finding:
    """Whether the model runs in the board's memory within a budget. floor: the smallest budget that runs, in bytes."""
    value = f"{size(budget)} for edgert; the model's floor is {size(floor)}"
    there = f"the board has {size(facts.ram)} of memory, {size(facts.ram_free)} of it free"
    if budget > facts.ram or facts.ram < floor:
        much = (
            f"--memory is {size(budget)}"
            if stated and floor <= facts.ram
            else f"this model needs at least {size(floor)}"
        )
        remedy = (
            "use less" if stated and floor <= facts.ram else "use a smaller model, fewer bits or a shorter --context"
        )
        return Finding("budget", value, f"{there}, but {much}", remedy, refused=True)
    if budget < floor:
        remedy = f"use --memory {-(-floor // MIB)}MiB or more, or a shorter --context"
        return Finding("budget", value, f"{size(budget)} is below this model's floor of {size(floor)}", remedy, True)
    free = facts.ram_free + facts.served  # it rests while another release is proven
    if free < floor:
        remedy = "stop other programs; a Jetson's desktop: sudo systemctl isolate multi-user.target"
        return Finding("budget", value, f"{there}, but this model needs at least {size(floor)}", remedy, refused=True)
    if free < budget:
        return Finding("budget", value, f"{there}: less than the budget", "stop other programs, or state less")
    return Finding("budget", value)


def usual_budget(facts: Facts, whole: int) -> int:
    """Bytes for edgert where nobody states them: what the model can use, at most a share of the board's memory.

    The same at each run, whatever else runs on the board meanwhile. whole: what the model takes with all in RAM.
    """
    return min(int(whole * 1.1) + SPARE_BYTES, int((1 - SYSTEM_SHARE) * facts.ram)) // MIB * MIB


def size(n_bytes: float) -> str:
    """1.5 GiB, 312 MiB."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.0f} MiB"

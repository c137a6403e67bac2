"""The wheels of a deployment: edgert's built here, its dependencies fetched for the board, each checked for the board.

A wheel is judged by its tags and by what its libraries are compiled for: a name can lie. Dependencies are resolved for
the board's Python and processor: pip's own `download` would ask for those of this machine's Python.
"""

from __future__ import annotations

import email.parser
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy_board import DeployError

try:
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.tags import Tag, compatible_tags, cpython_tags
    from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
except ImportError as missing:
    raise SystemExit(f'deploy_jetson.py needs {missing.name}: pip install "edgert[deploy]"') from missing

TREE = Path(__file__).resolve().parents[1]
_SOURCES = ("edgert", "experts", "storage", "devices", "quant", "pyproject.toml", "README.md")
_ELF_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_OLDEST_GLIBC = 17


@dataclass(frozen=True)
class Target:
    """What wheels are for."""

    python: tuple[int, int]
    machine: str
    glibc: tuple[int, int]

    @property
    def platforms(self) -> list[str]:
        """Tags of platforms, the newest first."""
        newer = [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc[1], _OLDEST_GLIBC - 1, -1)]
        return [*newer, f"manylinux2014_{self.machine}", f"linux_{self.machine}"]

    @property
    def tags(self) -> frozenset[Tag]:
        """All tags of wheels that can be installed."""
        interpreter = "cp{}{}".format(*self.python)
        own = cpython_tags(self.python, platforms=self.platforms)
        return frozenset((*own, *compatible_tags(self.python, interpreter, self.platforms)))

    @property
    def markers(self) -> dict[str, str]:
        """What conditions of dependencies are asked about."""
        short = "{}.{}".format(*self.python)
        known = {name: str(value) for name, value in default_environment().items()}
        return {
            **known,
            "python_version": short,
            "python_full_version": f"{short}.0",
            "implementation_version": f"{short}.0",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }

    def __str__(self) -> str:
        return "Python {}.{} on {} with glibc {}.{}".format(*self.python, self.machine, *self.glibc)


@dataclass(frozen=True)
class Wheel:
    """A wheel file and what it says of itself."""

    path: Path
    name: str  # normalised
    version: str
    requires: tuple[str, ...]
    digest: str  # of its content, whenever it was packed
    unpacked: int  # bytes

    @property
    def serves(self) -> bool:
        """Whether it is an edgert that has `edgert serve`."""
        with zipfile.ZipFile(self.path) as archive:
            return "edgert/cli/serve.py" in archive.namelist()


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_wheel(path: Path) -> Wheel:
    """A wheel's name, version, dependencies and digest. DeployError: it is no wheel."""
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            metadata = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            text = archive.read(metadata).decode("utf-8", "replace")
            entries = archive.infolist()
    except (InvalidWheelFilename, zipfile.BadZipFile, StopIteration, KeyError, OSError) as problem:
        raise DeployError(f"{path} is no wheel ({problem or 'it has no METADATA'}); give a .whl file") from problem
    requires = email.parser.Parser().parsestr(text, headersonly=True).get_all("Requires-Dist", [])
    told = [  # WHEEL and RECORD name who packed it
        f"{entry.filename} {entry.file_size} {entry.CRC}"
        for entry in entries
        if not entry.filename.endswith((".dist-info/WHEEL", ".dist-info/RECORD"))
    ]
    digest = hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()
    unpacked = sum(entry.file_size for entry in entries)
    return Wheel(path, canonicalize_name(name), str(version), tuple(requires), digest, unpacked)


def check_wheel(path: Path, target: Target) -> None:
    """DeployError: a wheel is for another Python, processor or system, by its name or by its libraries."""
    try:
        tags = parse_wheel_filename(path.name)[3]
    except InvalidWheelFilename as problem:
        raise DeployError(f"{path} is no wheel ({problem}); give a .whl file") from problem
    if not tags & target.tags:
        made_for = ", ".join(sorted(map(str, tags)))
        raise DeployError(f"{path.name} is for {made_for}; the board is {target}: take the wheel for that")
    for name, machine in compiled_for(path):
        if machine != target.machine:
            raise DeployError(
                f"{path.name}: {name} in it is compiled for {machine}, whatever the wheel is called; the board is "
                f"{target.machine}: take the wheel for that"
            )


def compiled_for(path: Path) -> Iterator[tuple[str, str]]:
    """(name, processor) of each library in a wheel."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if re.search(r"\.so(\.|$)", entry.filename):
                    with archive.open(entry) as file:
                        header = file.read(20)
                    if header[:4] == b"\x7fELF":
                        number = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])[0]
                        yield (entry.filename, _ELF_MACHINES.get(number, f"machine {number}"))
    except (zipfile.BadZipFile, OSError) as problem:
        raise DeployError(f"{path} is no wheel ({problem}); give a .whl file") from problem


def python_of(path: Path) -> tuple[int, int] | None:
    """The one Python that a wheel is made for; None where there are several."""
    try:
        interpreters = {
            tag.interpreter for tag in parse_wheel_filename(path.name)[3] if tag.abi not in ("abi3", "none")
        }
    except InvalidWheelFilename as problem:
        raise DeployError(f"{path} is no wheel ({problem}); give a .whl file") from problem
    match = re.fullmatch(r"cp(\d)(\d+)", interpreters.pop()) if len(interpreters) == 1 else None
    return (int(match[1]), int(match[2])) if match else None


# ---- making ----------------------------------------------------------------------------------------------------------
def build_edgert(folder: Path) -> Path:
    """edgert's wheel, from this checkout: from a copy, for setuptools would pack what an earlier build left."""
    with tempfile.TemporaryDirectory() as copy:
        for name in _SOURCES:
            if (TREE / name).is_dir():
                shutil.copytree(TREE / name, Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(TREE / name, copy)
        pip("wheel", "--no-deps", "--wheel-dir", str(folder), copy, what="building edgert's wheel")
    return next(folder.glob("edgert-*.whl"))


def fetch(wanted: Sequence[str], given: Iterable[Path], target: Target, folder: Path) -> None:
    """Bring the wheels of requirements and all that they need for the board into a folder.

    given: wheels that are taken as they are. DeployError: there is no such wheel for the board.
    """
    kept = [shutil.copy2(path, folder) for path in given]
    before: list[str] = []
    while missing := lacking(map(read_wheel, folder.glob("*.whl")), wanted, target):
        if missing == before:
            raise DeployError(f"the wheels given do not meet {', '.join(missing)}; give others")
        names = {canonicalize_name(Requirement(text).name) for text in missing}
        for path in folder.glob("*.whl"):  # another version was taken before all that ask for it were known
            if path not in kept and read_wheel(path).name in names:
                path.unlink()
        options = [f"--platform={platform}" for platform in target.platforms]
        options += ["--python-version={}.{}".format(*target.python), "--only-binary=:all:", "--no-deps"]
        pip("download", *options, "--dest", str(folder), *missing, what=f"fetching wheels for {target}")
        before = missing


def lacking(wheels: Iterable[Wheel], wanted: Sequence[str], target: Target) -> list[str]:
    """Requirements that nothing among the wheels meets, for the board; all that ask for one thing in one line."""
    there = {wheel.name: wheel for wheel in wheels}
    asked: dict[str, set[str]] = {}
    queue = [Requirement(text) for text in wanted]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        asked.setdefault(name, set()).update(str(requirement.specifier).split(","))
        for extra in ("", *requirement.extras):
            if name in there and (name, extra) not in seen:
                seen.add((name, extra))
                queue += _needed(there[name], extra, target)
    unmet = []
    for name, specifiers in asked.items():
        rule = ",".join(sorted(filter(None, specifiers)))
        if name not in there or not Requirement(name + rule).specifier.contains(there[name].version, prereleases=True):
            unmet.append(name + rule)
    return sorted(unmet)


def _needed(wheel: Wheel, extra: str, target: Target) -> Iterator[Requirement]:
    """What a wheel needs on the board, for itself or for one of its extras."""
    for text in wheel.requires:
        requirement = Requirement(text)
        if requirement.marker is None:
            if not extra:
                yield requirement
        elif requirement.marker.evaluate({**target.markers, "extra": extra}):
            if not extra or not requirement.marker.evaluate({**target.markers, "extra": ""}):
                yield requirement


def pip(*arguments: str, what: str) -> None:
    """Run this machine's pip. DeployError: its last words."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["?"]
        raise DeployError(f"{what} failed: {lines[-1].removeprefix('ERROR: ')}")

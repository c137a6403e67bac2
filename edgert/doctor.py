"""What this machine has for edgert, what is in the way, and how fast its flash is: each finding with its reason.

The machine is asked, the flash is measured (storage/flash_probe.py); the best way to read it is kept for later loads.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from edgert import machine, memory
from edgert.cache import cache_folder, cached_models
from edgert.devices import cores
from edgert.errors import ModelFileError, OptionError
from edgert.quant import isa
from edgert.storage.bundle import MANIFEST, Bundle
from edgert.storage.flash_probe import LEAST_RECORDS, TEMPORARY_BYTES, FlashProbe, probe, temporary_file
from edgert.storage.flash_settings import (
    FlashSettings,
    existing,
    file_system,
    flash_settings,
    keep_settings,
)
from edgert.storage.gguf_file import GgufFile

# What is measured where the path names no model: one expert of a 7-billion-parameter model in 4 bits.
RECORD_BYTES = 3456 << 10
_LARGE = 64 << 20  # a smaller file is not measured: drives keep that much in their own memory

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str  # "processor", "memory", "software" or "flash"
    name: str
    value: str
    reason: str = ""  # why it is so, or what it means
    remedy: str = ""  # what to do about it; empty where nothing is in the way


@dataclass(frozen=True)
class Report:
    """Everything that `edgert doctor` prints."""

    findings: tuple[Finding, ...]
    flash: FlashProbe
    settings: FlashSettings
    kept_in: str  # the file, or why the settings could not be kept

    def as_dict(self) -> dict[str, Any]:
        """As one JSON document; rates in bytes a second."""
        rows = [
            {
                "lanes": one.lanes,
                "chunk_bytes": one.chunk_bytes,
                "direct": one.direct,
                "bytes_per_s": one.bytes_per_s,
                "turns": len(one.rates),
            }
            for one in self.flash.candidates
        ]
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "flash": {"file": str(self.flash.path), "record_bytes": self.flash.record_bytes, "measured": rows},
            "settings": asdict(self.settings),
            "kept_in": self.kept_in,
        }


def examine(
    path: str | Path | None = None, *, seconds: float = 8.0, progress: Progress = lambda stage, fraction: None
) -> Report:
    """Look at the machine and measure the flash under `path`, a model or a folder; None: where packed models lie.

    The measurement takes about `seconds`, longer on slow drives. A folder without a large file gets a temporary one.
    Raises ModelFileError and OptionError for a path that cannot be measured.
    """
    subject = _own_files() if path is None else Path(path)
    with measurable(subject, progress) as (file, record_bytes):
        before = flash_settings(subject, record_bytes)
        found = probe(file, record_bytes, seconds=seconds, progress=progress)
    settings = found.best()
    try:
        kept_in = str(keep_settings(subject, settings))
    except OSError as error:
        kept_in = f"not kept: {error.filename}: {error.strerror}"
    return Report((*findings(), *_flash(subject, found, before)), found, settings, kept_in)


@contextlib.contextmanager
def measurable(path: Path, progress: Progress) -> Iterator[tuple[Path, int]]:
    """A large file at or in `path`, or a temporary one beside it, and the size of the records to read."""
    if not path.exists():
        raise ModelFileError(f"{path}: no such file or folder; name a model, or a folder on the drive to measure")
    file: Path | None
    folder, record_bytes = path.parent, RECORD_BYTES
    if (path / MANIFEST).exists():
        with Bundle.open(path) as bundle:
            file, record_bytes = bundle.experts_path, int(bundle.record_bytes.max()) or RECORD_BYTES
    elif path.is_file():
        file, record_bytes = path, _record_bytes(path) or RECORD_BYTES
    else:
        file, folder = _largest(path), path
    if file is not None and file.stat().st_size >= max(_LARGE, LEAST_RECORDS * record_bytes):
        yield file, record_bytes
        return
    with temporary_file(folder, TEMPORARY_BYTES, progress) as made:
        yield made, record_bytes


def _own_files() -> Path:
    """What is measured without a path: the packed model that was used last, or the folder where such go."""
    whole = (model.path for model in cached_models() if model.state not in ("damaged", "unfinished"))
    return next(whole, existing(cache_folder()))


def _largest(folder: Path) -> Path | None:
    sizes = []
    try:
        for file in folder.iterdir():
            with contextlib.suppress(OSError):  # gone since
                if file.is_file():
                    sizes.append((file.stat().st_size, file))
    except OSError as error:
        raise OptionError(f"{folder} cannot be listed ({error.strerror}): name a model file") from error
    return max(sizes)[1] if sizes else None


def _record_bytes(path: Path) -> int | None:
    """The bytes of one routed expert of a GGUF model: the largest layer's; None for anything else."""
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return None
    layers: dict[str, int] = {}
    with GgufFile.open(path) as file:
        for name, info in file.tensors.items():
            match = re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight", name)
            if match and len(info.shape) == 3 and info.shape[0]:
                layers[match[1]] = layers.get(match[1], 0) + info.n_bytes // info.shape[0]
    return max(layers.values(), default=None)


# ---- the machine -----------------------------------------------------------------------------------------------------
def findings(root: Path = Path("/")) -> Iterator[Finding]:
    """What there is to know without measuring; `root` holds sys/ and proc/."""
    yield from _processor(root)
    yield from _memory(root)
    yield from _software()


def _processor(root: Path) -> Iterator[Finding]:
    threads = cores.choose_threads()
    yield Finding("processor", "name", machine.cpu_name(), platform.machine())
    yield Finding("processor", "threads", str(threads.n_threads), threads.reason)
    chosen = isa.choose().name
    yield Finding("processor", "instructions", chosen, dict(isa.explain()).get(chosen, ""))
    governor = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = governor == "powersave" and "intel_pstate" not in _text(
            root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"
        )
        remedy = "for speed: sudo cpupower frequency-set -g schedutil" if slow else ""
        yield Finding("processor", "clock governor", governor, "keeps the clock low" if slow else "", remedy)
    heat = [_number(zone / "temp") / 1000 for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))]
    if heat and max(heat) > 0:
        hot = max(heat) >= 80
        yield Finding(
            "processor",
            "temperature",
            f"{max(heat):.0f} °C",
            "the hottest sensor" + "; processors slow down from 80 to 95 °C" * hot,
            "better cooling" if hot else "",
        )


def _memory(root: Path) -> Iterator[Finding]:
    machine_bytes, free = psutil.virtual_memory(), memory.available()
    yield Finding("memory", "installed", _gib(machine_bytes.total))
    capped = free < 0.9 * machine_bytes.available
    reason = "a cgroup's limit leaves less than the machine has" if capped else "free, or page cache that gives way"
    yield Finding("memory", "available", _gib(free), reason)
    pages = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    if pages and pages[1] == "never":
        yield Finding(
            "memory",
            "huge pages",
            "never",
            "experts are read and computed up to a third slower from small pages",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        yield Finding("memory", "huge pages", pages[1] if pages else "not in this kernel", "for the expert buffer")
    pressure = _text(root / "proc/pressure/memory")
    if pressure:
        average = re.search(r"some avg10=([0-9.]+)", pressure)
        busy = average is not None and float(average[1]) >= 5
        yield Finding(
            "memory",
            "pressure (PSI)",
            f"{average[1]} %" if average else "watched",
            "of the last 10 s waited for memory" if average else "",
            "close other programs" if busy else "",
        )
    else:
        yield Finding(
            "memory", "pressure (PSI)", "not in this kernel", "major page faults alone tell of want of memory"
        )
    swap = psutil.swap_memory()
    if swap.total:
        yield Finding("memory", "swap", _gib(swap.total), f"{_gib(swap.used)} used; the budget does not count on it")


def _software() -> Iterator[Finding]:
    names = ("numpy", "numba", "llvmlite")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield Finding("software", "versions", f"Python {platform.python_version()}, {versions}")
    kernels = machine.kernels()
    value = f"{kernels['count']} compiled" if kernels["count"] else "none compiled yet"
    remedy = "" if kernels["count"] else "edgert warmup, or let the first chat compile them"
    yield Finding("software", "kernels", value, kernels["folder"], remedy)


def _flash(subject: Path, found: FlashProbe, before: FlashSettings) -> Iterator[Finding]:
    where = file_system(subject)
    yield Finding("flash", "file system", where.kind, f"on {where.device}, mounted at {where.mount}")
    remedy = "" if found.direct else "keep models on a file system with direct reads, such as ext4, xfs, btrfs or f2fs"
    yield Finding("flash", "direct reads", "yes" if found.direct else "no", found.reason, remedy)
    if before.measured and before.bytes_per_s:
        now = found.best().bytes_per_s or 0.0
        slower = now < 0.6 * before.bytes_per_s
        yield Finding(
            "flash",
            "measured before",
            f"{before.bytes_per_s / 1e9:.2f} GB/s",
            f"on {before.date}" + ", faster than now" * slower,
            "see whether the drive is full, worn, hot or busy" if slower else "",
        )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if re.fullmatch("-?[0-9]+", text) else 0

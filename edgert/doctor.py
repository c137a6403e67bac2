"""What this machine has for edgert, what is in the way, and how fast its flash is: each finding with its reason.

The machine is asked, the flash is measured (storage/flash_probe.py); the best way to read it is kept for later loads.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgert import machine
from edgert.cache import cache_folder, cached_models
from edgert.devices import cores
from edgert.doctor_board import board_findings
from edgert.doctor_devices import device_findings
from edgert.doctor_memory import gib, memory_findings
from edgert.errors import ModelFileError, OptionError
from edgert.findings import Finding
from edgert.quant import isa, jit
from edgert.storage.bundle import MANIFEST, Bundle
from edgert.storage.flash_class import flash_class
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
_SLOW = 0.5e9  # bytes a second, below which most of an answer's time is waiting
_LITTLE = 4 << 30  # bytes free
_LARGE = 64 << 20  # a smaller file is not measured: drives keep that much in their own memory

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Report:
    """Everything that `edgert doctor` prints."""

    findings: tuple[Finding, ...]
    flash: FlashProbe
    settings: FlashSettings
    kept_in: str  # the file, or why the settings could not be kept

    @property
    def stops(self) -> bool:
        """Whether something keeps models from running here."""
        return any(finding.stops for finding in self.findings)

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
            "healthy": not self.stops,
            "findings": [finding.as_dict() for finding in self.findings],
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
    yield from memory_findings(root)
    yield from board_findings(root)
    yield from _software()
    yield from device_findings()
    yield from _cache()


def _processor(root: Path) -> Iterator[Finding]:
    threads, paths = cores.choose_threads(root), dict(isa.explain())
    yield Finding("processor", "name", machine.cpu_name(), f"{platform.machine()}; kernels are compiled for it")
    yield Finding("processor", "threads", str(threads.n_threads), f"what --threads is if not set: {threads.reason}")
    chosen = isa.choose().name
    others = {name: why for name, why in paths.items() if name != chosen}
    missing = "; ".join(f"{name} {why.partition(';')[0]}" for name, why in others.items() if why.startswith("needs"))
    yield Finding("processor", "instructions", chosen, f"{paths.get(chosen, '')}{'; ' * bool(missing)}{missing}")


def _software() -> Iterator[Finding]:
    names = ("numpy", "numba", "llvmlite")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    libc = " ".join(platform.libc_ver()).strip()
    python = f"Python {platform.python_version()}{', ' * bool(libc)}{libc}"
    reason = f"{python}, {versions}: kernels that were compiled with others are compiled anew"
    yield Finding("software", "edgert", importlib.metadata.version("edgert"), reason)
    if not jit.JIT_ENABLED:
        reason = "NUMBA_DISABLE_JIT is set: answers come from NumPy, with the same bits, some hundred times slower"
        yield Finding("software", "kernels", "off", reason, "unset NUMBA_DISABLE_JIT")
        return
    kernels = machine.kernels()
    value = f"{kernels['count']} compiled" if kernels["count"] else "none compiled yet"
    first = "a first chat takes no longer than others" if kernels["count"] else "a first chat takes 10 to 20 s longer"
    remedy = "" if kernels["count"] else "edgert warmup, or let the first chat compile them"
    yield Finding("software", "kernels", value, f"{first}; {kernels['folder']}", remedy)


def _cache() -> Iterator[Finding]:
    """Packed models, and room for more."""
    folder, models = cache_folder(), cached_models()
    total = sum(model.n_bytes for model in models)
    reason = f"in {folder}: a model that is there starts without packing"
    yield Finding("cache", "packed models", f"{len(models)}, {gib(total)}", reason)
    for state, what in _STATES.items():
        names = ", ".join(model.name for model in models if model.state == state)
        if names:
            yield Finding("cache", state, names, what, f"edgert cache remove {names.replace(', ', ' ')}")
    place = existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        reason = "models larger than memory cannot be packed, nor settings kept"
        yield Finding("cache", "writable", "no", reason, "set XDG_CACHE_HOME to a folder that is", stops=True)
    free = shutil.disk_usage(place).free
    low = free < _LITTLE
    reason = f"under {place}: a packed model takes as much as its file" + ", so hardly any fits" * low
    yield Finding("cache", "free space", gib(free), reason, "remove files, or set XDG_CACHE_HOME" if low else "")


_STATES = {
    "damaged": "not read; its model is packed anew when it is run",
    "unfinished": "packing was ended before its end, and goes on when the model is run",
    "changed": "its file has changed since; packed anew when it is run",
    "missing": "its file is gone; it still runs by its own path",
}


def _flash(subject: Path, found: FlashProbe, before: FlashSettings) -> Iterator[Finding]:
    where = file_system(subject)
    yield _kind(subject, found)
    yield Finding("flash", "file system", where.kind, f"on {where.device}, mounted at {where.mount}: read from there")
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


def _kind(subject: Path, found: FlashProbe) -> Finding:
    """The class of the drive, and what it takes for an expert."""
    drive, rate = flash_class(subject), found.best().bytes_per_s or 0.0
    value = " ".join(filter(None, (drive.kind or "not told", drive.model, f"({drive.link})" if drive.link else "")))
    size, each = f"{found.record_bytes / 2**20:.2f} MiB", 1e3 * found.record_bytes / max(rate, 1)
    reason = f"{rate / 1e9:.2f} GB/s at records of {size}: {each:.1f} ms for each expert that is missing"
    remedy = ""
    if drive.possible_link:
        remedy = f"its link could be {drive.possible_link}: see the slot, or on a Raspberry Pi 5 dtparam=pciex1_gen=3"
    if rate < _SLOW:
        remedy = (
            "keep models on NVMe, or give the most memory: such a drive makes answers wait" if drive.slow else remedy
        )
    return Finding("flash", "drive", value, reason, remedy)

"""Which device answers a model fastest, by what `edgert bench` measured here: what `--device auto` goes by.

One JSON file a model and number of threads, by the file's path, size and time, beside the verdicts of verification and
with their facts of what is installed: what was measured with others counts no more. A damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.devices.cores import choose_threads
from edgert.errors import DeviceError
from edgert.storage.aside import written_aside
from edgert.storage.bundle import MANIFEST, is_bundle
from edgert.verifying import folder, installed, key_of

OWN = "cpu"  # what is taken where nothing else was measured


@dataclass(frozen=True)
class Speeds:
    """Tokens a second of a model's answers, by device."""

    path: str
    devices: dict[str, float]

    @property
    def fastest(self) -> str:
        """The device to take: another than the CPU's only where both were measured."""
        return max(self.devices, key=lambda name: self.devices[name]) if OWN in self.devices else OWN

    @property
    def reason(self) -> str:
        """Why that one."""
        ranked = sorted(self.devices.items(), key=lambda one: -one[1])
        return "edgert bench: " + ", ".join(f"{name} {rate:.3g} tok/s" for name, rate in ranked)


def _model(path: Path) -> list[object]:
    """What tells a model's file, or a bundle's manifest, from what lay there before. OSError where it is not there."""
    path = path.resolve()
    found = (path / MANIFEST if is_bundle(path) else path).stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def _file(model: Path, threads: int | None) -> Path:
    name = key_of(*_model(model), threads or choose_threads().n_threads)
    return folder().parent / "speeds" / f"{name}.json"


def record_speed(model: Path, device: str, tokens_per_s: float, threads: int | None = None) -> None:
    """Note what was measured; where it cannot be written, nothing is. threads: None for those that are chosen."""
    with contextlib.suppress(OSError, RuntimeError, DeviceError):
        path = _file(model, threads)
        known = _document(path) or {"model": _model(model), "devices": {}}
        known["devices"][device] = {"tok_s": tokens_per_s, "with": key_of(*installed(device))}
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(known))


def speeds_of(model: Path, threads: int | None = None) -> Speeds | None:
    """What was measured of a model with so many threads and what is installed now, if anything."""
    with contextlib.suppress(OSError, RuntimeError):  # a user without a home
        return _read(_file(model, threads))
    return None


def all_speeds() -> Iterator[Speeds]:
    """What was measured of all models that are still there."""
    with contextlib.suppress(OSError, RuntimeError):
        for path in sorted((folder().parent / "speeds").glob("*.json")):
            if (found := _read(path)) is not None:
                yield found


def _document(path: Path) -> dict[str, Any] | None:
    """A file's content, if it is sound."""
    try:
        document: Any = json.loads(path.read_text())
        rates = [float(one["tok_s"]) for one in document["devices"].values() if str(one["with"])]
        sound = isinstance(document["model"], list) and all(math.isfinite(rate) and rate > 0 for rate in rates)
        return document if sound and rates else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _read(path: Path) -> Speeds | None:
    document = _document(path)
    if document is None:
        return None
    with contextlib.suppress(OSError):
        if _model(Path(str(document["model"][0]))) == document["model"]:
            devices = {name: float(one["tok_s"]) for name, one in document["devices"].items() if _holds(name, one)}
            return Speeds(document["model"][0], devices) if devices else None
    return None


def _holds(device: str, measured: dict[str, Any]) -> bool:
    """Whether a device was measured with what is installed now."""
    with contextlib.suppress(DeviceError):
        return bool(measured["with"] == key_of(*installed(device)))
    return False

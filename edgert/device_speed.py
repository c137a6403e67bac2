"""Which device answers a model fastest, by what `edgert bench` measured here: what `--device auto` goes by.

One JSON file a model, by its path, beside the verdicts of verification. A damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.verifying import folder

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


def _file(model: Path) -> Path:
    name = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:32]
    return folder().parent / "speeds" / f"{name}.json"


def record_speed(model: Path, device: str, tokens_per_s: float) -> None:
    """Note what was measured; where it cannot be written, nothing is."""
    with contextlib.suppress(OSError, RuntimeError):
        path, known = _file(model), speeds_of(model)
        devices = {**(known.devices if known else {}), device: tokens_per_s}
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        aside.write_text(json.dumps({"path": str(model.resolve()), "devices": devices}))
        os.replace(aside, path)


def speeds_of(model: Path) -> Speeds | None:
    """What was measured of a model, if anything."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        return _read(_file(model))
    return None


def all_speeds() -> Iterator[Speeds]:
    """What was measured of all models."""
    with contextlib.suppress(OSError, RuntimeError):
        for path in sorted((folder().parent / "speeds").glob("*.json")):
            if (found := _read(path)) is not None:
                yield found


def _read(path: Path) -> Speeds | None:
    try:
        document: Any = json.loads(path.read_text())
        devices = {str(name): float(rate) for name, rate in document["devices"].items()}
        sound = devices and all(math.isfinite(rate) and rate > 0 for rate in devices.values())
        return Speeds(str(document["path"]), devices) if sound else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None

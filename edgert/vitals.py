"""What a board did while something ran on it: energy, heat, and whether it slowed itself down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgert import sysfs, thermal
from edgert.power import Meter, power_source

Made = TypeVar("Made")


@dataclass(frozen=True)
class Vitals:
    """Of one run. watts: the mean, None where the board does not tell; celsius: of the zone nearest its limit, at the
    end; throttled: what slowed the board down."""

    watts: float | None = None
    celsius: float | None = None
    throttled: tuple[str, ...] = ()


class Watch:
    """Watches runs, one at a time; `root` holds sys/."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = sysfs.ROOT if root is None else root
        self.source = power_source(self._root)

    def over(self, run: Callable[[], Made]) -> tuple[Made, Vitals]:
        """Do it, and what the board did meanwhile."""
        meter, before = Meter(self.source), thermal.signs(self._root)
        meter.start()
        try:
            made = run()
        finally:
            watts = meter.stop()
        zones = thermal.zones(self._root)
        slowed = thermal.throttled(before, thermal.signs(self._root))
        return made, Vitals(watts, zones[0].celsius if zones else None, slowed)


def as_json(vitals: Sequence[Vitals], n_tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Of runs of n_tokens each: tokens a joule and watts over all of them, heat, and what slowed the board down."""
    joules = [one.watts * took for one, took in zip(vitals, seconds, strict=True) if one.watts is not None]
    whole = sum(joules) if joules and len(joules) == len(vitals) else 0.0
    slowed = dict.fromkeys(reason for one in vitals for reason in one.throttled)
    return {
        "tokens_per_joule": n_tokens * len(vitals) / whole if whole > 0 else None,
        "watts": whole / sum(seconds) if whole > 0 else None,
        "runs_joules": joules if whole > 0 else None,
        "celsius": max((one.celsius for one in vitals if one.celsius is not None), default=None),
        "throttled_runs": sum(bool(one.throttled) for one in vitals),
        "throttled": list(slowed),
    }

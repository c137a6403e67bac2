"""One thing that `edgert doctor` looked at, and what it means."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What was found, its consequence, and what to do. stops: whether models do not run for it."""

    area: str  # "processor", "memory", "board", "software", "devices", "cache" or "flash"
    name: str
    value: str
    reason: str = ""  # what it means for a model here, or why it is so
    remedy: str = ""  # what to do about it; empty where nothing is in the way
    stops: bool = False

    @property
    def level(self) -> str:
        """ "ok", "advice" where something could be better, "problem" where models do not run."""
        return "problem" if self.stops else "advice" if self.remedy else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the level among them."""
        return {**asdict(self), "level": self.level}

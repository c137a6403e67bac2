"""Profiling of a few chunks of made-up text, for tests that want a profile or break off on the way to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert import profile_journal
from edgert.profiling import Profiled, profile_model

CHUNK = 64
WORDS = "the cat sat on a mat and looked at the rain while some one in the house was making tea for two ".split()


def silent(stage: str, fraction: float) -> None:
    """Progress that nobody looks at."""


def write_text(path: Path, n_words: int = 3000, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    path.write_text("\n".join(" ".join(draw.choice(WORDS, 12)) for _ in range(n_words // 12)))
    return path


def run(model: Path | None, out: Path, texts: list[Path], progress: Any = silent, **options: Any) -> Profiled:
    """Four chunks of each text, unless told otherwise."""
    options = {"n_tokens": 4 * CHUNK * max(len(texts), 1), "held_out": 0.1, "context": CHUNK, "threads": 1} | options
    return profile_model(model, out, corpora=texts, progress=progress, **options)


def save_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was run is run again after an interruption, and progress is called at every step."""
    monkeypatch.setattr(profile_journal, "_LEAST_S", 0.0)
    monkeypatch.setattr(profile_journal, "_SHARE", 1e9)
    monkeypatch.setattr("edgert.pack_meter._REPORT_S", 0.0)

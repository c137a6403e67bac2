"""States of a profile: what each expert was given, gone on with where it was broken off, and refused where wrong."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import golden_path
from profiling_runs import CHUNK, run, save_every_chunk, silent, write_text

from edgert.errors import EdgertError, OptionError, StorageError
from edgert.model import load
from edgert.quantising import Bench
from edgert.states import States, collect_states


@pytest.fixture
def model() -> Path:
    return golden_path("qwen3moe-q4_0")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return [write_text(tmp_path / "one.txt"), write_text(tmp_path / "two.txt", seed=1)]


def test_states_are_what_each_expert_was_given(model: Path, texts: list[Path], tmp_path: Path) -> None:
    profile = run(model, tmp_path / "p.npz", texts).profile
    with load(model, context=CHUNK, threads=1, residency="60%") as opened:
        states = collect_states(opened, profile, None, tmp_path / "s.bin", silent)
        one = collect_states(opened, profile, [1], tmp_path / "one.bin", silent)
    assert states.layers == [0, 1] and (tmp_path / "s.bin").stat().st_size == 2 * 2 * 8 * CHUNK * 64
    for layer in (0, 1):
        for expert in range(profile.n_expert):
            rows, weights, shares = states.of(layer, expert)
            np.testing.assert_allclose(shares, 1.0, rtol=1e-6)  # domains as they come
            tokens, _ = states.tokens(layer, expert)
            assert len(rows) == len(weights) == len(tokens) and rows.dtype == weights.dtype == np.float32
            if len(rows):
                moments = (rows.astype(np.float64) ** 2).mean(axis=0)
                np.testing.assert_allclose(moments, profile.input_moments[layer, expert], rtol=5e-3, atol=1e-5)
    busiest = int(profile.frequency()[1].argmax())
    all_rows, few = states.of(1, busiest), states.of(1, busiest, limit=10)
    assert len(few[0]) == 10 and np.isin(few[1], all_rows[1]).all()
    assert np.array_equal(one.of(1, busiest)[0], all_rows[0])
    total = sum(len(states.of(1, expert)[0]) for expert in range(profile.n_expert))
    assert total == profile.n_tokens * profile.top_k
    with pytest.raises(OptionError, match="layer 0 was not collected"):
        one.of(0, 0)


def test_states_of_another_model_or_without_room_are_refused(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, path = run(model, tmp_path / "p.npz", texts).profile, tmp_path / "s.bin"
    with load(golden_path("qwen3moe-q4_1"), context=CHUNK, threads=1) as other:
        with pytest.raises(EdgertError, match="routes otherwise than in the profile"):
            collect_states(other, profile, None, path, silent)
        with pytest.raises(StorageError, match="cannot be written"):
            collect_states(other, profile, None, tmp_path / "not" / "there", silent)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(StorageError, match=r"131,072 bytes are needed .*, 1,000 are free"):
            collect_states(other, profile, None, path, silent)
    with load(model, context=32, threads=1) as short:
        monkeypatch.undo()
        with pytest.raises(OptionError, match="chunks of 64 tokens, the context holds 32"):
            collect_states(short, profile, None, path, silent)
    assert not path.exists()


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    save_every_chunk(monkeypatch)


@pytest.mark.usefixtures("saving")
def test_states_go_on_after_an_interruption_and_are_collected_anew_where_they_are_damaged(
    model: Path, texts: list[Path], tmp_path: Path
) -> None:
    profile, steps = run(model, tmp_path / "p.npz", texts).profile, list[str]()
    path = tmp_path / "work" / "states.f16"

    def progress(stage: str, fraction: float) -> None:
        steps.append(stage)
        if stops and len(steps) > 3:
            raise KeyboardInterrupt

    def states(**options: Any) -> Any:
        steps.clear()
        return Bench(model, path.parent, progress, options=options).states(opened, profile).rows

    with load(model, context=CHUNK, threads=1) as opened:
        expected, stops = collect_states(opened, profile, None, tmp_path / "s.bin", silent).rows, True
        with pytest.raises(KeyboardInterrupt):
            states()
        stops = False
        assert np.array_equal(states(), expected) and len(steps) == 5, "three of eight chunks were there"
        assert np.array_equal(states(), expected) and not steps
        os.truncate(path, 1000)
        with pytest.raises(StorageError, match="gone, or cut short; collect it anew"):
            States(profile, profile.layers, path)
        assert np.array_equal(states(), expected) and len(steps) == 8
        path.unlink()
        assert np.array_equal(states(), expected) and len(steps) == 8
        states(activations="f32")
        assert len(steps) == 8, "made otherwise, they count for nothing"

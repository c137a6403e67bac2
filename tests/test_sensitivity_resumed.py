"""Measuring sensitivity and trying experts alone: interrupted, both go on; under other settings, they begin anew."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert import edgemoe, quantising
from edgert.chosen_bits import lines
from edgert.experts.profile import Profile, Sensitivity
from edgert.goal import Goal
from edgert.model import load
from edgert.pack import pack
from edgert.pack_bits import Request, pack_bits
from edgert.profiling import profile_model
from edgert.quantising import Bench, measure_sensitivity, weights_of
from edgert.tile_store import TileStore
from edgert.trial import Trial
from edgert.weights import silent
from tests import tiny_moe

OPTIONS = {"context": 64, "threads": 1}
TRYING, COSTS, ALONE = "trying formats", "measuring what each layer's errors cost", "one expert at a time"


class Steps(list[str]):
    """Progress that keeps what it is told, and stops after so many of one stage."""

    def __init__(self, stage: str = "", most: int = 0) -> None:
        super().__init__()
        self.stage, self.most = stage, most

    def __call__(self, stage: str, fraction: float) -> None:
        self.append(stage)
        if self.stage and self.count_of(self.stage) > self.most:
            raise KeyboardInterrupt

    def count_of(self, stage: str) -> int:
        """How often this was told."""
        return sum(one.startswith(stage) for one in self)


@pytest.fixture(autouse=True)
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is called at every step, and few formats are tried."""
    monkeypatch.setattr("edgert.pack_meter._REPORT_S", 0.0)
    monkeypatch.setattr(quantising, "CANDIDATES", ("int3", "int8"))
    monkeypatch.setattr(quantising, "_TRIAL_CHUNKS", 2)
    monkeypatch.setattr(edgemoe, "_CHUNKS", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.write(tmp_path_factory.mktemp("m") / "tiny.gguf")


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    corpus = model.with_name("text.txt")
    corpus.write_text(tiny_moe.text(8_000, 1))
    out = model.with_name("p.npz")
    return profile_model(model, out, corpora=[corpus], n_tokens=512, progress=Steps(), **OPTIONS).profile


def sensitivity(model: Path, profile: Profile, work: Path, steps: Steps) -> Sensitivity:
    return measure_sensitivity(Bench(model, work, steps, options=OPTIONS), profile, "rtn")


def test_errors_and_gains_are_kept_one_by_one_and_for_the_same_formats_and_method_alone(
    model: Path, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_experts, n_layers = int((profile.record_bytes > 0).sum()), len(profile.layers)
    steps = Steps()
    expected = sensitivity(model, profile, tmp_path / "whole", steps)
    assert (steps.count_of(TRYING), steps.count_of(COSTS)) == (n_experts, n_layers)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, profile, tmp_path / "w", Steps(COSTS, 1))
    steps = Steps()
    found = sensitivity(model, profile, tmp_path / "w", steps)
    assert (steps.count_of(TRYING), steps.count_of(COSTS)) == (0, n_layers - 1)
    assert np.array_equal(found.errors, expected.errors) and np.array_equal(found.gains, expected.gains)
    monkeypatch.setattr(quantising, "CANDIDATES", ("int8", "int3"))
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, profile, tmp_path / "w", Steps(TRYING, 0))
    bench = Bench(model, tmp_path / "w", Steps())
    bench.store("s", profile).put_array("a", np.ones(3))
    assert np.array_equal(bench.store("s", profile).array("a"), np.ones(3))
    monkeypatch.setattr(quantising, "METHOD", 0)
    assert bench.store("s", profile).array("a") is None


def test_experts_tried_alone_are_kept_one_by_one(model: Path, profile: Profile, tmp_path: Path) -> None:
    def alone(work: Path, steps: Steps, every: int = 1) -> Any:
        bench = Bench(model, work, steps, options=OPTIONS)
        store = TileStore(work / "tiles", "rtn")
        with load(model, **OPTIONS) as opened, Trial(opened) as trial:
            states = bench.states(opened, profile)
            return edgemoe.try_alone(bench, weights_of(opened), states, profile, store, trial, "rtn", every)

    expected = alone(tmp_path / "whole", whole := Steps())
    with suppress(KeyboardInterrupt):
        alone(tmp_path / "w", Steps(ALONE, 2))
    found = alone(tmp_path / "w", rest := Steps())
    assert rest.count_of(ALONE) == whole.count_of(ALONE) - 3
    assert np.array_equal(found.loss, expected.loss, equal_nan=True)
    assert np.array_equal(found.kl, expected.kl, equal_nan=True) and np.nanmax(found.kl) > 0
    half = alone(tmp_path / "half", Steps(), 2)
    tried = np.isfinite(half.kl)
    assert tried.any(axis=1).all() and tried.sum() < np.isfinite(expected.kl).sum()
    assert np.array_equal(half.kl[tried], expected.kl[tried])


def test_what_cannot_be_measured_is_taken_to_be_alike_and_says_so(
    model: Path, profile: Profile, tmp_path: Path
) -> None:
    resident, steps = sensitivity(model, profile, tmp_path / "w", Steps()), Steps()
    pack(model, packed := tmp_path / "tiny.edge", progress=silent)
    bench = Bench(packed, tmp_path / "streamed", steps, options={**OPTIONS, "residency": "60%"})
    streamed = measure_sensitivity(bench, profile, "rtn")
    assert resident.is_measured and not streamed.is_measured and np.isfinite(streamed.loss()).all()
    assert steps.count_of("not all experts are in RAM") == 1
    assert np.array_equal(streamed.errors, resident.errors) and np.array_equal(streamed.rows, resident.rows)
    goal = Goal(bits_per_weight=4.5, quantiser="rtn")
    for found, said in ((resident, False), (streamed, True)):
        request = Request(
            model, tmp_path / f"{said}.edge", profile.with_sensitivity(found), goal, options={"context": 256}
        )
        assert any(line.startswith("assumed: ") for line in lines(pack_bits(request, silent).bits)) == said

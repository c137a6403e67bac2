"""Packing as EdgeMoE does and for speed, end to end: text of the model's own, for of that quantising can only lose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert import memory
from edgert import pack_bits as pack_bits_module
from edgert.allocating import Problem
from edgert.architectures import read_config
from edgert.bits import PROJECTIONS, hot_format
from edgert.divergence import Rise
from edgert.errors import MemoryLimitError, OptionError
from edgert.experts.profile import Profile, Sensitivity
from edgert.goal import Goal
from edgert.needs import needs
from edgert.pack_bits import PackedBits, Request, pack_bits, work_of
from edgert.profiling import profile_model
from edgert.proof import Proof
from edgert.quant import jit
from edgert.quant.formats import FORMATS
from edgert.quantising import profile_counts
from edgert.requantised import Bytes, RequantisedSource
from edgert.storage.bundle import read_manifest
from edgert.storage.gguf_file import GgufFile
from edgert.tier import tier_for
from edgert.weights import Weights, silent
from tests import tiny_moe

OPTIONS: dict[str, Any] = {"context": 128, "threads": 1}
LARGER = replace(tiny_moe.SIZES, d_model=256, d_expert=256, n_expert=24)  # so that experts are more than read buffers
WIDER = ("int4", "int5-g64", "int6-g64", "int8-g64")


def profiled(model: Path) -> Profile:
    """A profile of text that the model writes itself, without sensitivity; half of the text is kept back."""
    out = model.with_name("profile.npz")
    return profile_model(model, out, n_tokens=2048, held_out=0.5, progress=silent, **OPTIONS).profile


def pack(model: Path, out: Path, profile: Profile, goal: Goal) -> PackedBits:
    return pack_bits(Request(model, out, profile, goal, options=OPTIONS), silent)


def keeps(found: PackedBits, bound: float) -> bool:
    """Whether the rise that was measured is within the bound, as far as its standard error can tell."""
    return found.proof.comparison.increase <= bound + found.proof.comparison.standard_error


def formats_in_use(bundle: Path) -> set[tuple[str, ...]]:
    """Formats of gate, up and down that experts of a bundle have."""
    manifest = read_manifest(bundle)
    kinds = np.unique(manifest.record_kind)
    return {tuple(part.format.name for part in manifest.kinds[kind]) for kind in kinds.tolist()}


def sensitivity(profile: Profile) -> Sensitivity:
    """Errors that fall fourfold with each bit, the same for all experts."""
    rows = profile_counts(profile).astype(np.int32)
    bits = np.array([8 * FORMATS[name].matrix_bytes(256, 256) / 256**2 for name in WIDER])
    errors = np.broadcast_to(4.0**-bits, (*rows.shape, len(PROJECTIONS), len(WIDER))).astype(np.float32)
    return Sensitivity("rtn", WIDER, errors, rows, np.full(len(rows), 2.0, np.float32), profile.n_tokens)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile]:
    """A model of 9 million weights in experts, and its profile."""
    model = tiny_moe.write(tmp_path_factory.mktemp("larger") / "larger.gguf", sizes=LARGER)
    profile = profiled(model)
    return model, profile.with_sensitivity(sensitivity(profile))


# ---- EdgeMoE's two widths --------------------------------------------------------------------------------------------
def test_edgemoe_gives_two_bits_to_as_many_experts_as_the_bound_lets_it(tmp_path: Path) -> None:
    model = tiny_moe.write(tmp_path / "tiny.gguf")
    profile = profiled(model)
    goal = Goal(loss=0.24, method="edgemoe", quantiser="rtn")  # with all of four bits it is 0.06, of two 0.54
    found = pack(model, tmp_path / "m.edge", profile, goal)
    assert keeps(found, 0.24)
    assert formats_in_use(tmp_path / "m.edge") == {("int4",) * 3, ("int2",) * 3}  # an expert has one width
    assert 2.5 < found.bits["bits_per_weight"] < 4.5
    with pytest.raises(OptionError, match="base width"):
        pack(model, tmp_path / "n.edge", profile, replace(goal, loss=1e-4))
    assert not (tmp_path / "n.edge").exists()


# ---- proofs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "bound"), [("optimal", 0.02), ("edgemoe", 0.1)])
def test_where_the_proof_is_missed_though_the_choosing_text_gains_bits_are_raised(
    method: str, bound: float, tmp_path: Path, larger: tuple[Path, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where noise helps on one text and not on the other: what was proved says how far to go back."""
    model, profile = larger
    proved, prove = list[float](), pack_bits_module.prove

    def noted(*parts: Any, **options: Any) -> Proof:
        proof = prove(*parts, **options)
        proved.append(proof.comparison.increase)
        return proof

    monkeypatch.setattr(pack_bits_module, "rise", lambda before, after: Rise(-0.01, 0.001))
    monkeypatch.setattr(pack_bits_module, "prove", noted)
    found = pack(model, tmp_path / "m.edge", profile, Goal(loss=bound, method=method, quantiser="rtn"))
    assert keeps(found, bound)
    assert 1 < len(proved) <= 3 and len(set(proved)) == len(proved), proved
    assert proved[0] > bound and proved[-1] == min(proved)


# ---- speed -----------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def no_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models meet their own floors, as large ones do, not that of a process that starts."""
    monkeypatch.setattr(memory, "STARTING_BYTES", 0)


def budgets(model: Path, profile: Profile) -> tuple[int, int]:
    """The floor of the smallest bundle, and what holds all of its experts, in bytes; with its kernels compiled."""
    with smallest(model, profile) as weights:
        found = replace(needs(weights, OPTIONS["context"], "f16"), compiling=False)
    return found.floor().total, found.plan(min(found.work)).total


@contextlib.contextmanager
def smallest(model: Path, profile: Profile) -> Iterator[Weights]:
    """The weights of the smallest bundle, not to be read."""

    def unread(*_: Any) -> Bytes:
        raise AssertionError("weights are read")

    assert profile.sensitivity is not None
    with contextlib.closing(GgufFile.open(model)) as file:
        config = read_config(file.metadata, str(model))
        bits = Problem(profile.sensitivity, config, hot_format(8)).smallest().bits
        yield Weights(file, config, source=RequantisedSource(file, bits, unread))


def test_bits_for_speed_keep_the_bound_and_stream(tmp_path: Path, larger: tuple[Path, Profile]) -> None:
    model, profile = larger
    floor, whole = budgets(model, profile)
    assert floor < whole, "reading from flash takes more than it spares"
    goal = Goal(loss=0.25, objective="speed", memory=(floor + whole) // 2, quantiser="rtn")
    found = pack(model, tmp_path / "m.edge", profile, goal)
    assert keeps(found, 0.25) and found.bits["asked"]["objective"] == "speed"
    assert {name for names in formats_in_use(tmp_path / "m.edge") for name in names} <= set(WIDER)
    ids = list(range(5, 60))
    with edgert.load(tmp_path / "m.edge", **OPTIONS) as resident:
        expected = resident.logits(ids)
    with edgert.load(tmp_path / "m.edge", **OPTIONS, residency="50%") as streamed:
        assert np.array_equal(streamed.logits(ids), expected)


@pytest.mark.parametrize(("compiled", "kv_type"), [(True, "f16"), (False, "f16"), (True, "f32")])
def test_room_for_the_compiler_is_not_taken_off_the_buffer(
    compiled: bool, kv_type: str, tmp_path: Path, larger: tuple[Path, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "is_compiled", lambda kernel: compiled)
    budget = sum(budgets(*larger)) // 2
    with smallest(*larger) as weights:
        tier, _ = tier_for(weights, budget, tmp_path, OPTIONS["context"], kv_type, most=1 << 40)
        needed = replace(needs(weights, OPTIONS["context"], kv_type), compiling=False)
    assert needed.plan(min(needed.work), tier.buffer_bytes).total <= budget
    assert needed.plan(min(needed.work), tier.buffer_bytes + needed.record).total > budget


def test_bits_are_chosen_for_speed_where_all_of_the_fewest_bits_fit_and_those_within_the_loss_do_not(
    tmp_path: Path, larger: tuple[Path, Profile]
) -> None:
    model, profile = larger
    _, whole = budgets(model, profile)
    with smallest(model, profile) as weights:
        needed = replace(needs(weights, OPTIONS["context"], "f16"), compiling=False)
        tier, _ = tier_for(weights, whole + 4096, tmp_path, OPTIONS["context"], most=1 << 40)
    assert tier.whole_bytes == needed.cold + 4096
    assert tier.buffer_bytes <= tier.whole_bytes - needed.buffers, "reading takes room too"
    goal = Goal(loss=0.05, objective="speed", memory=whole + 4096, quantiser="rtn")
    found = pack(model, tmp_path / "m.edge", profile, goal)
    assert keeps(found, 0.05)
    assert read_manifest(tmp_path / "m.edge").expert_bytes > tier.whole_bytes, "it reads"


def test_speed_is_refused_at_once_where_all_experts_fit_and_where_nothing_runs(
    tmp_path: Path, larger: tuple[Path, Profile]
) -> None:
    (model, profile), out = larger, tmp_path / "m.edge"
    floor, whole = budgets(model, profile)
    for budget, error, words in (
        (16 * whole, OptionError, "all experts fit --memory .* in any format.* leave --objective speed away"),
        (floor - (1 << 20), MemoryLimitError, "below this model's floor"),
    ):
        with pytest.raises(error, match=words):
            goal = Goal(loss=0.1, objective="speed", memory=budget, quantiser="rtn")
            pack(model, out, profile, goal)
        assert not out.exists() and not work_of(out).exists()

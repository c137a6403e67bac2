"""What a pack is asked for, and what lies there already: work of other requests, another model's profile, limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgert import pack_bits as pack_bits_module
from edgert import pack_request
from edgert.cli.app import app
from edgert.describing import describe
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.pack import pack_model
from edgert.pack_bits import PackedBits, Request, pack_bits
from edgert.profiling import profile_model
from edgert.storage.bundle import read_manifest
from edgert.weights import silent
from edgert.work_folder import work_of
from tests import tiny_moe

RUN = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_moe.write(place / "tiny.gguf")


def profiled(model: Path, name: str, seed: int) -> Profile:
    """A profile of random text, without sensitivity."""
    corpus = model.with_name(f"{name}.txt")
    corpus.write_text(tiny_moe.text(9000, seed))
    options: dict[str, Any] = {"n_tokens": 1024, "held_out": 0.3, "progress": silent, "context": 128}
    return profile_model(model, model.with_name(f"{name}.npz"), corpora=[corpus], **options).profile


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    return profiled(model, "first", 1)


def pack(model: Path, out: Path, profile: Profile, quantiser: str = "gptq") -> PackedBits:
    goal = Goal(format="int3", quantiser=quantiser)
    return pack_bits(Request(model, out, profile, goal, options={"context": 128}), silent)


@pytest.mark.parametrize(("other", "quantiser"), [(False, "rtn"), (True, "gptq"), (False, "gptq")])
def test_a_pack_that_was_stopped_at_its_proof_is_not_gone_on_with_for_other_weights_in_the_same_formats(
    tmp_path: Path, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch, other: bool, quantiser: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out, second = tmp_path / "m.edge", profiled(model, "second", 2) if other else profile
    with monkeypatch.context() as patched:
        patched.setattr(pack_bits_module, "prove", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(model, out, profile)
    stopped = (tmp_path / "m.edge.part" / "experts.bin").read_bytes()
    found, clean = pack(model, out, second, quantiser), pack(model, tmp_path / "clean.edge", second, quantiser)
    made = (out / "experts.bin").read_bytes()
    assert made == (tmp_path / "clean.edge" / "experts.bin").read_bytes()
    assert found.proof.comparison == clean.proof.comparison
    same = not other and quantiser == "gptq"
    assert (made == stopped) == same == bool(found.packed.resumed)


def refused(*words: object) -> str:
    result = RUN.invoke(app, ["pack", *map(str, words), "--context", "128"], env={"COLUMNS": "400"})
    assert result.exit_code == 2, result.output
    return result.output


def test_what_no_profile_would_help_is_refused_before_one_is_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_request, "profile_model", None)  # called, it would be no OptionError
    out, text = tmp_path / "m.edge", tmp_path / "short.txt"
    text.write_text("too little")
    said = refused(model, out, "--size", "20KiB")
    assert "--size 20,480B is too small" in said and "B or more, and room for the profile that is to be made" in said
    assert "--size 1.6bpw is below" in refused(model, out, "--size", "1.6bpw")
    assert "short.txt has 0 chunks of 128 tokens" in refused(model, out, "--loss", "2%", "--proof", text)
    speed = "--loss", "2%", "--objective", "speed", "--memory"
    assert "1MiB" in refused(model, out, *speed, "1MiB")
    assert "all experts fit --memory" in refused(model, out, *speed, "1GiB")
    bundle = pack_model(model, tmp_path / "b.edge", progress=silent).path
    assert "is a bundle already" in refused(bundle, out, "--size", "3bpw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.edge", "short.txt"]


def test_a_profile_of_another_model_that_lies_beside_the_bundle_is_named(
    tmp_path: Path, model: Path, profile: Profile
) -> None:
    other, beside = tiny_moe.write(tmp_path / "other.gguf", seed=6), tmp_path / "m.profile.npz"
    profile.save(beside)
    said = refused(other, tmp_path / "m.edge", "--format", "int4")
    assert f"{beside}, taken as no profile was given, is of another model than {other}" in said
    assert "remove it, or give --profile FILE" in said
    assert "the profile is of another model" in refused(other, "--format", "int4", "--profile", beside)


def test_what_chooses_bits_proves_nothing(model: Path, profile: Profile) -> None:
    kept = profile.domains[0].held_out.reshape(-1, profile.chunk)
    fresh = np.random.default_rng(3).integers(0, 4000, (19, profile.chunk)).tolist()
    chunks = [*fresh, kept[1].tolist()]
    chosen = pack_request.proof_text(profile, chunks, "a.txt", selects=True)
    assert chosen.prove == fresh and chosen.name.startswith("a.txt, without 1 chunk that bits were calibrated on or")
    assert pack_request.proof_text(profile, chunks, "a.txt", selects=False).prove == chunks


def test_work_that_a_pack_with_other_bits_left_is_named(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "m.edge"
    work_of(out).mkdir()
    result = RUN.invoke(app, ["pack", str(model), str(out)], env={"COLUMNS": "400"})
    assert result.exit_code == 0 and f"{work_of(out)} is left of a pack with bits of its own" in result.output


def test_a_table_that_is_the_head_too_counts_once(tmp_path: Path, model: Path, profile: Profile) -> None:
    out = tmp_path / "m.edge"
    pack(model, out, replace(profile))
    assert describe(out)["parameters"] == describe(model)["parameters"]
    assert read_manifest(out).model["tied"] is True

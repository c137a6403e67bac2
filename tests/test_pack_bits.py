"""Packing with bits chosen per expert, end to end on a tiny model: sizes and losses kept, proved, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import edgert
from edgert import pack_bits as pack_bits_module
from edgert.cli.app import app
from edgert.errors import OptionError
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.pack_bits import PackedBits, Request, pack_bits
from edgert.profiling import profile_model
from edgert.quantising import Bench, measure_sensitivity
from edgert.storage.bundle import PROFILE, Bundle, read_manifest
from edgert.weights import silent
from edgert.work_folder import work_of
from tests import tiny_moe

RUN = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bits")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_moe.write(place / "tiny.gguf")


@pytest.fixture(scope="module")
def profile(place: Path, model: Path) -> Profile:
    """A profile with sensitivity, of text that takes a second."""
    corpus = place / "text.txt"
    corpus.write_text(tiny_moe.text(12_000, 1))
    found = profile_model(
        model, place / "plain.npz", corpora=[corpus], n_tokens=2048, held_out=0.3, progress=silent, context=128
    ).profile
    bench = Bench(model, place / "sensitivity.work", silent, options={"context": 128})
    found = found.with_sensitivity(measure_sensitivity(bench, found))
    found.save(place / "profile.npz")
    return found


def pack(model: Path, out: Path, profile: Profile, goal: Goal, **others: Any) -> PackedBits:
    return pack_bits(Request(model, out, profile, goal, options={"context": 128}, **others), silent)


def test_what_is_measured_exactly_is_measured_on_the_cpu(model: Path, place: Path) -> None:
    """Devices that round activations to integers would refuse, after hours of quantising."""
    bench = Bench(model, place / "exact.work", silent, options={"context": 128, "device": "onnx:cpu+qdq"})
    with bench.model(exact=True) as exact:
        assert exact.logits([1, 2, 3]).shape[0] == 3


def test_sensitivity_falls_with_bits_and_gains_are_of_layers_that_have_experts(profile: Profile) -> None:
    found = profile.sensitivity
    assert found is not None and (found.gains > 0).all()
    place = [found.formats.index(name) for name in ("int2", "int3", "int4", "int8-g64")]
    mean = found.errors[found.rows > 0].mean(axis=(0, 1))[place]
    assert (mean[1:] < mean[:-1]).all() and mean[-1] < mean[0] / 100
    assert found.rows.sum() == profile.n_tokens * profile.top_k * profile.n_layers


def test_a_size_is_kept_and_the_bundle_answers_as_it_was_measured(
    tmp_path: Path, model: Path, profile: Profile
) -> None:
    found = pack(model, tmp_path / "m.edge", profile, Goal(bits_per_weight=3.5))
    assert found.bits["bits_per_weight"] <= 3.5
    comparison = found.proof.comparison
    with edgert.load(tmp_path / "m.edge", context=128) as bundle, edgert.load(model, context=128) as source:
        chunks = np.concatenate([domain.held_out for domain in profile.domains]).reshape(-1, profile.chunk)
        from edgert.divergence import compare

        assert compare(source, bundle, chunks.tolist()) == comparison
    manifest = read_manifest(tmp_path / "m.edge")
    assert manifest.proof["increase"] == comparison.increase and manifest.bits == found.bits
    assert len({kind for kind in manifest.record_kind.reshape(-1).tolist()}) > 1  # experts differ
    assert Profile.load(tmp_path / "m.edge" / PROFILE).digest == profile.digest
    assert not work_of(tmp_path / "m.edge").exists()


def test_more_bits_lose_less(tmp_path: Path, model: Path, profile: Profile) -> None:
    kl = []
    for bits in (2.5, 3.5, 5.0):
        found = pack(model, tmp_path / f"{bits}.edge", profile, Goal(bits_per_weight=bits))
        kl.append(found.proof.comparison.kl)
    assert kl == sorted(kl, reverse=True)


def test_mixed_bits_lose_less_than_the_same_bits_for_all(tmp_path: Path, model: Path, profile: Profile) -> None:
    uniform = pack(model, tmp_path / "u.edge", profile, Goal(format="int3"))
    size = uniform.bits["bits_per_weight"]
    mixed = pack(model, tmp_path / "m.edge", profile, Goal(bits_per_weight=size))
    assert mixed.bits["bytes"] <= uniform.bits["bytes"]
    assert mixed.proof.comparison.kl < uniform.proof.comparison.kl


def test_a_bound_on_the_loss_holds_and_what_is_there_is_left(tmp_path: Path, model: Path, profile: Profile) -> None:
    goal, out = Goal(loss=0.02), tmp_path / "m.edge"
    found = pack(model, out, profile, goal)
    comparison = found.proof.comparison
    assert comparison.increase <= 0.02 + comparison.standard_error and "not chosen by" in found.proof.text
    before = (out / "manifest.json").stat()
    again = pack(model, out, profile, goal)
    assert again.proof == found.proof and again.packed.written == 0 and again.bits == found.bits
    assert (out / "manifest.json").stat().st_ino == before.st_ino
    assert pack(model, tmp_path / "n.edge", profile, Goal(loss=0.2)).bits["bytes"] < found.bits["bytes"]


def test_a_bundle_of_a_size_is_not_larger(
    tmp_path: Path, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.edge"
    monkeypatch.setattr(pack_bits_module, "measure_sensitivity", lambda *_: profile.sensitivity)  # it takes a minute
    small = pack(model, tmp_path / "s.edge", profile.with_sensitivity(None), Goal(bits_per_weight=2.7)).packed.n_bytes
    measured = Profile.load(tmp_path / "s.edge" / PROFILE).sensitivity
    assert measured is not None and np.array_equal(measured.errors, profile.sensitivity.errors)  # type: ignore[union-attr]
    limit = small + 20_000
    found = pack(model, out, profile, Goal(n_bytes=limit))
    assert sum(file.stat().st_size for file in out.iterdir()) == found.packed.n_bytes <= limit
    with pytest.raises(OptionError, match=r"bytes at least, .* of them experts"):
        pack(model, tmp_path / "n.edge", profile, Goal(n_bytes=100_000))
    assert not (tmp_path / "n.edge").exists()


def test_a_size_that_is_too_small_is_refused_before_anything_is_measured_and_the_named_one_does(
    tmp_path: Path, model: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.edge"
    with pytest.raises(OptionError, match=r"use --size \d+B or more") as refused:
        pack(model, out, profile.with_sensitivity(None), Goal(n_bytes=1000))
    named = int(str(refused.value).split()[-3][:-1])
    monkeypatch.setattr(pack_bits_module, "measure_sensitivity", lambda *_: pytest.fail("it is measured"))
    with pytest.raises(OptionError, match=f"{named - 1:,}B is too small: the bundle takes {named:,} bytes"):
        pack(model, out, profile.with_sensitivity(None), Goal(n_bytes=named - 1))
    assert not work_of(out).exists()
    monkeypatch.setattr(pack_bits_module, "measure_sensitivity", lambda *_: profile.sensitivity)
    found = pack(model, out, profile.with_sensitivity(None), Goal(n_bytes=named))
    assert named - 20_000 < found.packed.n_bytes <= named


def test_a_bound_that_eight_bits_miss_is_refused_with_the_figures(
    tmp_path: Path, model: Path, profile: Profile
) -> None:
    """Of what the model itself writes it is the best judge: there any change raises perplexity."""
    own = profile_model(model, tmp_path / "own.npz", n_tokens=2048, held_out=0.5, progress=silent, context=128).profile
    with pytest.raises(OptionError, match=r"cannot be reached.*bits: "):
        pack(model, tmp_path / "m.edge", own.with_sensitivity(profile.sensitivity), Goal(loss=1e-9, hot=4))
    assert not (tmp_path / "m.edge").exists()


def test_a_profile_of_another_model_is_refused(tmp_path: Path, profile: Profile) -> None:
    other = tiny_moe.write(tmp_path / "other.gguf", seed=6)
    with pytest.raises(OptionError, match="another model"):
        pack(other, tmp_path / "m.edge", profile, Goal(bits_per_weight=4.0))


def test_streamed_answers_are_those_with_all_experts_in_ram(tmp_path: Path, model: Path, profile: Profile) -> None:
    pack(model, tmp_path / "m.edge", profile, Goal(bits_per_weight=3.3))
    ids = list(range(5, 60))
    with edgert.load(tmp_path / "m.edge", context=128) as resident:
        expected = resident.logits(ids)
    with edgert.load(tmp_path / "m.edge", context=128, residency="40%") as streamed:
        assert np.array_equal(streamed.logits(ids), expected)


def test_a_killed_pack_goes_on_to_the_same_bytes(tmp_path: Path, model: Path, place: Path, profile: Profile) -> None:
    whole, out = tmp_path / "whole.edge", tmp_path / "killed.edge"
    pack(model, whole, profile, Goal(bits_per_weight=3.0))
    command = [sys.executable, "-c", "from edgert.cli.main import main; main()", "pack", str(model), str(out)]
    command += ["--size", "3.0bpw", "--profile", str(place / "profile.npz"), "--context", "128"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    tiles, deadline = work_of(out) / "tiles-gptq", time.monotonic() + 120

    def kept() -> list[Path]:
        found = tiles.iterdir() if tiles.is_dir() else ()
        return [path for path in found if path.name != "header.json" and not path.name.endswith(".part")]

    while len(kept()) < 3 and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL and not out.exists() and work_of(out).exists()
    assert len(kept()) >= 3
    pack(model, out, profile, Goal(bits_per_weight=3.0))
    assert (out / "experts.bin").read_bytes() == (whole / "experts.bin").read_bytes()


def test_what_the_command_prints(tmp_path: Path, model: Path, place: Path, profile: Profile) -> None:
    out, dialogue = tmp_path / "m.edge", tmp_path / "d.jsonl"
    dialogue.write_text('{"messages": [{"role": "user", "content": "geese"}]}')
    words = ["pack", str(model), str(out), "--profile", str(place / "profile.npz"), "--context", "128"]
    result = RUN.invoke(app, [*words, "--size", "4bpw"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "bits per weight" in result.stdout and "perplexity" in result.stdout and "+/-" in result.stdout
    result = RUN.invoke(app, [*words, "--size", "4bpw", "--json"], catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["bits"]["bits_per_weight"] <= 4 and document["written"] == 0
    with Bundle.open(out) as bundle:
        assert bundle.manifest.proof["n_chunks"] > 1
    for extra, message in (
        (["--loss", "2%", "--size", "3bpw"], "either"),
        (["--profile", str(model), "--size", "4bpw"], "not a profile"),
        (["--hot", "8"], "--loss 2%"),
        (["--hot", "0"], "--hot is for choosing bits: add --loss 2%"),
        (["--loss", "2%", "--proof", str(tmp_path / "absent.txt")], "absent.txt"),
        ([*words[3:], "--loss", "2%", "--proof", str(dialogue)], "d.jsonl has 0 chunks of 128 tokens"),
    ):
        result = RUN.invoke(app, ["pack", str(model), str(tmp_path / "other.edge"), *extra])
        assert result.exit_code != 0 and message in result.output.replace("\n", " "), result.output


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OptionError("cannot be reached")])
def test_where_a_pack_that_ends_early_keeps_what_is_done_is_said(
    error: BaseException, tmp_path: Path, model: Path, place: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_early(request: Request, progress: Any) -> PackedBits:
        for path in folders:
            path.mkdir()
        raise error

    out, folders = tmp_path / "m.edge", [tmp_path / "m.edge.work", tmp_path / "m.edge.part"]
    monkeypatch.setattr(pack_bits_module, "pack_bits", end_early)
    words = ["pack", str(model), str(out), "--profile", str(place / "profile.npz"), "--loss", "2%"]
    result = RUN.invoke(app, words, env={"COLUMNS": "400"})
    said = f"what is done is kept in {folders[0]} and {folders[1]}: pack again to go on, or remove them\n"
    assert result.exit_code != 0 and said in result.output, result.output
    assert ("stopped; what" in result.output) == isinstance(error, KeyboardInterrupt)


@pytest.mark.parametrize("words", [["--loss", "2%"], ["--format", "int4"]])
def test_an_unknown_quantiser_is_refused_before_the_model_is_looked_for(tmp_path: Path, words: list[str]) -> None:
    result = RUN.invoke(app, ["pack", str(tmp_path / "absent.gguf"), *words, "--quantiser", "best"])
    assert result.exit_code == 2 and "--quantiser 'best' is not known; use one of rtn, hqq," in result.output

"""What a bundle is made with and compared with: its profile, its proof, and the goal of what is there already."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgert import load, pack_request
from edgert.cli.app import app
from edgert.errors import OptionError
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.pack import pack_model
from edgert.pack_bits import PackedBits, Request, pack_bits
from edgert.profiling import profile_model
from edgert.storage.bundle import CHOICE, PROFILE, read_manifest
from edgert.tier import flash_rate
from edgert.weights import silent
from edgert.work_folder import work_of
from tests import tiny_moe

RUN = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.write(tmp_path_factory.mktemp("bundles") / "tiny.gguf")


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    """A profile of one word again and again, to which not every expert is called, without sensitivity."""
    corpus = model.with_name("text.txt")
    corpus.write_text("geese " * 3000)
    found = profile_model(
        model, model.with_name("p.npz"), corpora=[corpus], n_tokens=512, held_out=0, progress=silent, context=128
    ).profile
    with load(model, context=128) as loaded:  # what is kept back must be no copy
        other = np.array(loaded.tokenizer.encode(tiny_moe.text(3000, 2))[: 5 * 128], np.int32)
    return replace(found, domains=(replace(found.domains[0], held_out=other),))


def pack(model: Path, out: Path, profile: Profile, goal: Goal, **others: Any) -> PackedBits:
    return pack_bits(Request(model, out, profile, goal, options={"context": 128}, **others), silent)


def run(*words: object) -> Any:
    return RUN.invoke(app, [str(word) for word in words])


def test_without_a_profile_one_is_made_and_kept(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_request, "_TOKENS", 512)
    monkeypatch.setattr(pack_request, "_HELD_OUT", 0.4)
    out, kept = tmp_path / "m.edge", tmp_path / "m.profile.npz"
    result = run("pack", model, out, "--format", "int4", "--context", 128)
    assert result.exit_code == 0, result.output
    assert Profile.load(kept).own_text and Profile.load(out / PROFILE).digest == Profile.load(kept).digest
    made = kept.stat()
    again = run("pack", model, out, "--format", "int4", "--context", 128)
    assert "packed already" in again.stdout and kept.stat().st_ino == made.st_ino


def test_a_profile_alone_goes_into_a_bundle_of_the_source_s_own_weights(
    tmp_path: Path, model: Path, profile: Profile
) -> None:
    plain, out = pack_model(model, tmp_path / "plain.edge", progress=silent).path, tmp_path / "m.edge"
    words = "pack", model, out, "--profile", model.with_name("p.npz")
    assert run(*words).exit_code == 0
    assert Profile.load(out / PROFILE).digest == profile.digest and (out / CHOICE).exists()
    assert (out / "experts.bin").read_bytes() == (plain / "experts.bin").read_bytes()
    assert not read_manifest(out).bits
    assert "packed already" in run(*words).stdout
    assert "packed already" in run("pack", model, out).stdout and (out / PROFILE).exists()
    assert "packed already" not in run(*words[:2], plain, *words[3:]).stdout and (plain / PROFILE).exists()
    other = tiny_moe.write(tmp_path / "other.gguf", seed=6)
    refused = run("pack", other, "--profile", model.with_name("p.npz"))
    assert refused.exit_code != 0 and "another model" in refused.output


def test_a_bundle_says_what_it_was_made_with_and_gives_way_to_no_other_goal(
    tmp_path: Path, model: Path, profile: Profile
) -> None:
    out, goal = tmp_path / "m.edge", Goal(format="int4-k")
    found = pack(model, out, profile, goal)
    unused = {
        str(layer): sorted({*range(profile.n_expert)} - {*profile.domains[0].ids[layer].ravel().tolist()})
        for layer in profile.layers
    }
    unused = {layer: experts for layer, experts in unused.items() if experts}
    assert unused and found.bits["never_routed"] == unused
    said = list(found.lines())
    assert any(
        line.startswith("never routed to in the profile's text: expert ") and "quantised knowing nothing" in line
        for line in said
    )
    assert "formats: gate and up are int4, down is int4: int4-k takes rows of a multiple of 256" in said
    again = pack(model, out, profile, goal)
    assert again.packed.written == 0 and list(again.lines()) == said  # the proof, too
    words = run("inspect", out).stdout
    assert "--format int4-k" in words and "never routed to" in words and profile.digest not in words
    assert json.loads(run("inspect", out, "--json").stdout)["bits"]["chosen"]["never_routed"] == unused

    for others in ([], ["--format", "int8"], ["--size", "3bpw"]):
        refused = run("pack", model, out, *others)
        assert refused.exit_code == 2 and "was packed with --format int4-k" in refused.output, refused.output
        assert "remove m.edge" in " ".join(refused.output.split())
    assert read_manifest(out).bits == found.bits

    text = tiny_moe.text(2000, 7)
    assert pack(model, out, profile, goal, text=text, text_name="a.txt").packed.written > 0
    assert pack(model, out, profile, goal, text=text, text_name="b.txt").packed.written == 0  # the same text
    shares = {"a": 1.0}
    renamed = replace(profile, domains=(replace(profile.domains[0], name="a"),), shares=shares)
    kept = replace(renamed, domains=(replace(renamed.domains[0], held_out=renamed.domains[0].held_out[:256]),))
    assert pack(model, out, kept, goal).proof.comparison.n_chunks == 2
    told: list[str] = []
    pack_bits(Request(model, out, profile, goal, options={"context": 128}), lambda stage, fraction: told.append(stage))
    assert "packing anew: with another profile, or proved on other text" in told


@pytest.mark.parametrize(
    ("goal", "n_held_out", "words"),
    [
        (Goal(format="int4"), 0, "kept back 0 chunks of 128 tokens, and it takes 2"),
        (Goal(format="int4"), 1, "kept back 1 chunk of 128 tokens, and it takes 2"),
        (Goal(loss=0.02), 3, "it takes 4 .half chooses, half proves"),
        (Goal(bits_per_weight=1.6), 3, r"--size 1.6bpw is below \d\.\d+bpw, .* at four bits.; use --size \d\.\d+bpw"),
        (Goal(n_bytes=100_000), 3, r"--size 100,000B is too small: the bundle takes [\d,]+ bytes at least"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, model: Path, profile: Profile, goal: Goal, n_held_out: int, words: str
) -> None:
    one, out = profile.domains[0], tmp_path / "m.edge"
    short = replace(profile, domains=(replace(one, held_out=one.held_out[: n_held_out * profile.chunk]),))
    with pytest.raises(OptionError, match=words):
        pack(model, out, short, goal)
    assert not work_of(out).exists() and not out.with_name("m.edge.part").exists()


def test_text_that_was_calibrated_on_is_no_proof(tmp_path: Path, model: Path, profile: Profile) -> None:
    text = model.with_name("text.txt").read_text()
    with pytest.raises(OptionError, match=r"text\.txt proves nothing"):
        pack(model, tmp_path / "m.edge", profile, Goal(format="int4"), text=text, text_name="text.txt")


def test_digests_tell_shares_and_sensitivity_apart(profile: Profile) -> None:
    from edgert.chosen_bits import profile_digest
    from edgert.experts.profile import Sensitivity

    shape = profile.record_bytes.shape
    found = Sensitivity(
        "gptq", ("int4",), np.ones((*shape, 3, 1), np.float32), np.ones(shape, np.int32), np.ones(2, np.float32), 8
    )
    known, two = profile.with_sensitivity(found), (profile.domains[0], replace(profile.domains[0], name="b"))
    digests = {
        profile_digest(one)
        for one in (
            profile,
            known,
            profile.with_sensitivity(replace(found, gains=2 * found.gains)),
            replace(profile, domains=two, shares={profile.domains[0].name: 0.5, "b": 0.5}),
            replace(profile, domains=two, shares={profile.domains[0].name: 0.7, "b": 0.3}),
        )
    }
    assert len(digests) == 5 and profile_digest(replace(known)) in digests


def test_how_bits_were_chosen_is_said_in_words_whatever_the_document_holds() -> None:
    from edgert.chosen_bits import asked_words, words

    asked = {**Goal(loss=0.02, objective="speed", memory=2 << 30).as_document(), "profile": "0f", "proof": "1e"}
    assert asked_words(asked) == "--loss 2% --objective speed --memory 2147483648B"
    assert asked_words({}) == "the source's own bits"
    unused = {"3": [1, 2], "4": [0, 5, 6, 7]}
    found = words({"asked": asked, "quantiser": "gptq", "hot": "", "never_routed": unused, "unknown": "so kept"})
    assert found == {
        "asked": "--loss 2% --objective speed --memory 2147483648B",
        "quantiser": "gptq",
        "hot weights": "as in the source",
        "never routed to in the profile's text": "expert 1 of layer 3, 2 of layer 3, 0 of layer 4, 5 of layer 4, 6 of "
        "layer 4 and 1 more, so kept",
    }
    assert words({"asked": 3, "quantiser": [], "hot": None, "never_routed": {"a": 7}, "instead": {}}) == {}


def test_a_rate_of_flash_that_was_never_measured_is_said_to_be_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rate, words = flash_rate(tmp_path, 1 << 20)
    assert rate == 1e9 and words.startswith("1,000 MB/s, a guess: ") and f"`edgert doctor {tmp_path}`" in words

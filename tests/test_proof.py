"""The proof of a bundle: measured, kept in the manifest, read back from what may be damaged, and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path

import edgert
from edgert import json_rate
from edgert.cli import inspect
from edgert.describing import describe
from edgert.divergence import Comparison
from edgert.errors import ModelFileError
from edgert.pack import pack
from edgert.proof import VALID_JSON, Proof, Score, check, prove
from edgert.storage import bundle_documents
from edgert.storage.bundle_manifest import Manifest, parse
from edgert.verify import verify

PROOF = Proof(
    "held-out text",
    Comparison(64, 16320, 26.06, 26.51, 0.0173, 0.0021, 0.0123, 0.11, 0.931),
    {VALID_JSON: Score(0.625, 0.5, 24), "everyday acc": Score(0.75, 0.73, 48)},
)
BITS = {"quantiser": "gptq", "asked": {"loss": 0.02}, "hot": "int8"}


def silent(stage: str, fraction: float) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(golden_path("olmoe-q4_0"), tmp_path_factory.mktemp("packed") / "m.edge", progress=silent)


def with_documents(bundle: Path, **documents: Any) -> Manifest:
    """The manifest of a bundle, with documents in it, written back."""
    manifest = parse((bundle / "manifest.json").read_bytes(), "m")
    for name, document in documents.items():
        setattr(manifest, name, document)
    (bundle / "manifest.json").write_text(manifest.as_text())
    return manifest


# ---- documents -------------------------------------------------------------------------------------------------------
def test_a_proof_comes_back_as_it_was() -> None:
    document = json.loads(json.dumps(PROOF.as_document()))
    assert Proof.from_document(document, "m") == PROOF
    assert Proof.from_document({**document, "scores": {}}, "m").scores == {}


def test_a_standard_error_that_leaves_the_bound_in_doubt_is_said() -> None:
    assert list(PROOF.lines(0.02)) == list(PROOF.lines()) == list(PROOF.lines(0.0042))
    *lines, last = PROOF.lines(0.004)
    assert lines == list(PROOF.lines())
    assert last == "unsure: a standard error of 0.21% says little of --loss 0.4%; prove on more text"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", 5),
        ("n_chunks", -1),
        ("n_tokens", 2.5),
        ("kl", "much"),
        ("increase", None),
        ("scores", [1]),
        ("scores", {"valid JSON": {"before": 1, "after": "x", "n": 3}}),
        ("scores", {"valid JSON": 3}),
    ],
)
def test_a_proof_that_is_none_is_refused_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=r"^m: ") as error:
        Proof.from_document({**PROOF.as_document(), key: value}, "m")
    assert "\n" not in str(error.value)


def test_a_manifest_keeps_documents_and_needs_none(packed: Path) -> None:
    before = (packed / "manifest.json").read_text()
    plain = parse(before.encode(), "m")
    assert plain.bits == plain.proof == {} and plain.as_text() == before
    plain.model = {}  # as older bundles have it
    older = parse(plain.as_text().encode(), "m")
    assert older.model == {} and '"model"' not in older.as_text() and older.tensors == plain.tensors
    kept = with_documents(packed, bits=BITS, proof=PROOF.as_document(), model={"digest": "abc"})
    found = parse((packed / "manifest.json").read_bytes(), "m")
    assert (found.bits, found.proof, found.model) == (BITS, PROOF.as_document(), {"digest": "abc"})
    assert found.content() == plain.content() == kept.content()  # the model is the same
    assert verify(packed, silent) == []
    (packed / "manifest.json").write_text(before)


def nested(depth: int) -> Any:
    return {} if depth == 1 else {"a": nested(depth - 1)}


def test_what_a_document_may_be() -> None:
    for sound in ({}, {"a": [1, 2.5, None, True, "é"]}, nested(8), {"many": [0] * 60000}):
        assert bundle_documents.problem(sound) == ""
    for wrong, words in (
        ([], "not an object"),
        (None, "not an object"),
        ({"a": math.nan}, "infinite or none"),
        ({"a": [1e400]}, "infinite or none"),
        ({"a": 1 << 64}, "too large"),
        ({"a": "\ud800"}, "no Unicode"),
        ({"a" * 70000: 1}, "too long"),
        (nested(9), "deeper"),
        ({"a": [[0] * 1000] * 100}, "more than"),
        ({"a": [0] * 70000}, "more than"),
    ):
        assert words in bundle_documents.problem(wrong), wrong


@pytest.mark.parametrize("document", [[], 3, {"a": math.nan}, nested(12), {"a": 1 << 70}])
def test_a_manifest_with_a_damaged_document_is_refused(packed: Path, document: Any) -> None:
    manifest = parse((packed / "manifest.json").read_bytes(), "m")
    manifest.proof = document or [1]
    with pytest.raises(ModelFileError, match='its "proof" is damaged'):
        parse(manifest.as_text().encode(), "m")


# ---- JSON ------------------------------------------------------------------------------------------------------------
def test_what_counts_as_json() -> None:
    for text in ("{}", '{"a": [1, {"b": null}]}', '{"a": 1} and so on', "{\n}"):
        assert json_rate.is_object(text), text
    for text in ("", "[1]", "{", '{"a": }', '{"a": NaN}', "{'a': 1}", '{"a": 1,}', "3", "{" * 5000, '{"a": ' * 5000):
        assert not json_rate.is_object(text), text


def test_a_chat_model_answers_in_json() -> None:
    with edgert.load(context=512) as model:
        said = json_rate.answer(model, json_rate.PROMPTS[0], edgert.Sampling())
        assert json_rate.is_object(said) and {"name", "age", "city"} <= json.loads(said).keys()


# ---- measured --------------------------------------------------------------------------------------------------------
def test_a_bundle_is_proved_against_its_source(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rate, "MOST_TOKENS", 3)
    monkeypatch.setattr(json_rate, "PROMPTS", json_rate.PROMPTS[:2])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the package's own test runs its tasks
    chunks = np.random.default_rng(0).integers(0, 300, (5, 40)).tolist()
    stages: list[str] = []
    with (
        edgert.load(golden_path("olmoe-q8_0"), context=512) as source,
        edgert.load(packed, context=512) as bundle,
        edgert.load(packed, context=512, residency="50%") as streamed,
    ):
        quick = prove(source, bundle, chunks, "noise", checks=False)
        assert quick.text == "noise" and quick.scores == {} and quick.comparison.kl > 0
        whole = prove(source, bundle, chunks, "noise", lambda stage, fraction: stages.append(stage))
        assert whole.comparison == quick.comparison
        assert whole.scores == {VALID_JSON: Score(0, 0, 4)}
        assert check(quick, source, bundle) == whole
        same = prove(bundle, streamed, chunks, "noise", checks=False).comparison
        assert (same.increase, same.standard_error, same.kl, same.top1) == (0, 0, 0, 1)
    assert any("perplexity +" in stage or "perplexity -" in stage for stage in stages) and "asking" in stages[-1]


# ---- shown -----------------------------------------------------------------------------------------------------------
def test_inspect_shows_bits_and_proof(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = describe(packed)
    assert plain["bits"]["formats"] == {"int4": 1} and plain["bits"]["widths"] == {"4 bits": 1}
    assert plain["bits"]["bits_per_weight"] == plain["bits"]["down"] == 4.5 and "proof" not in plain
    before = (packed / "manifest.json").read_text()
    with_documents(packed, bits=BITS, proof=PROOF.as_document())
    found = describe(packed)
    assert found["proof"] == PROOF.as_document() and found["bits"]["chosen"] == BITS
    assert json.loads(json.dumps(found)) == found
    inspect.show_model(found)
    out = capsys.readouterr().out
    for row in (
        "bits per weight 4.5",
        "widths 4 bits 100.0% ##############################",
        "chosen asked --loss 2%",
        "perplexity 26.060 -> 26.510 (+1.73% +/- 0.21%)",
        "text held-out text: 16,320 tokens of 64 chunks",
        "valid JSON 62.5% -> 50.0% of 24",
        "everyday acc 75.0% -> 73.0% of 48",
    ):
        assert row.split() in [line.split() for line in out.splitlines()], row
    with_documents(packed, proof={"text": 5})
    with pytest.raises(ModelFileError, match=r"its proof: the key"):
        describe(packed)
    (packed / "manifest.json").write_text(before)

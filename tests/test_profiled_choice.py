"""What a bundle brings of its profile: chosen by replay, found by loading, read before anybody asks; answers stay."""

from __future__ import annotations

import errno
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path
from streaming_models import Faulty
from test_topics import FLAT, N_EXPERT, N_LAYERS, SIZES, TOP_K, topical

import edgert
from edgert import streaming
from edgert.experts import choice, profiled_choice
from edgert.experts.choice import CHOICE, Found, as_bytes, choice_for
from edgert.experts.policies import POLICIES
from edgert.experts.predictors import Combined, Primed, path_table
from edgert.experts.profile import Domain, Profile
from edgert.experts.profiled_choice import bundle_choice, choice_bytes
from edgert.experts.topics import FAR, NEAR, TopicMap
from edgert.pack import pack
from edgert.storage.bundle import Bundle
from edgert.streaming import model_key

PROMPT = [(5 * i * i + 3) % 300 for i in range(40)]


def profile_of(*texts: np.ndarray) -> Profile:
    def domain(number: int, ids: np.ndarray) -> Domain:
        tokens = np.zeros(ids.shape[1], np.int32)
        return Domain(f"text {number}", tokens, tokens[:0], ids, np.ones(ids.shape, np.float16))

    moments = np.ones((N_LAYERS, N_EXPERT, 4), np.float32)
    return Profile(
        "m",
        "d",
        4,
        SIZES,
        tuple(domain(number, ids) for number, ids in enumerate(texts)),
        {f"text {number}": 1 / len(texts) for number in range(len(texts))},
        False,
        moments,
        moments,
        {},
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test, in which kernels are not looked for."""
    monkeypatch.setattr(choice, "choices_folder", lambda: tmp_path / "choices")
    return tmp_path / "choices"


def test_a_profile_becomes_a_choice_that_loading_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiled_choice, "_MOST_STEPS", 900)
    profile = profile_of(topical(900, 1), topical(700, 2))
    (tmp_path / CHOICE).write_bytes(bundle_choice(profile, SIZES))
    assert bundle_choice(profile, SIZES) == (tmp_path / CHOICE).read_bytes()
    assert (tmp_path / CHOICE).stat().st_size <= choice_bytes(SIZES)
    found = choice_for("m", 0.4, SIZES.shape, tmp_path)
    assert (
        found is not None and found.policy in POLICIES and set(found.topics) == {NEAR, FAR} and found.primed is not None
    )
    assert found.profile is not None and np.abs(found.profile - profile.frequency()).max() < 1e-4
    assert choice_for("another", 0.4, SIZES.shape, tmp_path) is None and choice_for("m", 0.4, SIZES.shape) is None


def test_the_users_own_choice_comes_first(tmp_path: Path) -> None:
    found = Found({0.5: "lfu"}, ("router",), FLAT, 10)
    (tmp_path / CHOICE).write_bytes(as_bytes("m", found))
    assert (choice_for("m", 0.5, SIZES.shape, tmp_path) or choice.Choice()).policy == "lfu"
    choice.save_choice("m", Found({0.5: "lru"}, ("router",), FLAT, 10))
    assert (choice_for("m", 0.5, SIZES.shape, tmp_path) or choice.Choice()).policy == "lru"


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"version":1,"model":"m","policies":3}']
)
def test_a_damaged_choice_in_a_bundle_counts_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CHOICE).write_bytes(content)
    assert choice_for("m", 0.5, SIZES.shape, tmp_path) is None


# ---- the predictors --------------------------------------------------------------------------------------------------
def learnt(texts: list[np.ndarray]) -> Combined:
    """Predictors that saw the texts token by token."""
    combined = Combined(N_LAYERS, N_EXPERT, TOP_K)
    for ids in texts:
        for token in range(ids.shape[1]):
            for layer in range(N_LAYERS):
                combined.routed(layer, ids[layer, token].astype(np.int64)[None], ())
    return combined


@pytest.mark.parametrize("pairs", [True, False])
def test_a_table_from_a_profile_is_what_learning_would_have_left(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pairs:
        monkeypatch.setattr("edgert.experts.predictors._PAIRS_BYTES", 0)
    texts = [topical(300, 1)[:, :250]]
    table = path_table(texts, SIZES > 0).astype(np.float64)
    slow = learnt(texts)._knowledge.table.astype(np.float64)
    assert table.shape == slow.shape
    rows = (slow[..., -1] > 8) & (table[..., -1] > 8)
    assert rows.sum() > 20
    ours, theirs = (t[rows][:, :-1] / t[rows][:, -1:] for t in (table, slow))
    assert np.abs(ours - theirs).mean() < 0.05


def test_primed_predictors_know_at_once_what_others_learn() -> None:
    def followed(n_tokens: int, seed: int) -> np.ndarray:  # the next layer uses the experts after these
        first = np.argsort(np.random.default_rng(seed).random((n_tokens, N_EXPERT)), axis=1)[:, :TOP_K]
        return np.stack([(first + layer) % N_EXPERT for layer in range(N_LAYERS)]).astype(np.uint8)

    primed = Primed(FLAT, path_table([followed(4000, 1)], SIZES > 0))
    found = {name: Combined(N_LAYERS, N_EXPERT, TOP_K, primed=of) for name, of in (("primed", primed), ("empty", None))}
    right, unseen = dict.fromkeys(found, 0), followed(30, 2)
    for token, layer in itertools.product(range(30), range(N_LAYERS)):
        ids = unseen[layer, token].astype(np.int64)
        for name, combined in found.items():
            if layer > 1:
                right[name] += len(set(np.argsort(-combined.chances(layer, 1))[:TOP_K]) & set(ids.tolist()))
            combined.routed(layer, ids[None], ())
    assert right["primed"] > 55 > 45 > right["empty"]  # of 60


def test_what_fits_another_model_primes_nothing() -> None:
    other = Primed(np.full((2, 2), 0.5, np.float32), np.ones((2, 4, 3), np.uint8))
    assert not Combined(N_LAYERS, N_EXPERT, TOP_K, primed=other)._knowledge.table.any()


# ---- loading ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 2 layers of 6 experts, of which a token uses 3, with a choice in it."""
    out = pack(golden_path("olmoe-q8_0"), tmp_path_factory.mktemp("b") / "m.edge", progress=lambda stage, part: None)
    with Bundle.open(out) as bundle:
        from edgert.architectures import read_config

        model, shape = model_key(bundle.metadata, read_config(bundle.metadata, "")), bundle.record_bytes.shape
    draw = np.random.default_rng(0)
    topics = TopicMap(*(draw.normal(size=size).astype(np.float32) for size in ((4,), shape, (*shape, 5), (*shape, 5))))
    profile = np.tile(np.linspace(0.9, 0.1, shape[1], dtype=np.float32), (shape[0], 1))
    found = Found({0.5: "topics"}, ("router",), profile, 10, {NEAR: topics}, path_table([], np.ones(shape, np.bool_)))
    (out / CHOICE).write_bytes(as_bytes(model, found))
    return out


def said(path: Path, **options: Any) -> tuple[Any, Any]:
    with edgert.load(path, context=256, **options) as model:
        answer = model.generate(PROMPT, max_tokens=40, logprobs=3)
        residency = model._open().engine.residency
        assert residency.check() == []
        return answer, residency


@pytest.mark.parametrize("wait", [True, False])
def test_a_bundle_with_a_choice_answers_as_ever(wait: bool, packed: Path) -> None:
    expected, _ = said(packed, residency=1.0)
    for mode in ("off", "always"):
        with edgert.load(packed, residency=0.6, prefetch=mode, context=256) as model:
            residency = model._open().engine.residency
            assert residency.policy.name == "topics" and len(residency.first) == 12
            if wait:
                wait_until(lambda: residency.buffer.reader.idle)  # noqa: B023
                assert residency.buffer.reader.bytes_read > 0 and residency.counts.bytes_read == 0
            answer = model.generate(PROMPT, max_tokens=40, logprobs=3)
            assert answer.token_ids == expected.token_ids and answer.logprobs == expected.logprobs
            reader, under_way = residency.buffer.reader, [len(read.buffer) for read in residency.buffer.reads.values()]
            wait_until(lambda: reader.idle)  # noqa: B023
            # what was read ahead of the answer is charged to it, what is under way at its end is not
            assert reader.bytes_read - sum(under_way) <= answer.usage.bytes_read <= reader.bytes_read
            assert mode != "off" or answer.usage.bytes_read == reader.bytes_read
            assert residency.check() == []


def wait_until(happens: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_likely_is_there_before_anybody_asks(packed: Path) -> None:
    with edgert.load(packed, residency=0.5, prefetch="off", context=256) as model:
        residency = model._open().engine.residency
        wait_until(lambda: residency.buffer.reader.idle)
        residency.begin(1)
        there = np.flatnonzero(residency.buffer.state == 2)
        assert len(there) == 6 and set(there) == set(residency.first[:6].tolist())
        model.generate(PROMPT, max_tokens=2)  # a step that went no further is put right by the next
        assert residency.check() == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_drive_that_fails_or_dawdles_before_anybody_asks(
    fails: bool, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = said(packed, residency=1.0)
    asked, n_reads = False, 0

    def fault(view: memoryview, offset: int) -> None:
        nonlocal n_reads
        n_reads += 1
        if not asked and fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.02)

    monkeypatch.setattr(streaming, "FlashFile", Faulty)
    monkeypatch.setattr(Faulty, "fault", staticmethod(fault))
    with edgert.load(packed, residency=0.6, prefetch="off", context=256) as model:
        residency = model._open().engine.residency
        wait_until(lambda: n_reads > 0)
        if fails:
            wait_until(lambda: residency.buffer.reader.idle)
        asked = True
        answer = model.generate(PROMPT, max_tokens=40, logprobs=3)
        assert answer.token_ids == expected.token_ids and answer.logprobs == expected.logprobs
        assert residency.check() == []


def test_a_damaged_choice_leaves_the_defaults(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.edge"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    document = json.loads((copy / CHOICE).read_text())
    (copy / CHOICE).write_text(json.dumps(document | {"topics": {"4": {"topics": 10**6}}}))
    answer, residency = said(copy, residency=0.5)
    assert residency.policy.name == "cost" and not len(residency.first) and answer.usage.bytes_read > 0

"""Layers that see only the last positions keep a ring of blocks: no answer tells, wherever a text goes back to."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import engine_of, golden_path, run

import edgert
from edgert.chat_template import ChatTemplate
from edgert.devices.cpu import CpuDevice
from edgert.devices.kv_cache import KV_TYPES, KvCache, cache_bytes
from edgert.devices.reference import ReferenceDevice
from edgert.devices.rings import BLOCK, KEPT, Ring, length_of, reach_of
from edgert.engine import Engine, Session
from edgert.types import LayerConfig, ModelConfig

N_CONTEXT = 1024


def limited(model: ModelConfig, **limits: int) -> ModelConfig:
    """The model with limits of its own in the layers that have some, or in all that attend where none has."""
    layers = [model.layer(index) for index in range(model.n_layers)]
    some = [reach_of(layer) > 0 for layer in layers]
    has = some if any(some) else [layer.mixer == "attention" for layer in layers]
    limits = {"window": 0, "span": 0} | limits
    return replace(model, layers=tuple(replace(a, **limits) if b else a for a, b in zip(layers, has, strict=True)))


# A window; stretches; a window in layers between gated delta nets, whose states go back together with it.
LIMITS: dict[str, dict[str, int]] = {
    "gpt-oss-mxfp4": {"window": 12},
    "llama4-f32": {"span": 70},
    "qwen3next-f32": {"window": 100},
}


@functools.cache
def engine(name: str, chunk: int, threads: int = 2, kv_type: str = "f16") -> Engine:
    """One for all tests: sessions are made beside it."""
    made, _ = engine_of(
        golden_path(name),
        threads=threads,
        kv_type=kv_type,
        n_context=N_CONTEXT,
        device=functools.partial(CpuDevice, chunk=chunk),
        change=lambda config: limited(config, **LIMITS[name]),
    )
    return made


def sessions(made: Engine, kv_type: str = "f16") -> tuple[Session, Session]:
    """One whose cache has rings, and one that keeps all."""
    ring, whole = made.device.new_cache(N_CONTEXT, kv_type), KvCache(made.config, N_CONTEXT, kv_type)
    assert ring.n_bytes < whole.n_bytes and ring.forgets
    return Session(ring), Session(whole)


class Pair:
    """A text in both, which must say the same."""

    def __init__(self, made: Engine, kv_type: str = "f16") -> None:
        self.made, self.random = made, np.random.default_rng(7)
        self.ring, self.whole = sessions(made, kv_type)
        self.states: Any = self.ring.cache.states  # type: ignore[attr-defined]

    def tokens(self, n: int) -> list[int]:
        """As many as there is room for, up to n."""
        return self.random.integers(0, self.made.config.n_vocab, min(n, self.ring.room)).tolist()

    def run(self, tokens: list[int], size: int) -> None:
        """Go on with tokens, so many at a time."""
        if tokens:
            found = run(self.made, self.ring, tokens, chunk=size)
            assert (found == run(self.made, self.whole, tokens, chunk=size)).all()

    def prompt(self, tokens: list[int], keep: tuple[int, ...]) -> None:
        """Go on with a prompt, of whose lengths some are to be kept."""
        if tokens:
            n = [*self.made.prompt(tokens, self.ring, keep)][-1]
            found = self.made.last_logits(n).copy()
            assert (found == run(self.made, self.whole, tokens, chunk=self.made.device.chunk)[-1]).all()
            kept = sorted(keep)[-KEPT:] if keep else [len(self.ring.tokens) - 1]
            assert {at for at in kept if 0 < at < len(self.ring.tokens)} <= set(self.states._kept)

    def back(self, n: int) -> int:
        """Go back to n, or as far as it takes; where to."""
        kept, back, passes = set(self.states._kept), self.states._rings.back, self.ring.cache.has_states
        stays = n == self.states._position or (n >= back and not passes)
        found = self.ring.cut(n)
        assert found == (n if stays else max((at for at in kept if at <= n), default=0)) == len(self.ring.tokens)
        self.whole.cut(found)
        missing = self.ring.tokens[len(self.whole.tokens) :]  # where states pass it goes back further
        if missing:
            run(self.made, self.whole, missing, chunk=self.made.device.chunk)
        return found


# ---- sizes -----------------------------------------------------------------------------------------------------------
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 600), st.integers(1, 5000))
def test_a_ring_holds_a_step_and_takes_no_more_than_all(window: int, span: int, chunk: int, n_context: int) -> None:
    layer, whole = LayerConfig(window=window, span=span), -(-n_context // BLOCK)
    reach, length = reach_of(layer), length_of(layer, n_context, chunk)
    assert length_of(layer, n_context, None) == (whole, 0)
    if not length.n_kept:
        needed = -(-(reach - 1 + chunk + BLOCK) // BLOCK)  # a step, what it sees, and a block for where it begins
        assert length.n_blocks == whole and (not reach or needed + KEPT * (reach // BLOCK + 2) >= whole)
        return
    assert length.n_blocks + KEPT * length.n_kept < whole and reach == min(n for n in (window, span) if n)
    for start in range(reach - 1, reach - 1 + BLOCK):
        seen = {position // BLOCK for position in range(start - reach + 1, start + chunk)}
        assert (
            len(seen) <= length.n_blocks and len({p // BLOCK for p in range(start - reach + 1, start)}) <= length.n_kept
        )
    assert length.n_blocks * BLOCK <= reach - 1 + chunk + 2 * BLOCK


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("name", LIMITS)
def test_what_is_allocated_is_what_was_planned(name: str, kv_type: str) -> None:
    config = limited(engine(name, 32).config, window=20)
    for chunk in (16, 100, 400, None):
        cache = KvCache(config, N_CONTEXT, kv_type, chunk)
        states, rings = cache.states, cache.states._rings
        kept = sum(ring.kept.nbytes for ring in rings._rings)
        spare = 4 * 16 * len(states._all) + 64  # to begin at a multiple of 64
        n_bytes = cache._memory.nbytes + kept + states._all.nbytes - spare
        assert n_bytes == cache.n_bytes == cache_bytes(config, N_CONTEXT, kv_type, chunk)
        assert bool(rings) == (chunk is not None)


def test_a_loaded_model_takes_what_its_plan_says() -> None:
    for context, has in ((256, False), (4096, True)):
        with edgert.load(golden_path("gpt-oss-f32"), context=context, threads=1) as model:
            cache = model._open().session.cache
            assert cache.n_bytes == model.memory.kv and cache.forgets == has
            whole = cache_bytes(model.config, context, "f16")
            assert (cache.n_bytes < 0.65 * whole) == has
        device = edgert.load(golden_path("gpt-oss-f32"), context=context, threads=1, device="reference")
        with device as model:
            assert model._open().session.cache.n_bytes == model.memory.kv == whole


# ---- answers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", LIMITS)
def test_no_answer_tells(name: str, threads: int, kv_type: str) -> None:
    """Round the ring many times, in chunks and token by token."""
    pair, sizes = Pair(engine(name, 40, threads, kv_type), kv_type), itertools.cycle([1, 7, 40])
    while pair.ring.room:
        pair.run(pair.tokens(int(pair.random.integers(1, 150))), next(sizes))


def test_the_reference_keeps_all_and_says_the_same() -> None:
    text = np.random.default_rng(5).integers(0, 300, 450).tolist()
    path, chunk = golden_path("gpt-oss-f32"), functools.partial(CpuDevice, chunk=24)
    made, session = engine_of(path, n_context=N_CONTEXT, device=chunk)
    assert session.cache.forgets
    found = run(made, session, text, chunk=24)
    made, session = engine_of(path, n_context=N_CONTEXT, device=ReferenceDevice)
    assert not session.cache.forgets and (found == run(made, session, text)).all()


# ---- going back ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gpt-oss-mxfp4", "llama4-f32"])
def test_every_distance_back(name: str) -> None:
    """As far as the last step's tokens always; further to what was kept, or to the beginning."""
    made, chunk, reached = engine(name, 32), 32, []
    text = Pair(made).tokens(700)
    for distance in (*range(70), *range(70, 330, 7), 400, 500, 699, 700):
        pair = Pair(made)
        pair.prompt(text, (450,))
        n = len(text) - distance
        reached.append(pair.back(n))
        assert reached[-1] in {n, 450, 0} and (reached[-1] == n or distance > chunk)
        pair.run(pair.tokens(50), chunk)
    assert {0, 450, 700} <= set(reached)


steps = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 200), st.integers(1, 32)),
    st.tuples(st.just("prompt"), st.integers(1, 300), st.lists(st.integers(0, 300), max_size=2)),
    st.tuples(st.just("back"), st.integers(0, 400), st.just(0)),
    st.tuples(st.just("broken"), st.integers(1, 32), st.just(0)),
)


@pytest.mark.parametrize("name", LIMITS)
@settings(max_examples=25)
@given(st.lists(steps, min_size=3, max_size=9))
def test_a_text_that_goes_to_and_fro(name: str, taken: list[tuple[str, int, Any]]) -> None:
    pair = Pair(engine(name, 32))
    for kind, n, more in taken:
        at = len(pair.ring.tokens)
        if kind == "run":
            pair.run(pair.tokens(n), more)
        elif kind == "prompt":
            pair.prompt(pair.tokens(n), tuple(sorted(at + 1 + one for one in more)))
        elif kind == "back":
            pair.back(max(0, at - n))
        elif pair.ring.room:  # a step that does not end has written what it would
            tokens = pair.tokens(n)
            pair.ring.cache.begin(at, len(tokens))
            pair.made.device.begin(pair.made.embed(tokens))
            pair.made.device.run_layers(
                pair.made.residency.tables, None, pair.ring.cache, at, 0, every_layer=False, n_ahead=0
            )
            assert pair.back(at) == at or pair.ring.cache.has_states
    pair.run(pair.tokens(100), 32)


def test_a_step_further_back_is_refused() -> None:
    pair = Pair(engine("gpt-oss-mxfp4", 32))
    pair.run(pair.tokens(600), 32)
    del pair.ring.tokens[300:]
    with pytest.raises(RuntimeError, match="a step at position 300, but the states are after 0 tokens"):
        pair.made.step([1], pair.ring)
    pair.ring.tokens.clear()
    pair.whole.tokens.clear()
    pair.run(pair.tokens(200), 32)


@pytest.mark.parametrize("after", [0, 1])
def test_whoever_breaks_in_while_a_ring_is_brought_back_loses_nothing(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the midst of the copies: the next text does not go on from blocks of two places."""
    pair = Pair(engine("gpt-oss-mxfp4", 32))
    pair.prompt(pair.tokens(150), (100,))
    pair.run(pair.tokens(400), 32)
    whole, turns = Ring.runs, itertools.count()

    def broken(ring: Ring, position: int) -> Any:
        for run_of_blocks in whole(ring, position):
            if next(turns) == after:
                raise KeyboardInterrupt
            yield run_of_blocks

    monkeypatch.setattr(Ring, "runs", broken)
    with pytest.raises(KeyboardInterrupt):
        pair.ring.cut(120)
    monkeypatch.undo()
    assert pair.ring.cut(120) == 100
    pair.whole.cut(100)
    pair.run(pair.tokens(200), 32)


TURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<|channel|>analysis{% endif %}"
)


def test_a_long_answer_is_taken_back_to_the_question() -> None:
    """What was thought is dropped from the next prompt, as gpt-oss's template does, and is longer than the slack."""
    path = golden_path("gpt-oss-f32")
    with edgert.load(path, context=4096, threads=1) as talks, edgert.load(path, context=4096, threads=1) as anew:
        talks.template = anew.template = ChatTemplate(TURNS, talks.tokenizer)
        talks.tokenizer.stop_ids = anew.tokenizer.stop_ids = frozenset()
        messages, before = [{"role": "system", "content": "Be brief. " * 20}], 0
        for turn in range(3):
            messages.append({"role": "user", "content": f"Question {turn}? " * 10})
            anew.logits([1])  # leaves nothing of what it has answered
            found, fresh = (one.chat(messages, max_tokens=750, temperature=0, logprobs=2) for one in (talks, anew))
            assert (found.token_ids, found.logprobs) == (fresh.token_ids, fresh.logprobs)
            n_messages = len(talks.template.encode(messages, add_generation_prompt=False))
            assert fresh.usage.cached_tokens == 0 and found.usage.cached_tokens >= before, turn
            before = n_messages
            messages.append({"role": "assistant", "content": f"Answer {turn}."})
        assert found.usage.generated_tokens == 750

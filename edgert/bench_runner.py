"""The runs that a bench times: a prompt, random token ids one after the other, or the model's own text.

Random ids are what llama-bench decodes; their routing has little locality, so they are the hard case for an expert
buffer. The model's own text is sampled with a fixed seed and goes on from run to run: real routing, and no token comes
twice. What the figures mean is bench.py's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from edgert.devices.base import Device
from edgert.devices.kv_cache import cache_bytes
from edgert.loading import Parts
from edgert.sampling import Sampler, Sampling
from edgert.traffic import ModelTraffic, Traffic
from edgert.types import ExpertCounts, Floats, Ids

SEED = 1
_SPLIT_TOKENS = 32  # generated once more to see where the time goes
_MANY_POSITIONS = 4096  # of a cache that wastes nothing on a block half filled
_NAMES: dict[str, str] = {"prompt": "pp", "generate": "tg", "text": "text"}
_BEGINNING = "Once upon a time, in a small town by the sea, there lived a clockmaker who"
_LONGEST_BEGINNING = 64  # tokens
_TEXT = Sampling(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=SEED)


@dataclass(frozen=True)
class Test:
    """What is timed: a prompt of n_tokens, or n_tokens generated, after `depth` tokens.

    kind: "generate" runs random ids, "text" what the model says, each token sampled from the logits of the one before;
    its depth is that of the text.
    """

    kind: Literal["prompt", "generate", "text"]
    n_tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        return f"{_NAMES[self.kind]}{self.n_tokens}" + (f" @ d{self.depth}" if self.depth else "")

    def context(self, repetitions: int, warm: int) -> int:
        """Positions that it needs, run `repetitions` times after `warm` tokens that are not timed."""
        if self.kind == "text":
            return _LONGEST_BEGINNING + warm + repetitions * self.n_tokens
        return self.depth + max(self.n_tokens, warm if self.kind == "generate" else 0)


def context_for(tests: Iterable[Test], repetitions: int = 1, warm: int = 1) -> int:
    """The shortest context that holds every test."""
    return max(test.context(repetitions, warm) for test in tests)


def traffic_of(parts: Parts) -> ModelTraffic:
    """The sizes of a loaded model's parts."""
    cache = cache_bytes(parts.engine.config, _MANY_POSITIONS, parts.memory.kv_type)
    return ModelTraffic.of(parts.weights, cache / _MANY_POSITIONS)


@dataclass(frozen=True)
class Run:
    """One run: its seconds, what it had to move and to compute, and what was done to have experts at hand."""

    seconds: float
    traffic: Traffic
    counts: ExpertCounts


class Runner:
    """Runs tests on a loaded model. What the cache holds for a depth serves every test at that depth.

    check: called between steps. warm: tokens that prepare() generates before a test of generation. With keep_routes,
    `routes` has those of every token generated since prepare() began: arrays (n_layers, top_k), `n_warm` of them by it.
    """

    def __init__(
        self, parts: Parts, check: Callable[[], None] = lambda: None, *, warm: int = 1, keep_routes: bool = False
    ) -> None:
        self._parts, self._engine, self._session, self._check = parts, parts.engine, parts.session, check
        self._traffic = traffic_of(parts)
        self._numbers = np.random.default_rng(SEED)
        self._warm, self._keep_routes = warm, keep_routes
        self._sample: Callable[[], int] = lambda: 0  # the text's next token
        self._logits: Floats = np.zeros(0, np.float32)  # of the last token
        self.routes: list[Ids] = []
        self.n_warm = 0
        self._session.tokens.clear()

    def prepare(self, test: Test) -> None:
        """Fill the cache to the test's depth and run the test's kernels, untimed; a text begins anew."""
        tokens = self._session.tokens
        self.routes.clear()
        if test.kind == "text":
            self._begin_text()
            self._generate(self._warm, self._sample)
        else:
            self._session.cut(test.depth)
            for _ in self._engine.prefill(self._random(test.depth - len(tokens)), self._session):
                self._check()
            self._session.cache.keep()  # each run comes back here
            self.run(test if test.kind == "prompt" else Test("generate", self._warm, test.depth))
        self.n_warm = len(self.routes)

    def run(self, test: Test) -> Run:
        """One run; prepare() went before."""
        tokens, residency, start = self._session.tokens, self._engine.residency, len(self._session.tokens)
        assert test.kind == "text" or start == test.depth, (start, test.depth)
        residency.between_requests()  # as before an answer: a buffer that was shrunk may grow again
        before = residency.counts
        if test.kind == "prompt":
            seconds, n_rows = self._prompt(self._random(test.n_tokens))
        else:
            choose = self._sample if test.kind == "text" else iter(self._random(test.n_tokens)).__next__
            seconds, n_rows = self._generate(test.n_tokens, choose), [1] * test.n_tokens
        counts, traffic = residency.counts - before, Traffic()
        n_experts = counts.expert_hits + counts.expert_misses
        for n in n_rows:
            last = test.kind != "prompt" or start + n == len(tokens)
            traffic += self._traffic.step(n, start, n_experts, with_head=last)
            n_experts, start = 0, start + n  # they were counted over the run as a whole
        if test.kind != "text":
            self._session.cut(test.depth)
        return Run(seconds, traffic, counts)

    def _prompt(self, ids: list[int]) -> tuple[float, list[int]]:
        """Seconds, and tokens of each step."""
        started, n_rows = time.perf_counter(), []
        for n in self._engine.prefill(ids, self._session):
            n_rows.append(n)
            self._check()
        self._engine.last_logits(n_rows[-1])
        return time.perf_counter() - started, n_rows

    def _generate(self, n_tokens: int, choose: Callable[[], int]) -> float:
        """Seconds that it took to choose and to run each token."""
        seconds = 0.0
        for _ in range(n_tokens):
            started = time.perf_counter()
            self._engine.step([choose()], self._session)
            self._logits = self._engine.last_logits(1)
            seconds += time.perf_counter() - started
            if self._keep_routes:
                layers = range(self._engine.config.n_layers)
                self.routes.append(np.concatenate([self._engine.device.chosen(layer)[0] for layer in layers]))
            self._check()
        return seconds

    def _begin_text(self) -> None:
        """Run the beginning of a text, so that _sample goes on with it."""
        engine, tokenizer = self._engine, self._parts.tokenizer
        history = tokenizer.encode(_BEGINNING)[:_LONGEST_BEGINNING]
        self._session.tokens.clear()
        n_rows = list(engine.prefill(history, self._session))
        self._logits = engine.last_logits(n_rows[-1])
        sampler = Sampler(_TEXT.changed(logit_bias=dict.fromkeys(tokenizer.stop_ids, float("-inf"))))

        def sample() -> int:
            token = sampler.choose(self._logits, history)
            history.append(token)
            return token

        self._sample = sample

    def _random(self, count: int) -> list[int]:
        return [int(token) for token in self._numbers.integers(self._engine.config.n_vocab, size=count)]

    def phases(self, test: Test) -> dict[str, float]:
        """Seconds a token by phase: the device's calls by their names, the embedding, and the rest (routing, Python).

        The layers run one by one for it, which costs a small model some speed. prepare() went before.
        """
        engine, clock = self._engine, _Clock()
        n_tokens = test.n_tokens if test.kind == "prompt" else min(test.n_tokens, _SPLIT_TOKENS)
        kept = engine.device, engine.embed, engine.every_layer
        engine.every_layer = True
        engine.device = cast(Device, _TimedDevice(engine.device, clock))
        engine.embed = clock.timed("embed", engine.embed)
        try:
            self.run(Test(test.kind, min(n_tokens, 2), test.depth))  # layer by layer may have to be compiled
            clock.seconds.clear()
            seconds = self.run(Test(test.kind, n_tokens, test.depth)).seconds
        finally:
            engine.device, engine.embed, engine.every_layer = kept
        clock.seconds["other"] = seconds - sum(clock.seconds.values())
        return {phase: taken / n_tokens for phase, taken in clock.seconds.items()}


class _Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted under `name`."""

        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return run


class _TimedDevice:
    """A device whose calls are timed by their names; run_layers, stopping at every layer, is the attention half."""

    def __init__(self, device: Device, clock: _Clock) -> None:
        self._device, self._clock = device, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        return self._clock.timed("attend" if name == "run_layers" else name, found) if callable(found) else found

"""How fast a model runs here: prompts and generation of random token ids, against what the machine could do at most.

The tests are those of llama-bench: pp512 is a prompt of 512 tokens and the logits of its last, tg64 are 64 tokens one
after the other with the logits of each, "@ d4096" after 4096 tokens that are not timed. Nothing is sampled.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import psutil

from edgert import machine
from edgert.devices.base import Device
from edgert.devices.kv_cache import cache_bytes
from edgert.errors import OptionError
from edgert.loading import Parts
from edgert.memory import available
from edgert.quant import isa, jit
from edgert.traffic import ModelTraffic, Traffic
from edgert.weights import Progress

if TYPE_CHECKING:
    from edgert.devices.roofline import Ceiling, Reader
    from edgert.devices.threads import ThreadPool

SCHEMA = 1  # of the JSON document; it grows when the meaning of a key changes
_SEED = 1
_SPLIT_TOKENS = 32  # generated once more to see where the time goes
_MANY_POSITIONS = 4096  # of a cache that wastes nothing on a block half filled
_NAMES: dict[str, str] = {"prompt": "pp", "generate": "tg"}


@dataclass(frozen=True)
class Test:
    """What is timed: a prompt of n_tokens, or n_tokens generated, after `depth` tokens."""

    kind: Literal["prompt", "generate"]
    n_tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        return f"{_NAMES[self.kind]}{self.n_tokens}" + (f" @ d{self.depth}" if self.depth else "")


DEFAULT = (Test("prompt", 512), Test("prompt", 128), Test("generate", 64))


def tests_of(prompt: Iterable[int], generate: Iterable[int], depth: Iterable[int]) -> list[Test]:
    """All prompts and all generations at each depth. OptionError for a size that is none."""
    prompts, generations = list(prompt), list(generate)
    found = []
    for at in depth:
        found += [Test("prompt", n, at) for n in prompts] + [Test("generate", n, at) for n in generations]
    for test in found:
        if test.n_tokens < 1 or test.depth < 0:
            raise OptionError(f"{test.kind}={test.n_tokens} at depth={test.depth}: use at least 1 token and depth 0")
    if not found:
        raise OptionError("there is nothing to measure: give sizes of prompts, or numbers of tokens to generate")
    return found


def context_for(tests: Iterable[Test]) -> int:
    """The shortest context that holds every test."""
    return max(test.depth + test.n_tokens for test in tests)


@dataclass(frozen=True)
class Result:
    """One test: seconds of each run, and what a run had to move and to compute."""

    test: Test
    runs_s: tuple[float, ...]
    traffic: Traffic
    phases_s: dict[str, float]  # a token, from one more run that went layer by layer
    reads: tuple[float, ...] = ()  # bytes a second that the machine read, before each run

    @property
    def seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs_s)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run."""
        return [self.test.n_tokens / seconds for seconds in self.runs_s]

    def as_json(self, ceiling: Ceiling | None) -> dict[str, Any]:
        """The figures of this test; shares of the ceiling where it was measured."""
        is_prompt, traffic = self.test.kind == "prompt", self.traffic
        read, compute = traffic.n_bytes / self.seconds, traffic.int8_operations / self.seconds
        return {
            "test": self.test.name,
            "kind": self.test.kind,
            "n_tokens": self.test.n_tokens,
            "depth": self.test.depth,
            "tokens_per_s": self.test.n_tokens / self.seconds,
            "tokens_per_s_min": min(self.rates),
            "tokens_per_s_max": max(self.rates),
            "ttft_s": self.seconds if is_prompt else None,
            "tpot_s": None if is_prompt else self.seconds / self.test.n_tokens,
            "bytes_per_token": traffic.n_bytes / self.test.n_tokens,
            "read_gb_per_s": read / 1e9,
            "read_share": read / statistics.median(self.reads) if self.reads else None,
            "machine_read_gb_per_s": [rate / 1e9 for rate in self.reads],
            "int8_gop_per_s": compute / 1e9,
            "int8_share": _share(compute, ceiling.int8_operations_per_s if ceiling else ()),
            "float_gop_per_s": traffic.float_operations / self.seconds / 1e9,
            "phases_s_per_token": self.phases_s,
            "runs_s": list(self.runs_s),
        }


def _share(rate: float, ceilings: Sequence[float]) -> float | None:
    return rate / max(ceilings) if ceilings else None


@dataclass(frozen=True)
class Report:
    """All tests of one model, in one run."""

    results: tuple[Result, ...]
    ceiling: Ceiling | None  # None where nothing is compiled
    subject: dict[str, Any] = field(default_factory=dict)  # model, machine, settings

    def as_json(self) -> dict[str, Any]:
        """The report as one document of plain values."""
        return {
            "schema": SCHEMA,
            **self.subject,
            "ceiling": None if self.ceiling is None else ceiling_json(self.ceiling),
            "tests": [result.as_json(self.ceiling) for result in self.results],
        }


def ceiling_json(ceiling: Ceiling) -> dict[str, Any]:
    """The best passes, and all."""
    read, int8 = ceiling.read_bytes_per_s, ceiling.int8_operations_per_s
    return {
        "threads": ceiling.n_threads,
        "read_gb_per_s": max(read) / 1e9 if read else None,
        "read_bytes": ceiling.n_bytes,
        "int8_gop_per_s": max(int8) / 1e9,
        "read_passes_gb_per_s": [rate / 1e9 for rate in read],
        "int8_passes_gop_per_s": [rate / 1e9 for rate in int8],
    }


# ---- running ---------------------------------------------------------------------------------------------------------
Check = Callable[[], None]  # called between steps, also while time is taken: quick, and it may raise


def traffic_of(parts: Parts) -> ModelTraffic:
    """The sizes of a loaded model's parts."""
    cache = cache_bytes(parts.engine.config, _MANY_POSITIONS, parts.memory.kv_type)
    return ModelTraffic.of(parts.weights, cache / _MANY_POSITIONS)


class Runner:
    """Runs tests on a loaded model. What the cache holds for a depth serves every test at that depth."""

    def __init__(self, parts: Parts, check: Check = lambda: None) -> None:
        self._engine, self._session, self._check = parts.engine, parts.session, check
        self._traffic = traffic_of(parts)
        self._numbers = np.random.default_rng(_SEED)
        self._session.tokens.clear()

    def prepare(self, test: Test) -> None:
        """Fill the cache to the test's depth and run the test's kernels once, untimed."""
        tokens = self._session.tokens
        del tokens[test.depth :]
        for _ in self._engine.prefill(self._random(test.depth - len(tokens)), self._session):
            self._check()
        self.run(test if test.kind == "prompt" else Test("generate", 1, test.depth))

    def run(self, test: Test) -> tuple[float, Traffic]:
        """Seconds of one run, and what it had to move and to compute; prepare() went before."""
        tokens, ids = self._session.tokens, self._random(test.n_tokens)
        assert len(tokens) == test.depth, (len(tokens), test.depth)
        used = self._n_used()
        started = time.perf_counter()
        n_rows = self._prompt(ids) if test.kind == "prompt" else self._generate(ids)
        seconds = time.perf_counter() - started
        n_experts, traffic, start = self._n_used() - used, Traffic(), test.depth
        for n in n_rows:
            last = test.kind == "generate" or start + n == len(tokens)
            traffic += self._traffic.step(n, start, n_experts, with_head=last)
            n_experts, start = 0, start + n  # they were counted over the run as a whole
        del tokens[test.depth :]
        return seconds, traffic

    def _prompt(self, ids: list[int]) -> list[int]:
        n_rows = []
        for n in self._engine.prefill(ids, self._session):
            n_rows.append(n)
            self._check()
        self._engine.last_logits(n_rows[-1])
        return n_rows

    def _generate(self, ids: list[int]) -> list[int]:
        for token in ids:
            self._engine.step([token], self._session)
            self._engine.last_logits(1)
            self._check()
        return [1] * len(ids)

    def _n_used(self) -> int:
        """Experts that steps have used so far, each counted once a layer and chunk."""
        return self._engine.residency.hits + self._engine.residency.misses

    def _random(self, count: int) -> list[int]:
        return [int(token) for token in self._numbers.integers(self._engine.config.n_vocab, size=count)]

    def phases(self, test: Test) -> dict[str, float]:
        """Seconds a token by phase: the device's calls by their names, the embedding, and the rest (routing, Python).

        The layers run one by one for it, which costs a small model some speed. prepare() went before.
        """
        engine, clock = self._engine, _Clock()
        n_tokens = test.n_tokens if test.kind == "prompt" else min(test.n_tokens, _SPLIT_TOKENS)
        kept = engine.device, engine.embed
        engine.device = cast(Device, _TimedDevice(engine.device, clock))
        engine.embed = clock.timed("embed", engine.embed)
        try:
            self.run(Test(test.kind, min(n_tokens, 2), test.depth))  # layer by layer may have to be compiled
            clock.seconds.clear()
            seconds, _ = self.run(Test(test.kind, n_tokens, test.depth))
        finally:
            engine.device, engine.embed = kept
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
    """A device whose calls are timed by their names, and which does not run all layers at once."""

    def __init__(self, device: Device, clock: _Clock) -> None:
        self._device, self._clock = device, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        return self._clock.timed(name, found) if callable(found) else found

    def run_layers(self, *_: object) -> None:
        """Not at once: each half of each layer is timed."""


# ---- all of it -------------------------------------------------------------------------------------------------------
def measure(parts: Parts, tests: Sequence[Test], repetitions: int, limit: int | None, progress: Progress) -> Report:
    """Run every test `repetitions` times, and between them the loops that show what the machine can do.

    limit: bytes that the process may use. progress: called between steps too, with an unchanged stage.
    """
    _check(tests, repetitions, parts)
    stage, done = "", 0.0

    def tell(now: str, fraction: float) -> None:
        nonlocal stage, done
        stage, done = now, fraction
        progress(now, fraction)

    runner = Runner(parts, lambda: progress(stage, done))
    ceiling = _ceiling(parts, limit, 0.0, tell)
    reader = _reader(parts, ceiling)
    results = []
    for index, test in enumerate(tests):
        at = index / len(tests)
        tell(f"{test.name}: warming up", at)
        runner.prepare(test)
        runs, reads = [], []
        for repetition in range(repetitions):
            tell(f"{test.name}: {repetition + 1} of {repetitions}", at + repetition / repetitions / len(tests))
            if reader is not None:
                reads.append(max(reader.passes(2)))
            runs.append(runner.run(test))
        tell(f"{test.name}: phases", at)
        seconds, traffics = zip(*runs, strict=True)
        results.append(Result(test, seconds, traffics[-1], runner.phases(test), tuple(reads)))
    del reader
    if ceiling is not None and (again := _ceiling(parts, limit, 1.0, tell)) is not None:
        ceiling += again
    parts.session.tokens.clear()
    return Report(tuple(results), ceiling, _subject(parts, repetitions))


def _check(tests: Sequence[Test], repetitions: int, parts: Parts) -> None:
    """OptionError for what cannot be measured."""
    if repetitions < 1:
        raise OptionError(f"repetitions={repetitions} must be at least 1")
    if not tests:
        raise OptionError("there is nothing to measure: give at least one test")
    longest, n_context = max(tests, key=lambda test: test.depth + test.n_tokens), parts.session.cache.n_context
    if longest.depth + longest.n_tokens > n_context:
        needed = f"{longest.name} needs a context of {longest.depth + longest.n_tokens}"
        raise OptionError(f"{needed}, the model was loaded with {n_context}; use a larger context or a smaller test")


def _pool(parts: Parts) -> ThreadPool | None:
    """The threads that the model computes with; None where nothing is compiled."""
    if not jit.JIT_ENABLED:
        return None
    from edgert.devices.cpu import CpuDevice

    return parts.engine.device.pool if isinstance(parts.engine.device, CpuDevice) else None


def _ceiling(parts: Parts, limit: int | None, fraction: float, progress: Progress) -> Ceiling | None:
    """What the machine can do at most, on the model's threads."""
    pool = _pool(parts)
    if pool is None:
        return None
    from edgert.devices import roofline

    progress("compiling the loops that measure this machine", fraction)
    roofline.compile_all(pool)
    progress("measuring this machine", fraction)
    free = available() if limit is None else min(available(), limit)
    return roofline.measure(pool, roofline.memory_for(free - psutil.Process().memory_info().rss))


def _reader(parts: Parts, ceiling: Ceiling | None) -> Reader | None:
    """Reads the machine's memory before each run: its speed changes with what else goes on there."""
    pool = _pool(parts)
    if pool is None or ceiling is None or not ceiling.n_bytes:
        return None
    from edgert.devices import roofline

    return roofline.Reader(pool, ceiling.n_bytes)


def _subject(parts: Parts, repetitions: int) -> dict[str, Any]:
    """What was measured, where and how."""
    pool, config = _pool(parts), parts.engine.config
    return {
        "model": {
            "name": parts.name,
            "path": str(parts.path),
            "architecture": config.architecture,
            "file_bytes": parts.file.n_bytes,
            "layers": config.n_layers,
            "experts": config.router.n_expert if config.router else 0,
            "experts_used": config.router.top_k if config.router else 0,
        },
        "machine": {
            "cpu": machine.cpu_name(),
            "threads": pool.n_threads if pool else 1,
            "instructions": isa.choose().name if pool else None,
        },
        "settings": {
            "device": parts.engine.device.name,
            "context": parts.session.cache.n_context,
            "kv_type": parts.memory.kv_type,
            "repetitions": repetitions,
            "seed": _SEED,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("edgert", "numba", "llvmlite", "numpy")},
        },
    }

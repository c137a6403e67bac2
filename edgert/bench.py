"""How fast a model runs here: prompts and generation of random token ids, against what the machine could do at most.

The tests are those of llama-bench: pp512 is a prompt of 512 tokens and the logits of its last, tg64 are 64 tokens one
after the other with the logits of each, "@ d4096" after 4096 tokens that are not timed; nothing is sampled. Beside them
text64, 64 tokens of what the model says: where experts are streamed, real routing makes the difference.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from edgert import file_pages, machine, vitals
from edgert.bench_experts import Routed, Streaming, flash_rate_of
from edgert.bench_runner import SEED, Run, Runner, Test
from edgert.errors import OptionError
from edgert.experts.streamed import Streamed
from edgert.loading import Parts
from edgert.memory import available
from edgert.needs import record_bytes
from edgert.quant import isa, jit
from edgert.traffic import Traffic
from edgert.vitals import Vitals, Watch
from edgert.weights import Progress

if TYPE_CHECKING:
    from edgert.devices.roofline import Ceiling, Reader
    from edgert.devices.threads import ThreadPool

SCHEMA = 1  # of the JSON document; it grows when the meaning of a key changes
WARM = 32  # tokens that a steady run begins with, untimed: they fill the expert buffer
_COMPILING_BYTES = 40 << 20  # what compiling the loops that measure a machine takes, page cache included
DEFAULT = (Test("prompt", 512), Test("prompt", 128), Test("generate", 64))


def tests_of(
    prompt: Iterable[int], generate: Iterable[int], depth: Iterable[int], text: Iterable[int] = ()
) -> list[Test]:
    """All prompts and all generations at each depth, and all texts. OptionError for a size that is none."""
    prompts, generations = list(prompt), list(generate)
    found = []
    for at in depth:
        found += [Test("prompt", n, at) for n in prompts] + [Test("generate", n, at) for n in generations]
    found += [Test("text", n) for n in text]
    for test in found:
        if test.n_tokens < 1 or test.depth < 0:
            raise OptionError(f"{test.kind}={test.n_tokens} at depth={test.depth}: use at least 1 token and depth 0")
    if not found:
        raise OptionError("there is nothing to measure: give sizes of prompts, or numbers of tokens to generate")
    return found


@dataclass(frozen=True)
class Result:
    """One test: seconds of each run, and what a run had to move and to compute."""

    test: Test
    runs_s: tuple[float, ...]
    traffic: Traffic
    phases_s: dict[str, float]  # a token, from one more run that went layer by layer
    reads: tuple[float, ...] = ()  # bytes a second that the machine read, before each run
    experts: Streaming | None = None  # where experts are on flash
    routed: Routed | None = None  # where that was asked for
    vitals: tuple[Vitals, ...] = ()  # what the board did during each run
    capped: str = ""  # what held threads back at the end, with power="cool"

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
            "experts": self._experts(),
            "board": {**vitals.as_json(self.vitals, self.test.n_tokens, self.runs_s), "capped": self.capped},
            "runs_s": list(self.runs_s),
        }

    def _experts(self) -> dict[str, Any] | None:
        if self.experts is None:
            return None
        return self.experts.as_json(decoding=self.test.kind != "prompt")


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


# ---- all of it -------------------------------------------------------------------------------------------------------
def measure(
    parts: Parts,
    tests: Sequence[Test],
    repetitions: int,
    limit: int | None,
    progress: Progress,
    *,
    steady: bool = False,
) -> Report:
    """Run every test `repetitions` times, and between them the loops that show what the machine can do.

    limit: bytes that the process may use. progress: called between steps too, with an unchanged stage. steady: begin
    with a full expert buffer, keep the routes, and measure neither phases nor the machine's memory.
    """
    warm = WARM if steady else 1
    _check(tests, repetitions, warm, parts)
    stage, done = "", 0.0

    def tell(now: str, fraction: float) -> None:
        nonlocal stage, done
        stage, done = now, fraction
        progress(now, fraction)

    runner = Runner(parts, lambda: progress(stage, done), warm=warm, keep_routes=steady)
    ceiling = None if steady else _ceiling(parts, limit, 0.0, tell)
    reader = _reader(parts, ceiling)
    flash, watch = flash_rate_of(parts.engine.residency), Watch()
    results = []
    for index, test in enumerate(tests):
        at = index / len(tests)
        tell(f"{test.name}: warming up", at)
        runner.prepare(test)
        runs, reads, rates, seen = [], [], [], []
        for repetition in range(repetitions):
            tell(f"{test.name}: {repetition + 1} of {repetitions}", at + repetition / repetitions / len(tests))
            if reader is not None:
                reads.append(max(reader.passes(2)))
            if flash is not None:
                rates.append(flash.measure())
            run, board = watch.over(partial(runner.run, test))
            runs.append(run)
            seen.append(board)
        if flash is not None:
            rates.append(flash.measure())
        tell(f"{test.name}: phases", at)
        results.append(
            Result(
                test,
                tuple(run.seconds for run in runs),
                runs[-1].traffic,
                {} if steady or test.kind == "text" else runner.phases(test),
                tuple(reads),
                _streaming(parts, test, runs, rates),
                _routed(parts, runner),
                tuple(seen),
                parts.cooler.state if parts.cooler is not None else "",
            )
        )
    del reader
    if ceiling is not None and (again := _ceiling(parts, limit, 1.0, tell)) is not None:
        ceiling += again
    parts.session.tokens.clear()
    return Report(tuple(results), ceiling, _subject(parts, repetitions, watch))


def _streaming(parts: Parts, test: Test, runs: Sequence[Run], flash: Sequence[float]) -> Streaming | None:
    """What the runs of a test did with experts that are on flash; None if none is."""
    residency = parts.engine.residency
    if not isinstance(residency, Streamed):
        return None
    ahead = residency.prefetcher
    return Streaming(
        runs=tuple((run.counts, run.seconds) for run in runs),
        run_tokens=test.n_tokens,
        flash=tuple(flash),
        working_set=parts.memory.working_set,
        buffer_bytes=residency.slot_bytes,
        residency=residency.slot_bytes / parts.memory.all_experts,
        policy=residency.policy.name,
        prefetch="off" if ahead is None else ahead.controller.reason,
    )


def _routed(parts: Parts, runner: Runner) -> Routed | None:
    """The routes of all that was generated since the test was prepared, if they were kept."""
    if not runner.routes:
        return None
    return Routed(np.stack(runner.routes, axis=1), runner.n_warm, record_bytes(parts.weights))


def _check(tests: Sequence[Test], repetitions: int, warm: int, parts: Parts) -> None:
    """OptionError for what cannot be measured."""
    if repetitions < 1:
        raise OptionError(f"repetitions={repetitions} must be at least 1")
    if not tests:
        raise OptionError("there is nothing to measure: give at least one test")
    longest = max(tests, key=lambda test: test.context(repetitions, warm))
    needed, n_context = longest.context(repetitions, warm), parts.session.cache.n_context
    if needed > n_context:
        raise OptionError(
            f"{longest.name} needs a context of {needed}, the model was loaded with {n_context}; use a larger context "
            "or a smaller test"
        )


def _pool(parts: Parts) -> ThreadPool | None:
    """The threads that the model computes with; None where nothing is compiled."""
    if not jit.JIT_ENABLED:
        return None
    from edgert.devices.cpu import CpuDevice

    if parts.cooler is not None:  # all of them, also while the board is hot
        return parts.cooler.pool
    return parts.engine.device.pool if isinstance(parts.engine.device, CpuDevice) else None


def _ceiling(parts: Parts, limit: int | None, fraction: float, progress: Progress) -> Ceiling | None:
    """What the machine can do at most, on the model's threads."""
    pool = _pool(parts)
    if pool is None:
        return None
    from edgert.devices import roofline

    free = available() - psutil.Process().memory_info().rss
    if limit is not None:  # what the plan leaves, of which not all is in use yet
        free = min(free, limit - parts.memory.total)
        if free < _COMPILING_BYTES:
            return None
    progress("compiling the loops that measure this machine", fraction)
    roofline.compile_all(pool)
    progress("measuring this machine", fraction)
    if limit is not None:
        file_pages.release(dropping=True)
        free -= _COMPILING_BYTES
    return roofline.measure(pool, roofline.memory_for(free))


def _reader(parts: Parts, ceiling: Ceiling | None) -> Reader | None:
    """Reads the machine's memory before each run: its speed changes with what else goes on there."""
    pool = _pool(parts)
    if pool is None or ceiling is None or not ceiling.n_bytes:
        return None
    from edgert.devices import roofline

    return roofline.Reader(pool, ceiling.n_bytes)


def _subject(parts: Parts, repetitions: int, watch: Watch) -> dict[str, Any]:
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
            "power": watch.source.covers or None,
            "power_problem": watch.source.problem or None,
        },
        "settings": {
            "device": parts.engine.device.name,
            "power": "full" if parts.cooler is None else "cool",
            "context": parts.session.cache.n_context,
            "kv_type": parts.memory.kv_type,
            "repetitions": repetitions,
            "seed": SEED,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("edgert", "numba", "llvmlite", "numpy")},
        },
    }

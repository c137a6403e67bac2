"""A forecast beside what really happens here: the model run with all experts in RAM, and with half of them on flash.

The machine is measured before and after each run, flash in between, and the forecast is made of that and of the table
of tensors; for the half, hits are those of the routes that the first run took, replayed.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.bench_experts import flash_rate_of
from edgert.bench_runner import Runner, Test
from edgert.boards import Flash, Unit
from edgert.errors import MemoryLimitError, OptionError
from edgert.experts.trace import Trace
from edgert.loading import Parts, load_parts
from edgert.memory import MemoryPlan
from edgert.needs import record_bytes
from edgert.plan import Planner, Range, Request
from edgert.plan_hits import Hits, replayed_hits, usual_hits
from edgert.plan_machine import board_of, measured_unit
from edgert.plan_model import PlanModel
from edgert.weights import Progress

WITHIN = 0.25  # of what is measured, that a forecast should be
RESIDENCIES = (1.0, 0.5)
_TOKENS, _WARM, _RUNS = 32, 32, 3
_DISTURBED = 0.1  # of a run, for which its threads waited for processors


@dataclass(frozen=True)
class Compared:
    """One figure, forecast and measured by the clock; `what` with its unit.

    alone: what it would have been, had other programs not taken the processors, as far as the system tells; None for
    what does not depend on that.
    """

    what: str
    residency: float
    forecast: Range
    measured: float
    alone: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much that the clock does not tell what the machine does."""
        return self.alone is not None and abs(self.measured / self.alone - 1) > _DISTURBED

    @property
    def tells(self) -> bool:
        """Whether the comparison means anything: most of the time was the run's own."""
        return self.alone is None or 0.5 < self.measured / self.alone < 2.0

    @property
    def within(self) -> bool:
        """Whether the forecast is as near as it should be."""
        return abs(self.off) <= WITHIN

    @property
    def off(self) -> float:
        """By which the forecast is too high, as a share of what was measured; undisturbed, where it was."""
        measured = self.alone if self.alone is not None and self.disturbed else self.measured
        return self.forecast.usual / max(measured, 1e-9) - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        words = {name: getattr(self, name) for name in ("off", "within", "disturbed", "tells")}
        return {**asdict(self), "forecast": self.forecast._asdict(), **words}


@dataclass(frozen=True)
class _Seen:
    """What a run showed: seconds of a token and of the prompt, by the clock and alone, routes, the flash, hits."""

    token_s: tuple[float, float]
    prompt_s: tuple[float, float]
    trace: Trace | None
    flash: Flash | None
    hit_rate: float | None


def verify(model: PlanModel, request: Request, progress: Progress, threads: int | None = None) -> list[Compared]:
    """Run the model and compare. OptionError for a model that is on paper."""
    if model.path is None or model.path.suffix == ".json":
        raise OptionError(f"--verify runs the model, but {model.source} holds no weights: name a whole model")
    hits, found, request = usual_hits(model.name), list[Compared](), _fitting(request, model)
    for residency in RESIDENCIES if model.config.router else RESIDENCIES[:1]:
        progress("measuring this machine", 0.0)
        before, _ = measured_unit(model, threads)
        try:
            seen, memory = _run(model, residency, request, threads, progress)
        except MemoryLimitError:
            if residency == 1 and model.config.router:
                continue  # too large for this machine: the half may do
            raise
        after, _ = measured_unit(model, threads)
        if seen.trace is not None:
            hits = replayed_hits(seen.trace, "routes of the run with all experts in RAM", _WARM)
        found += _compare(model, residency, request, (_mean(before, after), seen, memory), hits)
    return found


def _fitting(request: Request, model: PlanModel) -> Request:
    """With a context for all that is run, and a prompt that leaves room for it."""
    others = 2 * _WARM + _RUNS * _TOKENS
    prompt = max(1, min(request.prompt, model.config.n_context - others))
    return replace(request, prompt=prompt, context=max(request.context, min(prompt + others, model.config.n_context)))


def _compare(
    model: PlanModel, residency: float, request: Request, ran: tuple[Unit, _Seen, MemoryPlan], hits: Hits
) -> list[Compared]:
    """Tokens a second, seconds to the first token, and hits."""
    unit, seen, memory = ran
    flash = seen.flash or Flash("of no use", 1e9, 0.0)
    planner = Planner(model, board_of(unit, flash), request, hits)
    speed = planner.speed(memory, flash)
    found = [
        Compared("tokens a second", residency, speed.tokens_per_s, *(1 / one for one in seen.token_s)),
        Compared("first token, s", residency, speed.ttft_s, *seen.prompt_s),
    ]
    if seen.hit_rate is not None:
        rates = planner.rates(memory.residency)
        found.append(Compared("found in RAM", residency, rates, seen.hit_rate))
    return found


def _run(
    model: PlanModel, residency: float, request: Request, threads: int | None, progress: Progress
) -> tuple[_Seen, MemoryPlan]:
    """Load the model, run prompts and random tokens, and close it."""
    parts = load_parts(
        model.path,
        memory=None,
        residency=residency if model.config.router else None,
        policy="auto",
        prefetch="auto",
        trace=None,
        context=request.context,
        threads=threads,
        device="auto",
        kv_type=request.kv_type,
        activations="int8",
        progress=progress,
    )
    with contextlib.closing(parts):
        progress(f"running with {residency:.0%} of the experts in RAM", 0.5)
        return _measure(parts, request), parts.memory


def _measure(parts: Parts, request: Request) -> _Seen:
    """Prompts, then tokens after the last of them."""
    runner = Runner(parts, warm=_WARM, keep_routes=True)
    prompt = Test("prompt", request.prompt)
    runner.prepare(prompt)
    prompt_s = _usual(*_timed(runner, prompt))
    tokens = Test("generate", _TOKENS, request.prompt)
    runner.prepare(tokens)
    rate, flash, alone_s = flash_rate_of(parts.engine.residency), list[float](), list[float]()
    before = parts.engine.residency.counts
    seconds, waited = list[float](), list[float]()
    for _ in range(_RUNS):
        flash += [rate.measure()] if rate is not None else []
        alone_s += [rate.alone()] if rate is not None else []
        once, of_which = _timed(runner, tokens, 1)
        seconds, waited = seconds + once, waited + of_which
    flash += [rate.measure()] if rate is not None else []
    counts = parts.engine.residency.counts - before
    by_clock, alone = _usual(seconds, waited)
    return _Seen(
        (by_clock / _TOKENS, alone / _TOKENS),
        prompt_s,
        _trace(parts, runner.routes) if rate is None and runner.routes else None,
        _flash(flash, alone_s, int(record_bytes(parts.weights).max(initial=0))) if flash else None,
        counts.hit_rate if rate is not None else None,
    )


def _flash(rates: Sequence[float], alone_s: Sequence[float], n_bytes: int) -> Flash:
    """From rates with several reads at a time, and seconds of a read of n_bytes by itself."""
    rate = statistics.median(rates)
    return Flash("in this run", rate, max(0.0, statistics.median(alone_s) - n_bytes / rate))


def _usual(seconds: Sequence[float], waited: Sequence[float]) -> tuple[float, float]:
    """Medians of seconds by the clock, and without waiting for processors."""
    alone = [max(one - other, one / 100) for one, other in zip(seconds, waited, strict=True)]
    return statistics.median(seconds), statistics.median(alone)


def _timed(runner: Runner, test: Test, n_runs: int = _RUNS) -> tuple[list[float], list[float]]:
    """Seconds of runs by the clock, and of those the seconds for which threads waited for a processor."""
    seconds, waited = list[float](), list[float]()
    workers = [one.native_id for one in threading.enumerate() if re.fullmatch("edgert-[0-9]+", one.name)]
    computing = [threading.get_native_id(), *(number for number in workers if number is not None)]
    for _ in range(n_runs):
        before = waited_s(computing)
        seconds.append(runner.run(test).seconds)
        waited.append(waited_s(computing) - before)
    return seconds, waited


def waited_s(threads: Sequence[int], tasks: Path = Path("/proc/self/task")) -> float:
    """Seconds that threads were ready to run while others had the processors; 0 where nobody counts (proc(5))."""
    total = 0
    for number in threads:
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has ended
            total += int((tasks / str(number) / "schedstat").read_text().split()[1])
    return total / 1e9


def _trace(parts: Parts, routes: Sequence[Any]) -> Trace:
    """Routes of the tokens that were generated, as they are replayed."""
    ids = np.stack(routes, axis=1)
    return Trace.without_scores("", record_bytes(parts.weights), ids.astype(np.uint16), np.zeros(ids.shape, np.float16))


def _mean(one: Unit, other: Unit) -> Unit:
    """A unit with the means of their rates."""
    int8 = ((one.int8_per_s or 0.0) + (other.int8_per_s or 0.0)) / 2
    halves, read = (one.half_per_s + other.half_per_s) / 2, (one.bytes_per_s + other.bytes_per_s) / 2
    return replace(one, int8_per_s=int8 or None, half_per_s=halves, bytes_per_s=read)

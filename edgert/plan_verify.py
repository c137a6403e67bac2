"""A forecast beside what really happens here: the model run with all experts in RAM, and with half of them on flash.

The machine is measured before, after and between all runs, for its speed moves within seconds; medians and the table of
tensors make a forecast. For the half, hits are those of the routes that the first run took, replayed.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgert.bench_experts import flash_rate_of
from edgert.bench_runner import Runner, Test
from edgert.boards import Board, Flash, Unit
from edgert.errors import MemoryLimitError, OptionError
from edgert.experts.choice import Choice, choice_for
from edgert.experts.trace import Trace
from edgert.loading import Parts, load_parts
from edgert.memory import MemoryPlan
from edgert.needs import record_bytes
from edgert.plan import Planner, Range, Request
from edgert.plan_hits import Hits, replayed_hits, usual_hits
from edgert.plan_machine import board_of, measured_unit, memory_bytes, python_slowness
from edgert.plan_model import PlanModel
from edgert.streaming import model_key
from edgert.weights import Progress

WITHIN = 0.25  # of what is measured, that a forecast should be
RESIDENCIES = (1.0, 0.5)
_TOKENS, _WARM, _RUNS = 32, 32, 5
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


class _Machine:
    """This machine, measured as often as measure() is called; prompts and tokens are each compared with their time."""

    def __init__(self, model: PlanModel, n_prompt: int, threads: int | None) -> None:
        self.model, self.n_prompt, self.threads = model, n_prompt, threads
        self.n_bytes = memory_bytes(model)  # that measuring takes
        self._found = list[tuple[Unit, float]]()
        self._since: dict[str, int] = {}

    def measure(self) -> None:
        """Once more."""
        unit, _ = measured_unit(self.model, self.n_prompt, self.threads, self.n_bytes)
        self._found.append((unit, python_slowness()))

    def begin(self, what: str) -> None:
        """What comes now; the measurement just before it counts for it too."""
        self._since[what] = len(self._found) - 1

    def board(self, what: str, flash: Flash) -> Board:
        """With medians of what was measured from the beginning of `what` to that of the next."""
        later = [since for since in self._since.values() if since > self._since[what]]
        found = self._found[self._since[what] : min(later) + 1 if later else None]
        units = [unit for unit, _ in found]
        rates = [(unit.int8_per_s or 0.0, unit.half_per_s, unit.bytes_per_s) for unit in units]
        int8, half, read = map(statistics.median, zip(*rates, strict=True))
        unit = replace(units[0], int8_per_s=int8 or None, half_per_s=half, bytes_per_s=read)
        return board_of(unit, flash, statistics.median(slowness for _, slowness in found))


def verify(model: PlanModel, request: Request, progress: Progress, threads: int | None = None) -> list[Compared]:
    """Run the model and compare. OptionError for a model that is on paper."""
    if model.path is None or model.path.suffix == ".json":
        raise OptionError(f"--verify runs the model, but {model.source} holds no weights: name a whole model")
    hits, found, request = usual_hits(model.name), list[Compared](), _fitting(request, model)
    for residency in RESIDENCIES if model.config.router else RESIDENCIES[:1]:
        machine = _Machine(model, request.prompt, threads)
        try:
            seen, memory = _run(model, residency, request, machine, progress)
        except MemoryLimitError:
            if residency == 1 and model.config.router:
                continue  # too large for this machine: the half may do
            raise
        if seen.trace is not None:
            hits = _replayed(seen.trace, model.path)
        found += _compare(model, request, machine, (residency, seen, memory), hits)
    return found


def _replayed(trace: Trace, path: Path) -> Hits:
    """Hits of these routes with the policies that loading will take."""

    def choose(residency: float) -> Choice:
        return choice_for(trace.model, residency, trace.record_bytes.shape, path) or Choice()

    return replayed_hits(trace, "routes of the run with all experts in RAM", _WARM, choose)


def _fitting(request: Request, model: PlanModel) -> Request:
    """With a context for all that is run, and a prompt that leaves room for it."""
    others = 2 * _WARM + _RUNS * _TOKENS
    prompt = max(1, min(request.prompt, model.config.n_context - others))
    return replace(request, prompt=prompt, context=max(request.context, min(prompt + others, model.config.n_context)))


def _compare(
    model: PlanModel, request: Request, machine: _Machine, ran: tuple[float, _Seen, MemoryPlan], hits: Hits
) -> list[Compared]:
    """Tokens a second, seconds to the first token, and hits."""
    residency, seen, memory = ran
    flash = seen.flash or Flash("of no use", 1e9, 0.0)
    planners = {what: Planner(model, machine.board(what, flash), request, hits) for what in ("prompts", "tokens")}
    prompts, tokens = (planner.speed(memory, flash) for planner in planners.values())
    found = [
        Compared("tokens a second", residency, tokens.tokens_per_s, *(1 / one for one in seen.token_s)),
        Compared("first token, s", residency, prompts.ttft_s, *seen.prompt_s),
    ]
    if seen.hit_rate is not None:
        rates = planners["tokens"].rates(memory.residency)
        found.append(Compared("found in RAM", residency, rates, seen.hit_rate))
    return found


def _run(
    model: PlanModel, residency: float, request: Request, machine: _Machine, progress: Progress
) -> tuple[_Seen, MemoryPlan]:
    """Load the model, run prompts and random tokens, and close it."""
    progress("measuring this machine", 0.0)
    machine.measure()
    parts = load_parts(
        model.path,
        memory=None,
        residency=residency if model.config.router else None,
        policy="auto",
        prefetch="auto",
        trace=None,
        context=request.context,
        threads=machine.threads,
        device="auto",
        kv_type=request.kv_type,
        activations="int8",
        progress=progress,
        reserved=machine.n_bytes,
    )
    with contextlib.closing(parts):
        progress(f"running with {residency:.0%} of the experts in RAM", 0.5)
        return _measure(parts, request, machine), parts.memory


def _measure(parts: Parts, request: Request, machine: _Machine) -> _Seen:
    """Prompts, then tokens after the last of them."""
    runner = Runner(parts, warm=_WARM, keep_routes=True)
    prompt = Test("prompt", request.prompt)
    runner.prepare(prompt)
    prompts = list[_Timed]()
    machine.begin("prompts")
    for _ in range(_RUNS):
        prompts.append(_timed(runner, prompt))
        machine.measure()
    tokens = Test("generate", _TOKENS, request.prompt)
    runner.prepare(tokens)
    machine.begin("tokens")
    rate, flash, alone_s = flash_rate_of(parts.engine.residency), list[float](), list[float]()
    before, generated = parts.engine.residency.counts, list[_Timed]()
    for _ in range(_RUNS):
        flash += [rate.measure()] if rate is not None else []
        alone_s += [rate.alone()] if rate is not None else []
        generated.append(_timed(runner, tokens))
        machine.measure()
    flash += [rate.measure()] if rate is not None else []
    counts = parts.engine.residency.counts - before
    by_clock, alone = _usual(generated)
    return _Seen(
        (by_clock / _TOKENS, alone / _TOKENS),
        _usual(prompts),
        _trace(parts, runner.routes) if rate is None and runner.routes else None,
        _flash(flash, alone_s, int(record_bytes(parts.weights).max(initial=0))) if flash else None,
        counts.hit_rate if rate is not None else None,
    )


def _flash(rates: Sequence[float], alone_s: Sequence[float], n_bytes: int) -> Flash:
    """From rates with several reads at a time, and seconds of a read of n_bytes by itself."""
    rate = statistics.median(rates)
    return Flash("in this run", rate, max(0.0, statistics.median(alone_s) - n_bytes / rate))


class _Timed(NamedTuple):
    """Seconds of a run by the clock, and of those the seconds for which threads waited for a processor."""

    seconds: float
    waited: float


def _usual(runs: Sequence[_Timed]) -> tuple[float, float]:
    """Medians of seconds by the clock, and without waiting for processors."""
    alone = [max(one.seconds - one.waited, one.seconds / 100) for one in runs]
    return statistics.median(one.seconds for one in runs), statistics.median(alone)


def _timed(runner: Runner, test: Test) -> _Timed:
    """One run."""
    workers = [one.native_id for one in threading.enumerate() if re.fullmatch("edgert-[0-9]+", one.name)]
    computing = [threading.get_native_id(), *(number for number in workers if number is not None)]
    before = waited_s(computing)
    seconds = runner.run(test).seconds
    return _Timed(seconds, waited_s(computing) - before)


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
    key = model_key(parts.file.metadata, parts.engine.config)
    return Trace.without_scores(
        key, record_bytes(parts.weights), ids.astype(np.uint16), np.zeros(ids.shape, np.float16)
    )

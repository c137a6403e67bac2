"""The plan: what a board makes of a model, before the model is there. Memory, time to the first token, tokens a second.

Pure arithmetic over a table of tensors, a board's figures and a rate of hits; nothing is measured here and no weight is
read. Every figure is a range of three: slow, usual, fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from edgert.boards import BOARDS, Board, Flash, Unit
from edgert.errors import MemoryLimitError
from edgert.memory import HEAD_ROOM_SHARE, Budget, MemoryPlan, Needs, plan_memory
from edgert.plan_hits import Hits
from edgert.plan_model import PlanModel
from edgert.plan_parts import Numbers, Part, even_distinct, step_parts


class Reach(NamedTuple):
    """What edgert reaches of a board's figures, as shares: of memory's rate in decoding, of operations in a prompt, of
    flash's rate; and how much of a token's arithmetic goes on while flash is read."""

    read: float
    compute: float
    flash: float
    overlap: float


class Reaches(NamedTuple):
    """What is reached if things go badly, as usual, and well."""

    slow: Reach
    usual: Reach
    fast: Reach


class Range(NamedTuple):
    """One figure if things go badly, as usual, and well."""

    slow: float
    usual: float
    fast: float


# Of what the product kernels do by themselves, on the machine that edgert was measured on; 80 to 86 % of the bound with
# experts on flash.
MEASURED = Reaches(Reach(0.70, 0.65, 0.8, 0.0), Reach(0.95, 0.88, 1.0, 0.0), Reach(1.2, 1.05, 1.1, 1.0))
# On a board that nobody measured, whose figures are estimates too.
UNVERIFIED = Reaches(Reach(0.55, 0.15, 0.6, 0.0), Reach(0.80, 0.30, 1.0, 0.0), Reach(1.0, 0.45, 1.3, 1.0))
# Software, on the machine that edgert was measured on: of a layer that has to wait for flash, of each expert read, of a
# token as a whole, of each token of a prompt, of a barrier between threads.
_LAYER_S, _EXPERT_S, _TOKEN_S, _PROMPT_TOKEN_S, _BARRIER_S = 2.2e-4, 2.2e-4, 1e-4, 2e-5, 3e-7
_BARRIERS = 7  # of a layer


@dataclass(frozen=True)
class Request:
    """What is asked: positions of the context, tokens of the prompt, type of the cache, seconds a token wanted."""

    context: int
    prompt: int
    kv_type: str = "f16"
    tpot_s: float | None = None


@dataclass(frozen=True)
class Speed:
    """With one kind of flash: tokens a second, seconds to the first token of the prompt, and what they are made of.

    arithmetic_s, flash_s: of a usual token. break_even: the rate of hits from which flash takes no longer than
    arithmetic. bound: "compute", "memory" or "flash". twice_flash, twice_memory: usual tokens a second, were flash
    twice as fast, or edgert's memory twice as large.
    """

    flash: Flash
    tokens_per_s: Range
    ttft_s: Range
    arithmetic_s: float
    flash_s: float
    break_even: float | None
    bound: str
    twice_flash: float
    twice_memory: float


@dataclass(frozen=True)
class Wanted:
    """What the wanted seconds a token take: bytes for --memory, or None where none gives them, with the reason."""

    tpot_s: float
    bytes: int | None
    residency: float
    reason: str


@dataclass(frozen=True)
class Plan:
    """A model on a board. memory: None where it does not run, with the reason in `refusal`."""

    model: PlanModel
    board: Board
    request: Request
    budget: int
    memory: MemoryPlan | None
    refusal: str
    hits: Range | None  # None where all experts are in RAM
    hits_source: str
    speeds: tuple[Speed, ...]  # for each kind of flash; one where nothing is read from flash
    decode: tuple[Part, ...]
    prompt: tuple[Part, ...]
    gpu_ttft_s: Range | None  # by the board's GPU, if it computed prompts
    ladder: tuple[tuple[int, float, float], ...]  # --memory in bytes, residency, usual tokens a second
    wanted: Wanted | None

    @property
    def main(self) -> Speed:
        """With the board's usual fast flash."""
        return self.speeds[0]

    def as_dict(self) -> dict[str, Any]:
        """As one JSON document; bytes, seconds, shares."""
        return as_document(self)


class Planner:
    """Plans for one model on one board; `needs` and rates are worked out once."""

    def __init__(self, model: PlanModel, board: Board, request: Request, hits: Hits) -> None:
        self.model, self.board, self.request, self._hits = model, board, request, hits
        self.reaches = MEASURED if board.measured else UNVERIFIED
        self.unit = board.main
        self.numbers = Numbers(cached={"f32": 4.0, "int8": 1.0625}.get(request.kv_type, 2.0))
        if board.cpu is None:
            self.numbers = Numbers(2.0, 2.0, nodes=True)
        self.needs: Needs = model.needs(request.context, request.kv_type, max(self.unit.n_cores, 1))
        self.decode = step_parts(model.weights, 1, request.prompt, self.numbers)
        self.n_layers, self.n_routed = model.config.n_layers, len(model.config.expert_layers)

    # ---- decoding ----------------------------------------------------------------------------------------------------
    def arithmetic_s(self, reach: Reach) -> float:
        """Of a token with all experts in RAM."""
        software = _TOKEN_S * self.board.slowness + _BARRIERS * self.n_layers * _BARRIER_S * self.board.slowness
        if self.board.cpu is None:
            software = 0.0
        return software + sum(part.seconds(self.unit, reach.compute, reach.read) for part in self.decode)

    def flash_s(self, hit_rate: float, flash: Flash, reach: Reach) -> float:
        """Of a token that finds this share of its experts in RAM: bytes over the rate, and what each read takes."""
        router = self.model.config.router
        if router is None or hit_rate >= 1:
            return 0.0
        missed = self.n_routed * router.top_k * (1 - hit_rate)
        waiting = self.n_routed * (1 - hit_rate**router.top_k)  # layers that have to
        slowness = self.board.slowness
        reads = waiting * (_LAYER_S * slowness + flash.latency_s) + missed * _EXPERT_S * slowness
        return self.needs.working_set * (1 - hit_rate) / (flash.bytes_per_s * reach.flash) + reads

    def token_s(self, hit_rate: float, flash: Flash, reach: Reach) -> float:
        """Of a token: arithmetic and flash one after the other, less what goes on at the same time."""
        arithmetic, reading = self.arithmetic_s(reach), self.flash_s(hit_rate, flash, reach)
        return arithmetic + reading - reach.overlap * min(arithmetic, reading)

    def break_even(self, flash: Flash) -> float | None:
        """The rate of hits from which flash takes no longer than arithmetic; None where nothing could be on flash."""
        if self.model.config.router is None:
            return None
        reach = self.reaches.usual
        arithmetic = self.arithmetic_s(reach)
        return _least(lambda rate: self.flash_s(rate, flash, reach) <= arithmetic)

    # ---- a prompt ----------------------------------------------------------------------------------------------------
    def ttft_s(self, plan: MemoryPlan, flash: Flash, reach: Reach) -> float:
        """Seconds to the first token of a prompt, chunk by chunk; a chunk's reads overlap its arithmetic."""
        total, done, n_prompt = 0.0, 0, self.request.prompt
        while done < n_prompt:
            n = min(plan.chunk, n_prompt - done)
            done += n
            parts = step_parts(
                self.model.weights, n, done, self.numbers, n_logits=int(done == n_prompt), distinct=self._distinct
            )
            arithmetic = sum(part.seconds(self.unit, reach.compute, reach.read) for part in parts)
            arithmetic += n * _PROMPT_TOKEN_S * self.board.slowness
            missed = self._missed(n, plan)
            reading = missed * self._mean_expert(plan) / (flash.bytes_per_s * reach.flash)
            first = reading / max(self.n_routed, 1)  # nothing goes on while the first layer's experts come
            total += max(arithmetic, reading - first) + first + missed * _EXPERT_S * self.board.slowness
        return total

    def _missed(self, n_tokens: int, plan: MemoryPlan) -> float:
        """Experts that a chunk reads, in all layers."""
        if not plan.slots:
            return 0.0
        return self._distinct(n_tokens) * self.n_routed * (1 - min(1.0, plan.residency / self._hits.in_play))

    def _mean_expert(self, plan: MemoryPlan) -> float:
        """Bytes of an expert."""
        router = self.model.config.router
        return plan.all_experts / (self.n_routed * router.n_expert) if router else 0.0

    def _distinct(self, n_tokens: int) -> float:
        """Experts of a layer that a chunk uses."""
        router = self.model.config.router
        return even_distinct(router.n_expert, router.top_k, n_tokens) * self._hits.in_play if router else 0.0

    def unit_ttft_s(self, unit: Unit) -> Range:
        """Of the prompt's arithmetic alone on another unit, in 16-bit floats."""
        parts = step_parts(self.model.weights, self.request.prompt, self.request.prompt, Numbers(2.0, 2.0, nodes=True))
        halves = replace(unit, int8_per_s=None)
        shares = ((0.1, 0.4), (0.25, 0.6), (0.5, 0.8))  # of operations and of bytes: of what nobody has run, guesses
        return Range(*(sum(part.seconds(halves, *both) for part in parts) for both in shares))

    # ---- all of it ---------------------------------------------------------------------------------------------------
    def rates(self, residency: float) -> Range:
        """Shares of experts found in RAM."""
        return Range(1.0, 1.0, 1.0) if residency >= 1 else Range(*self._hits.at(residency))

    def speed(self, plan: MemoryPlan, flash: Flash) -> Speed:
        """What a memory plan gives with a kind of flash."""
        rates = self.rates(plan.residency)
        seconds = [self.token_s(rate, flash, reach) for rate, reach in zip(rates, self.reaches, strict=True)]
        usual = self.reaches.usual
        arithmetic, reading = self.arithmetic_s(usual), self.flash_s(rates.usual, flash, usual)
        return Speed(
            flash,
            Range(*(1 / one for one in seconds)),
            Range(*(self.ttft_s(plan, flash, reach) for reach in self.reaches)),
            arithmetic,
            reading,
            self.break_even(flash),
            "flash" if reading > arithmetic else self._bound(),
            1 / self.token_s(rates.usual, replace(flash, bytes_per_s=2 * flash.bytes_per_s), usual),
            1 / self.token_s(self.rates(self._residency(2 * plan.total)).usual, flash, usual),
        )

    def _residency(self, n_bytes: int) -> float:
        """The share of the experts that so much memory holds."""
        needs = self.needs
        others = needs.plan(min(needs.work), needs.least_slots).total - needs.least_slots
        return min(1.0, (n_bytes - others) / needs.cold) if needs.cold else 1.0

    def _bound(self) -> str:
        """What takes most of the arithmetic."""
        reach = self.reaches.usual
        seconds = dict.fromkeys(("memory", "compute"), 0.0)
        for part in self.decode:
            computing = part.count * part.operations / (part.peak(self.unit) * reach.compute)
            took = part.seconds(self.unit, reach.compute, reach.read)
            seconds["compute" if computing >= took else "memory"] += took
        return max(seconds, key=seconds.__getitem__)

    def wanted(self, tpot_s: float, flash: Flash) -> Wanted:
        """The smallest memory whose usual token takes at most tpot_s."""
        reach, needs, least = self.reaches.usual, self.needs, self.needs.least_budget
        arithmetic, whole = self.arithmetic_s(reach), needs.plan(min(needs.work))
        if arithmetic > tpot_s:
            return Wanted(tpot_s, None, 1.0, f"with all experts in RAM a token takes {1e3 * arithmetic:.0f} ms already")
        if not needs.streams or not needs.cold:
            return Wanted(tpot_s, max(whole.total, least), 1.0, "all of the model is in RAM")

        def enough(residency: float) -> bool:
            return self.token_s(self.rates(residency).usual, flash, reach) <= tpot_s

        residency = max(_least(enough), needs.least_slots / needs.cold)
        slots = math.ceil(residency * needs.cold)
        found = needs.plan(min(needs.work), slots if residency < 1 else 0)
        if max(found.total, least) >= whole.total:
            found, residency = whole, 1.0
        rate = self.rates(residency).usual
        says = f"{residency:.0%} of the experts in RAM, {rate:.0%} found there"
        return Wanted(tpot_s, max(found.total, least), residency, says)

    def ladder(self, flash: Flash) -> list[tuple[int, float, float]]:
        """Sizes of memory, the residency that each gives, and usual tokens a second; none that all experts fit too."""
        needs, reach, rungs = self.needs, self.reaches.usual, []
        if not needs.streams or not needs.cold:
            return []
        least = needs.least_slots / needs.cold
        for residency in sorted({least, *(share for share in (0.125, 0.25, 0.5, 0.75) if share > least), 1.0}):
            plan = needs.plan(min(needs.work), int(residency * needs.cold) if residency < 1 else 0)
            n_bytes = max(plan.total, needs.least_budget)
            rungs.append((n_bytes, residency, 1 / self.token_s(self.rates(residency).usual, flash, reach)))
        return [rung for rung in rungs if rung is rungs[-1] or rung[0] < rungs[-1][0]]


def _least(holds: Callable[[float], bool]) -> float:
    """The least share from 0 to 1 from which something holds; 1 where only that does."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def usable(board: Board) -> int:
    """Bytes of a board's memory that edgert may take where nobody says: what the system leaves, less a head-room."""
    return int((board.ram_bytes - board.system_bytes) * (1 - HEAD_ROOM_SHARE))


def _holding(floor: int) -> str:
    """Names of the boards that edgert runs on and that have room for a model, the smallest first."""
    runs = [board for board in BOARDS.values() if board.cpu is not None and not board.obstacle]
    found = sorted((board for board in runs if usable(board) >= floor), key=lambda board: board.ram_bytes)
    return ", ".join(board.name for board in found) or "none of those that are known"


def make_plan(model: PlanModel, board: Board, request: Request, hits: Hits, budget: Budget | None = None) -> Plan:
    """The plan of a model on a board. budget: what --memory states, by default what the board leaves."""
    planner = Planner(model, board, request, hits)
    limit = usable(board)
    budget = budget or Budget(limit, None, limit, strict=True, elsewhere=not board.measured)
    memory, refusal = None, ""
    try:
        memory = plan_memory(planner.needs, budget)
    except MemoryLimitError as error:
        refusal = str(error)
        if budget.elsewhere and budget.free < planner.needs.least_budget:
            refusal += f", or a board that holds it: {_holding(planner.needs.least_budget)}"
    speeds, flashes = tuple[Speed, ...](), board.flash
    if memory is not None:
        speeds = tuple(planner.speed(memory, flash) for flash in (flashes if memory.slots else flashes[:1]))
    reads_flash = memory is not None and memory.slots
    n_chunk = min(memory.chunk if memory else request.prompt, request.prompt)
    return Plan(
        model,
        board,
        request,
        budget.n_bytes,
        memory,
        refusal,
        planner.rates(memory.residency) if memory is not None and reads_flash else None,
        hits.source,
        speeds,
        tuple(planner.decode),
        tuple(step_parts(model.weights, n_chunk, n_chunk, planner.numbers)),
        planner.unit_ttft_s(board.gpu) if board.cpu and board.gpu else None,
        tuple(planner.ladder(flashes[0])),
        None if request.tpot_s is None else planner.wanted(request.tpot_s, flashes[0]),
    )


# ---- as a document ---------------------------------------------------------------------------------------------------
def as_document(plan: Plan) -> dict[str, Any]:
    """Plain values of a plan."""
    model, board, unit = plan.model, plan.board, plan.board.main
    return {
        "schema": 1,
        "model": {
            "name": model.name,
            "source": model.source,
            "architecture": model.config.architecture,
            "parameters": model.n_parameters,
            "active_parameters": model.active_parameters,
            "file_bytes": model.file_bytes,
        },
        "board": {**asdict(board), "verified": board.measured},
        "request": asdict(plan.request),
        "memory_budget": plan.budget,
        "memory": None if plan.memory is None else plan.memory.as_dict(),
        "refusal": plan.refusal or None,
        "warning": plan.memory.warning if plan.memory is not None else "",
        "hit_rate": None if plan.hits is None else plan.hits._asdict(),
        "hit_rate_source": plan.hits_source,
        "speeds": [_speed(speed) for speed in plan.speeds],
        "gpu_ttft_s": None if plan.gpu_ttft_s is None else plan.gpu_ttft_s._asdict(),
        "by_memory": [
            {"memory": memory, "residency": residency, "tokens_per_s": rate} for memory, residency, rate in plan.ladder
        ],
        "wanted": None if plan.wanted is None else asdict(plan.wanted),
        "parts": {"decode": _parts(plan.decode, unit), "prompt": _parts(plan.prompt, unit)},
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        **asdict(speed),
        "tokens_per_s": speed.tokens_per_s._asdict(),
        "tpot_s": Range(*(1 / rate for rate in speed.tokens_per_s))._asdict(),
        "ttft_s": speed.ttft_s._asdict(),
    }


def _parts(parts: tuple[Part, ...], unit: Unit) -> list[dict[str, Any]]:
    return [
        {
            "part": part.name,
            "count": part.count,
            "operations": part.operations,
            "bytes": part.n_bytes,
            "intensity": None if math.isinf(part.intensity) else part.intensity,
            "operations_per_s": part.rate(unit),
            "bound": part.bound(unit),
            "seconds": part.seconds(unit),
        }
        for part in parts
    ]

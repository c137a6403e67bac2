"""A plan for a person: first what decides, then what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from edgert.cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from edgert.memory import MemoryPlan
    from edgert.plan import Plan, Range, Speed
    from edgert.plan_parts import Part
    from edgert.types import ModelConfig

_GIB = 1 << 30
_READING = 5.0  # tokens a second: 230 words a minute, at four tokens for three words


def show(plans: Sequence[Plan]) -> None:
    """The first screen; for one board also memory by kind, other sizes of it, and each part of a step."""
    screen = output.console()
    for line in heading(plans[0]):
        screen.print(output.harmless(line))
    screen.width = max(screen.width, 60 + 38 * len(plans))
    screen.print()
    screen.print(summary(plans))
    screen.print()
    for line in verdict(plans):
        screen.print(output.harmless(line))
    if len(plans) == 1 and plans[0].memory is not None:
        for table in tables(plans[0]):
            screen.print()
            screen.print(table)
    screen.print()
    for line in notes(plans):
        screen.print(output.harmless(line), style="dim")


def heading(plan: Plan) -> Iterator[str]:
    """The model in two lines."""
    model, c, context = plan.model, plan.model.config, f"a context of {plan.request.context:,} tokens"
    yield (
        f"{model.name}: {model.n_parameters / 1e9:.3g} billion parameters, {model.active_parameters / 1e9:.2g} of them "
        f"for each token; {size(model.file_bytes)} ({model.source})"
    )
    if c.router is None:
        yield f"{c.n_layers} layers, no experts: all of it stays in RAM; {context}"
        return
    cold = int(model.record_bytes.sum())
    used = cold * c.router.top_k // c.router.n_expert
    yield (
        f"{_layers(c)} of {c.router.n_expert} experts, {c.router.top_k} used: {size(cold)} of experts, "
        f"{size(used)} of them for each token; {context}"
    )


def _layers(c: ModelConfig) -> str:
    """How many layers there are, and how many of them have experts."""
    n = len(c.expert_layers)
    return f"{c.n_layers} layers" if n == c.n_layers else f"{c.n_layers} layers, {n} of them"


# ---- the first screen ------------------------------------------------------------------------------------------------
def summary(plans: Sequence[Plan]) -> Table:
    """A column for each board."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(plan.board.title, no_wrap=True)
    for name, cell in _rows(plans):
        cells = [cell(plan) for plan in plans]
        if any(cells):
            table.add_row(name, *cells)
    return table


def _rows(plans: Sequence[Plan]) -> Iterator[tuple[str, Callable[[Plan], str]]]:
    """Names of rows, and what they say of a plan; a kind of flash that some board has gets rows of its own."""
    kinds = list(dict.fromkeys(speed.flash.name for plan in plans for speed in plan.speeds if plan.hits is not None))
    yield "edgert runs there", _runs
    for place, kind in enumerate(kinds or [""]):
        yield "answer" * (place == 0) + f"{'  from ' + kind if kind else ''}", partial(_speed, kind, place)
    for place, kind in enumerate(kinds or [""]):
        name = f"first token of {plans[0].request.prompt:,}" if place == 0 else ""
        yield f"{name}{'  from ' + kind if kind else ''}", partial(_first, kind, place)
    yield "what takes the time", _bound
    yield "memory for edgert", _memory
    yield "smallest budget", _floor
    yield "experts in RAM", _experts
    yield "found there when asked for", _hits
    yield "break-even (flash as fast)", _even
    yield "with twice the flash rate", partial(_twice, "twice_flash")
    yield "with twice the memory", partial(_twice, "twice_memory")
    yield "all experts in RAM", _whole
    yield "for the time wanted", _wanted


def _runs(plan: Plan) -> str:
    if plan.memory is None:
        return "no: too little memory"
    if plan.board.obstacle:
        return "no, for planning only"
    if plan.board.cpu is None:
        return "no, for comparison only"
    return "" if plan.board.measured else "should; nobody has tried"


def _named(plan: Plan, kind: str, place: int) -> Speed | None:
    """A plan's speed with a kind of flash; without flash the only one."""
    if plan.hits is None:
        return plan.speeds[0] if plan.speeds and place == 0 else None
    return next((speed for speed in plan.speeds if speed.flash.name == kind), None)


def _speed(kind: str, place: int, plan: Plan) -> str:
    one = _named(plan, kind, place)
    if one is None:
        return ""
    at = f", {rate(one.flash.bytes_per_s)}" if plan.hits is not None else ""
    return f"{span(one.tokens_per_s, figure)} tok/s{at}"


def _first(kind: str, place: int, plan: Plan) -> str:
    one = _named(plan, kind, place)
    return "" if one is None else span(one.ttft_s, seconds)


def _memory(plan: Plan) -> str:
    of = f" of {plan.board.ram_bytes / _GIB:.0f}" if not plan.board.measured else ""
    return f"{plan.budget / _GIB:.1f}{of} GiB"


def _floor(plan: Plan) -> str:
    request = plan.request
    cores = max(plan.board.main.n_cores, 1)
    return _option(plan, plan.model.needs(request.context, request.kv_type, cores).least_budget)


def _option(plan: Plan, n_bytes: int) -> str:
    there = "" if n_bytes <= plan.board.ram_bytes else ", more than it has"
    return f"--memory {-(-n_bytes // (1 << 20))}MiB{there}"


def _experts(plan: Plan) -> str:
    if plan.memory is None or plan.model.config.router is None:
        return ""
    return f"{plan.memory.residency:.0%}, {size(plan.memory.cold + plan.memory.slots)}"


def _hits(plan: Plan) -> str:
    return "" if plan.hits is None else span(plan.hits, "{:.0%}".format)


def _bound(plan: Plan) -> str:
    if not plan.speeds:
        return ""
    one = plan.main
    if plan.hits is None:
        return f"{_BOUNDS[one.bound]}: {milliseconds(one.arithmetic_s)} a token"
    return f"{_BOUNDS[one.bound]}: {milliseconds(one.flash_s)} flash, {milliseconds(one.arithmetic_s)} the rest"


_BOUNDS = {"flash": "flash", "memory": "RAM", "compute": "arithmetic"}


def _even(plan: Plan) -> str:
    return "" if plan.hits is None or plan.main.break_even is None else f"{plan.main.break_even:.1%} found in RAM"


def _twice(what: str, plan: Plan) -> str:
    return "" if plan.hits is None else f"{figure(getattr(plan.main, what))} tok/s"


def _whole(plan: Plan) -> str:
    if plan.hits is None or not plan.ladder:
        return ""
    memory, _, tokens = plan.ladder[-1]
    return f"{figure(tokens)} tok/s, takes {memory / _GIB:.1f} GiB"


def _wanted(plan: Plan) -> str:
    if plan.wanted is None:
        return ""
    if plan.wanted.bytes is None:
        return "at no memory"
    return _option(plan, plan.wanted.bytes)


def verdict(plans: Sequence[Plan]) -> Iterator[str]:
    """What follows from the table, in sentences."""
    running = [plan for plan in plans if plan.speeds]
    if len(running) > 1:
        best, *others = sorted(running, key=lambda plan: -plan.main.tokens_per_s.usual)
        for other in others:
            a, b = best.main, other.main
            sure = "sure" if a.tokens_per_s.slow > b.tokens_per_s.fast else "likely, not sure: the ranges overlap"
            yield (
                f"{best.board.title} answers {a.tokens_per_s.usual / b.tokens_per_s.usual:.1f} times as fast as "
                f"{other.board.title} ({sure}); first token after {seconds(a.ttft_s.usual)} instead of "
                f"{seconds(b.ttft_s.usual)}."
            )
    for plan in running:
        yield from _advice(plan)
    if any(plan.hits is not None and plan.main.bound == "flash" for plan in plans):
        if plans[0].model.source.startswith("preset") and "Q3_K_M" not in plans[0].model.source:
            yield "Fewer bits a weight help too: plan for the same name with :q3_k_m behind it."
    for plan in plans:
        if plan.refusal:
            yield f"{plan.board.title}: {plan.refusal}."
        elif plan.memory is not None and plan.memory.warning:
            yield f"{plan.board.title}: {plan.memory.warning}."
        if plan.board.obstacle:
            yield f"{plan.board.title}: {plan.board.obstacle}."
        if plan.wanted is not None:
            yield f"{plan.board.title}, {milliseconds(plan.wanted.tpot_s)} a token: {plan.wanted.reason}."


def _advice(plan: Plan) -> Iterator[str]:
    """Whether one can read along, and what would help most on a board."""
    one, name = plan.main, plan.board.title
    slow, usual, fast = one.tokens_per_s
    if fast < _READING:
        yield f"{name}: slower than people read, which is about {_READING:.0f} tokens a second."
    elif slow < _READING:
        likely = "likely" if usual >= _READING else "not likely"
        yield f"{name}: {likely} as fast as people read, about {_READING:.0f} tokens a second."
    if plan.hits is not None and one.bound == "flash":
        if one.twice_memory >= one.twice_flash:
            yield f"{name}: memory helps most: twice as much gives {one.twice_memory / usual:.1f} times the speed."
        else:
            yield f"{name}: flash helps most: twice its rate gives {one.twice_flash / usual:.1f} times the speed."
    if plan.gpu_ttft_s is not None and one.ttft_s.usual > 2 * plan.gpu_ttft_s.usual:
        yield (
            f"{name}: these figures are for its CPU; its GPU could compute that prompt in "
            f"{span(plan.gpu_ttft_s, seconds)}, reading experts not counted."
        )


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """Where figures are from."""
    yield "Each figure: as usual (and the range, from where much goes badly to where all goes well)."
    if any(plan.hits is not None for plan in plans):
        yield f"Found in RAM: {plans[0].hits_source}."
    if any(not plan.board.measured for plan in plans):
        yield (
            "Nobody has measured edgert on these boards: their rates are from data sheets and from others' "
            "measurements, and the ranges allow for it."
        )
    for plan in plans:
        said = "; ".join(plan.board.remarks)
        yield f"{plan.board.title}: {said + '; ' if said else ''}from {'; '.join(plan.board.sources)}."


# ---- what it is made of ----------------------------------------------------------------------------------------------
def plain_table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def tables(plan: Plan) -> Iterator[Table]:
    """All of one board."""
    assert plan.memory is not None
    yield memory_table(plan.memory)
    if plan.ladder:
        yield ladder_table(plan)
    yield parts_table("a token", plan.decode, plan)
    yield parts_table("a chunk of the prompt", plan.prompt, plan)


def ladder_table(plan: Plan) -> Table:
    """What other sizes of memory would give."""
    table = plain_table("--memory", "experts in RAM", "answer")
    for memory, residency, tokens in plan.ladder:
        table.add_row(f"{-(-memory // (1 << 20)):,} MiB", f"{residency:.0%}", f"{figure(tokens)} tok/s")
    return table


def memory_table(found: MemoryPlan) -> Table:
    """The ledger."""
    table = plain_table("memory", "MiB")
    kinds = {
        "process": found.process,
        "tokenizer": found.tokenizer,
        "hot weights": found.hot,
        "attention cache": found.kv,
        "work space": found.work,
        "read buffers": found.buffers,
        "experts": found.cold + found.slots,
        "in all": found.total,
    }
    for name, n_bytes in kinds.items():
        if n_bytes:
            table.add_row(name, f"{-(-n_bytes // (1 << 20)):,}")
    return table


def parts_table(name: str, parts: Sequence[Part], plan: Plan) -> Table:
    """Operations, bytes and bounds."""
    unit = plan.board.main
    table = plain_table(
        f"parts of {name}", "times", "operations", "bytes", "op/byte", "op/s at most", "bound", "at most"
    )
    for part in parts:
        intensity = "" if math.isinf(part.intensity) else f"{part.intensity:,.4g}"
        bound = "" if math.isinf(part.intensity) else part.bound(unit)
        table.add_row(
            part.name,
            f"{part.count:g}",
            scaled(part.operations),
            scaled(part.n_bytes),
            intensity,
            scaled(part.rate(unit)),
            bound,
            duration(part.seconds(unit)),
        )
    if plan.hits is not None and parts is plan.decode and plan.memory is not None:
        n_bytes = plan.memory.working_set * (1 - plan.hits.usual)
        cold = sum(part.count * part.operations for part in parts if part.cold) * (1 - plan.hits.usual)
        flash = plan.main.flash
        each = cold / n_bytes if n_bytes else math.inf
        table.add_row(
            "experts from flash",
            "1",
            "",
            scaled(n_bytes),
            f"{each:,.4g}",
            scaled(each * flash.bytes_per_s),
            "flash",
            duration(plan.main.flash_s),
        )
    return table


# ---- figures ---------------------------------------------------------------------------------------------------------
def span(figures: Range, words: Callable[[float], str]) -> str:
    """2.8  (0.99 to 8.0)"""
    low, high = sorted((figures.slow, figures.fast))
    return f"{words(figures.usual)}  ({words(low)} to {words(high)})"


def figure(value: float) -> str:
    """Two digits that count."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def seconds(value: float) -> str:
    """17 s, 0.42 s, 13 ms, 3 min, 5.9 h."""
    if value >= 7200:
        return f"{figure(value / 3600)} h"
    if value < 0.1:
        return milliseconds(value)
    return f"{value / 60:.0f} min" if value >= 120 else f"{figure(value)} s"


def milliseconds(value: float) -> str:
    """278 ms, 2.9 ms."""
    return f"{1e3 * value:,.0f} ms" if value >= 0.01 else f"{1e3 * value:.1f} ms"


def duration(value: float) -> str:
    """From microseconds on."""
    return f"{1e6 * value:.1f} µs" if value < 1e-3 else f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def scaled(value: float) -> str:
    """69G, 302M, 1.34T: three digits and a decimal unit."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def rate(value: float) -> str:
    """1.8 GB/s."""
    return f"{value / 1e9:.2g} GB/s" if value >= 1e9 else f"{value / 1e6:.0f} MB/s"


def size(n_bytes: float) -> str:
    """In binary units."""
    return output.binary_size(n_bytes)

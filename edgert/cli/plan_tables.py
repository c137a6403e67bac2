"""A plan for a person: first what decides, then what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from edgert.cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from edgert.plan import Plan, Range
    from edgert.plan_parts import Part

_MOST_BOARDS = 4  # beside each other; more make a table of rows
_GIB = 1 << 30


def show(plans: Sequence[Plan]) -> None:
    """The first screen; for one board also memory by kind, and each part of a step."""
    screen = output.console()
    for line in heading(plans[0]):
        screen.print(output.harmless(line))
    screen.width = max(screen.width, 60 + 34 * len(plans))
    screen.print()
    screen.print(summary(plans))
    screen.print()
    for line in verdict(plans):
        screen.print(output.harmless(line))
    if len(plans) == 1 and plans[0].memory is not None:
        screen.print()
        screen.print(memory_table(plans[0]))
        for name, parts in (("a token", plans[0].decode), ("a chunk of the prompt", plans[0].prompt)):
            screen.print()
            screen.print(parts_table(name, parts, plans[0]))
    screen.print()
    for line in notes(plans):
        screen.print(output.harmless(line), style="dim")


def heading(plan: Plan) -> Iterator[str]:
    """The model in two lines."""
    model = plan.model
    c = model.config
    yield (
        f"{model.name}: {model.n_parameters / 1e9:.3g} billion parameters, {model.active_parameters / 1e9:.2g} of them "
        f"for each token; {size(model.file_bytes)} ({model.source})"
    )
    if c.router is not None:
        cold = int(model.record_bytes.sum())
        used = cold * c.router.top_k // c.router.n_expert
        yield (
            f"{c.n_layers} layers of {c.router.n_expert} experts, {c.router.top_k} used: {size(cold)} of experts, "
            f"{size(used)} of them for each token; a context of {plan.request.context:,} tokens"
        )
    else:
        yield f"{c.n_layers} layers, no experts: all of it stays in RAM; a context of {plan.request.context:,} tokens"


# ---- the first screen ------------------------------------------------------------------------------------------------
def summary(plans: Sequence[Plan]) -> Table:
    """A column for each board."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(plan.board.title, no_wrap=True)
    for name, cell in _ROWS:
        cells = [cell(plan) for plan in plans]
        if any(cells):
            table.add_row(name.format(prompt=f"{plans[0].request.prompt:,}"), *cells)
    return table


def _runs(plan: Plan) -> str:
    if plan.memory is None:
        return "no: too little memory"
    if plan.board.obstacle:
        return "no, for planning only (see below)"
    return "" if plan.board.measured else "should; nobody has tried"


def _memory(plan: Plan) -> str:
    of = f" of {plan.board.ram_bytes / _GIB:.0f}" if not plan.board.measured else ""
    return f"{plan.budget / _GIB:.1f}{of} GiB"


def _experts(plan: Plan) -> str:
    if plan.memory is None or plan.model.config.router is None:
        return ""
    return f"{plan.memory.residency:.0%}, {size(plan.memory.cold + plan.memory.slots)}"


def _hits(plan: Plan) -> str:
    if plan.hits is None:
        return "" if plan.memory is None or plan.model.config.router is None else "100 %"
    return f"{plan.hits.usual:.0%}  ({plan.hits.slow:.0%} to {plan.hits.fast:.0%})"


def _speed(place: int) -> Callable[[Plan], str]:
    def cell(plan: Plan) -> str:
        if place >= len(plan.speeds):
            return ""
        one = plan.speeds[place]
        from_flash = f", {one.flash.name} {rate(one.flash.bytes_per_s)}" if plan.hits is not None else ""
        return f"{span(one.tokens_per_s, figure)} tok/s{from_flash}"

    return cell


def _first(place: int) -> Callable[[Plan], str]:
    def cell(plan: Plan) -> str:
        return span(plan.speeds[place].ttft_s, seconds) if place < len(plan.speeds) else ""

    return cell


def _bound(plan: Plan) -> str:
    if not plan.speeds:
        return ""
    one = plan.main
    if plan.hits is None:
        return f"{one.bound}, {milliseconds(one.arithmetic_s)} a token"
    return f"{one.bound}: {milliseconds(one.flash_s)} flash + {milliseconds(one.arithmetic_s)} RAM"


def _even(plan: Plan) -> str:
    if plan.hits is None or plan.main.break_even is None:
        return ""
    return f"{plan.main.break_even:.1%} found in RAM"


def _whole(plan: Plan) -> str:
    if plan.hits is None or not plan.ladder:
        return ""
    memory, _, tokens = plan.ladder[-1]
    return f"{figure(tokens)} tok/s with {memory / _GIB:.1f} GiB"


def _wanted(plan: Plan) -> str:
    if plan.wanted is None:
        return ""
    if plan.wanted.bytes is None:
        return "at no memory"
    there = "" if plan.wanted.bytes <= plan.board.ram_bytes else ", more than it has"
    return f"--memory {-(-plan.wanted.bytes // (1 << 20))}MiB{there}"


_ROWS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("edgert runs there", _runs),
    ("memory for edgert", _memory),
    ("experts in RAM", _experts),
    ("found there when asked for", _hits),
    ("answer", _speed(0)),
    ("", _speed(1)),
    ("", _speed(2)),
    ("first token of {prompt}", _first(0)),
    ("", _first(1)),
    ("", _first(2)),
    ("what takes the time", _bound),
    ("as much flash as RAM at", _even),
    ("all experts in RAM", _whole),
    ("for the time wanted", _wanted),
)


def verdict(plans: Sequence[Plan]) -> Iterator[str]:
    """What follows from the table, in sentences."""
    running = [plan for plan in plans if plan.speeds]
    if len(running) > 1:
        best, *others = sorted(running, key=lambda plan: -plan.main.tokens_per_s.usual)
        for other in others[:2]:
            a, b = best.main.tokens_per_s, other.main.tokens_per_s
            sure = "the ranges do not meet" if a.slow > b.fast else "the ranges overlap"
            yield (
                f"{best.board.title} answers {a.usual / b.usual:.1f} times as fast as {other.board.title} ({sure}); "
                f"its first token takes {best.main.ttft_s.usual / other.main.ttft_s.usual:.0%} of the time."
            )
    for plan in running:
        yield from _advice(plan)
        if plan.memory is not None and plan.memory.warning:
            yield f"{plan.board.title}: {plan.memory.warning}."
    for plan in plans:
        if plan.refusal:
            yield f"{plan.board.title}: {plan.refusal}."
        if plan.board.obstacle:
            yield f"{plan.board.title}: {plan.board.obstacle}."
        if plan.wanted is not None and (plan.wanted.bytes is None or plan.wanted.bytes > plan.board.ram_bytes):
            yield f"{plan.board.title}: {milliseconds(plan.wanted.tpot_s)} a token: {plan.wanted.reason}."


def _advice(plan: Plan) -> Iterator[str]:
    """What would help most on a board."""
    if len(plan.speeds) > 1:
        fast, slow = plan.speeds[0], plan.speeds[-1]
        times = fast.tokens_per_s.usual / slow.tokens_per_s.usual
        if times > 1.5:
            yield f"{plan.board.title}: {fast.flash.name} makes it {times:.0f} times as fast as {slow.flash.name}."
    if plan.gpu_ttft_s is not None and plan.main.ttft_s.usual > 2 * plan.gpu_ttft_s.usual:
        yield (
            f"{plan.board.title}: these figures are for its CPU; its GPU could compute that prompt in "
            f"{span(plan.gpu_ttft_s, seconds)}, reading experts not counted."
        )


def notes(plans: Sequence[Plan]) -> Iterator[str]:
    """Where figures are from."""
    if any(plan.hits is not None for plan in plans):
        yield f"Found in RAM: {plans[0].hits_source}."
    if any(not plan.board.measured for plan in plans):
        yield (
            "Figure (slow to fast). Nobody has measured edgert on these boards: rates are from data sheets and others' "
            "measurements, the ranges allow for that."
        )
    for plan in plans:
        for line in (*plan.board.remarks, *(f"from {source}" for source in plan.board.sources)):
            yield f"{plan.board.title}: {line}"


# ---- what it is made of ----------------------------------------------------------------------------------------------
def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def memory_table(plan: Plan) -> Table:
    """The ledger, and what other sizes would give."""
    table, found = _table("memory", "MiB"), plan.memory
    assert found is not None
    kinds = {
        "process": found.process,
        "tokenizer": found.tokenizer,
        "hot weights": found.hot,
        "attention cache": found.kv,
        "work space": found.work,
        "read buffers": found.buffers,
        "experts": found.cold + found.slots,
        "in all": found.total,
        "least that runs": found.floor,
    }
    for name, n_bytes in kinds.items():
        if n_bytes:
            table.add_row(name, f"{-(-n_bytes // (1 << 20)):,}")
    return table


def parts_table(name: str, parts: Sequence[Part], plan: Plan) -> Table:
    """Operations, bytes and bounds."""
    unit = plan.board.main
    table = _table(f"parts of {name}", "times", "operations", "bytes", "op/byte", "op/s at most", "bound", "at most")
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
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def seconds(value: float) -> str:
    """17 s, 0.42 s, 3 min."""
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

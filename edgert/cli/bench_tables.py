"""The figures of `edgert bench` as tables for a person; it gets the document that is printed as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgert.cli import output

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = (
    "test",
    "tok/s",
    "min - max",
    "first token",
    "per token",
    "read a token",
    "GB/s",
    "of read",
    "Gop/s",
    "of int8",
)


def show(document: dict[str, Any]) -> None:
    """The report as tables, as wide as they are: a pipe gets them whole."""
    screen = output.console()
    for line in _heading(document):
        screen.print(line, style="dim")
    screen.width = max(screen.width, 160)
    screen.print()
    if "curve" in document:
        screen.print(_curve(document["curve"]))
        screen.print()
        for line in _notes(document["curve"]):
            screen.print(line)
        for row in document["curve"]:
            tests = [{**test, "test": f"{_share(row)} {test['test']}"} for test in row.get("tests", [])]
            for line in _board(tests, document["settings"]["repetitions"], document["machine"]["power"]):
                screen.print(output.harmless(line))
        return
    table = _table(_COLUMNS)
    for test in document["tests"]:
        table.add_row(*_cells(test))
    screen.print(table)
    screen.print()
    for test in document["tests"]:
        if test["phases_s_per_token"]:
            screen.print(f"{test['test']}: {_phases(test['phases_s_per_token'])}")
    for test in document["tests"]:
        if test["experts"] is not None:
            screen.print(f"{test['test']}: {_experts(test['experts'])}")
    for line in _board(document["tests"], document["settings"]["repetitions"], document["machine"]["power"]):
        screen.print(output.harmless(line))


def _table(columns: tuple[str, ...]) -> Table:
    """An empty table of numbers behind names."""
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _heading(document: dict[str, Any]) -> Iterator[str]:
    """What was measured, and what the machine can do."""
    model, machine, ceiling = document["model"], document["machine"], document.get("ceiling")
    threads = f"{machine['threads']} threads" if machine["threads"] > 1 else "1 thread"
    size, runs = output.binary_size(model["file_bytes"]), document["settings"]["repetitions"]
    yield output.harmless(f"{model['name']}, {size}; medians of {runs} runs")
    yield output.harmless(f"{machine['cpu']}, {threads}, {machine['instructions'] or 'nothing compiled'}")
    if "sudo" in (machine["power_problem"] or ""):
        yield f"no energy: {machine['power_problem']}"
    if ceiling is None:
        return
    parts = [f"{ceiling['int8_gop_per_s']:,.0f} G int8 operations/s"]
    if ceiling["read_gb_per_s"] is None:
        parts.append("memory speed not measured, too little is free")
    else:
        of = output.binary_size(ceiling["read_bytes"])
        of += "" if ceiling["read_bytes"] >= 1 << 30 else ", no more was free: caches may help"
        parts.insert(0, f"reads {ceiling['read_gb_per_s']:.1f} GB/s ({of})")
    yield "this machine, in this run: " + ", ".join(parts)


def _cells(test: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    return (
        test["test"],
        f"{test['tokens_per_s']:.1f}",
        f"{test['tokens_per_s_min']:.1f} - {test['tokens_per_s_max']:.1f}",
        "" if test["ttft_s"] is None else f"{test['ttft_s']:.3f} s",
        "" if test["tpot_s"] is None else f"{test['tpot_s'] * 1e3:.2f} ms",
        output.binary_size(test["bytes_per_token"]),
        f"{test['read_gb_per_s']:.1f}",
        _percent(test["read_share"]),
        f"{test['int8_gop_per_s']:.1f}",
        _percent(test["int8_share"]),
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _phases(phases: dict[str, float]) -> str:
    """Shares of one run that went layer by layer."""
    whole = sum(phases.values())
    parts = sorted(phases.items(), key=lambda phase: -phase[1])
    return ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts if seconds >= 0.005 * whole)


def _board(tests: Sequence[dict[str, Any]], n_runs: int, covers: str | None) -> Iterator[str]:
    """What the board did meanwhile: energy, where it tells, heat that slowed it down, and threads that it cost."""
    for test in tests:
        board = test["board"]
        if board["tokens_per_joule"] is not None:
            yield f"{test['test']}: {board['tokens_per_joule']:.3g} tokens a joule, {board['watts']:.1f} W ({covers})"
    for test in tests:
        board = test["board"]
        if board["throttled"]:
            hot = f" at {board['celsius']:.0f} °C" if board["celsius"] is not None else ""
            runs, why = f"{board['throttled_runs']} of {n_runs} runs{hot}", ", ".join(board["throttled"])
            yield f"{test['test']}: the board slowed itself down in {runs}: {why}"
        if board["capped"]:
            yield f"{test['test']}: kept cool in the end with {board['capped']}"


# ---- experts on flash ------------------------------------------------------------------------------------------------
def _experts(experts: dict[str, Any]) -> str:
    """What a test had to read, and how near it came to what the flash allows."""
    parts = [
        f"{experts['residency']:.1%} of the experts in RAM, policy {experts['policy']}",
        f"hit rate {experts['hit_rate']:.1%}" if experts["hit_rate"] is not None else "no experts used",
        f"{output.binary_size(experts['bytes_per_token'])} read a token",
        f"flash {experts['flash_bytes_per_s'] / 1e9:.2f} GB/s, busy {experts['flash_busy_share']:.0%}",
        f"waited for {experts['flash_wait_share']:.0%}",
        f"at most {experts['bound_tokens_per_s']:.1f} tok/s, of which {experts['bound_share']:.0%} were reached",
    ]
    return "; ".join(parts)


_CURVE_COLUMNS = (
    "residency",
    "policy",
    "test",
    "tok/s",
    "hit rate",
    "kept",
    "best kept",
    "regret",
    "read a token",
    "flash GB/s",
    "busy",
    "idle",
    "waited",
    "per token",
    "bound",
    "reached",
)


def _curve(rows: list[dict[str, Any]]) -> Table:
    """A line for each residency, policy and test."""
    table = _table(_CURVE_COLUMNS)
    for row in rows:
        for test in row.get("tests", []):
            speed, each = f"{test['tokens_per_s']:.1f}", f"{1e3 / test['tokens_per_s']:.2f} ms"
            if (experts := test["experts"]) is None:
                table.add_row(_share(row), row["policy"], test["test"], speed, *[""] * 9, each)
            else:
                cells = _curve_cells(experts)
                table.add_row(_share(row), experts["policy"], test["test"], speed, *cells[:9], each, *cells[9:])
    return table


def _curve_cells(experts: dict[str, Any]) -> tuple[str, ...]:
    """What a line says of experts that are on flash."""
    return (
        _percent(experts["hit_rate"]),
        _percent(experts.get("kept_rate")),
        _percent(experts.get("belady_rate")),
        _percent(experts.get("regret")),
        output.binary_size(experts["bytes_per_token"]),
        f"{experts['flash_bytes_per_s'] / 1e9:.2f}",
        _percent(experts["flash_busy_share"]),
        _percent(experts["flash_idle_share"]),
        _percent(experts["flash_wait_share"]),
        f"{experts['bound_s_per_token'] * 1e3:.2f} ms",
        _percent(experts["bound_share"]),
    )


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['residency']:.4g}%"


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the columns mean, and what is missing."""
    yield "tg: random token ids, whose routing has little locality; text: what the model says, its real routing"
    yield "kept: bytes that the policy had kept, whatever was read ahead; best kept: by a policy that knows the future"
    yield "bound: the arithmetic alone, or reading what was not kept at the flash's rate, whichever is longer"
    for row in rows:
        if "left_out" in row:
            yield f"{_share(row)} left out: {row['left_out']}"
        for test in row.get("tests", []):
            if test["experts"] is not None:
                if test["experts"]["residency"] < 0.98 * row["residency"]:
                    ended = f"{test['experts']['residency']:.1%}"
                    yield f"{_share(row)} {test['test']}: memory ran short, the expert buffer was {ended} in the end"
                yield f"{_share(row)} {test['test']}: prefetch {test['experts']['prefetch']['word']}"

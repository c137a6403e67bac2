"""`edgert bench`: prompts and generation as llama-bench measures them, beside what the machine could do at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgert.cli import output
from edgert.cli.interrupts import while_loading
from edgert.cli.options import Chosen, Json, ModelName, command
from edgert.errors import OptionError

if TYPE_CHECKING:
    from edgert.bench import Report, Test
    from edgert.model import Model

Prompts = Annotated[str, typer.Option("--prompt", "-p", metavar="N,...", help="Tokens of prompts; empty: none.")]
Generations = Annotated[str, typer.Option("--generate", "-n", metavar="N,...", help="Tokens to generate; empty: none.")]
Depths = Annotated[str, typer.Option("--depth", "-d", metavar="N,...", help="Tokens in the cache before each test.")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", metavar="N", min=1, help="Runs of each test.")]


@command()
def bench(
    model: ModelName = None,
    prompt: Prompts = "512,128",
    generate: Generations = "64",
    depth: Depths = "0",
    repetitions: Repetitions = 5,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Measure a model's speed; the last line is one JSON document.

    Shares are of what this machine reaches in the same run: reading memory (up to 1 GiB more is taken for it), and dot
    products of int8 in registers. The context is as long as the tests need, unless --context says more.
    """
    from edgert.bench import context_for, tests_of

    tests = tests_of(
        parse_counts("--prompt", prompt), parse_counts("--generate", generate), parse_counts("--depth", depth)
    )
    runtime = {"context": context_for(tests), **chosen.runtime}
    with output.open_model(model, runtime) as opened:
        report = _run(opened, tests, repetitions, chosen.runtime.get("memory"))
    document = report.as_json()
    if not json:
        show(document)
    output.write_json(document, in_one_line=True)


def _run(model: Model, tests: list[Test], repetitions: int, memory: str | None) -> Report:
    """The measurement, with progress drawn between runs only: a thread that draws would take time from them."""
    with output.progress("measuring", live=False) as draw, while_loading(draw) as waiting:
        last = ""

        def report(stage: str, fraction: float) -> None:
            nonlocal last
            if stage != last:
                waiting.report(stage, fraction)
            elif not stage.startswith("compiling"):
                waiting.check()
            last = stage

        return model.bench(tests, repetitions=repetitions, memory=memory, progress=report)


def parse_counts(option: str, text: str) -> list[int]:
    """The numbers of "512,128"; OptionError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"{option} {text!r} is not a list of numbers: write for example 512,128") from None


# ---- for a person ----------------------------------------------------------------------------------------------------
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
    from rich.table import Table

    screen = output.console()
    for line in _heading(document):
        screen.print(line, style="dim")
    table = Table(*_COLUMNS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for test in document["tests"]:
        table.add_row(*_cells(test))
    screen.width = max(screen.width, 140)
    screen.print()
    screen.print(table)
    screen.print()
    for test in document["tests"]:
        screen.print(f"{test['test']}: {_phases(test['phases_s_per_token'])}")


def _heading(document: dict[str, Any]) -> Iterator[str]:
    """What was measured, and what the machine can do."""
    model, machine, ceiling = document["model"], document["machine"], document["ceiling"]
    threads = f"{machine['threads']} threads" if machine["threads"] > 1 else "1 thread"
    size, runs = output.binary_size(model["file_bytes"]), document["settings"]["repetitions"]
    yield output.harmless(f"{model['name']}, {size}; medians of {runs} runs")
    yield output.harmless(f"{machine['cpu']}, {threads}, {machine['instructions'] or 'nothing compiled'}")
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

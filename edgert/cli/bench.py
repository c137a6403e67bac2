"""`edgert bench`: prompts and generation as llama-bench measures them, beside what the machine could do at most.

With several residencies or policies: the residency curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgert.cli import bench_tables, output
from edgert.cli.interrupts import while_loading
from edgert.cli.options import Chosen, Json, ModelName, command, parse_shares
from edgert.errors import OptionError

if TYPE_CHECKING:
    from edgert.bench import Report
    from edgert.bench_runner import Test
    from edgert.model import Model

Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", metavar="N,...", help="Tokens of prompts; 512,128 if not set, none for a curve. Empty: none."
    ),
]
Generations = Annotated[
    str,
    typer.Option("--generate", "-n", metavar="N,...", help="Random tokens to run one after the other; empty: none."),
]
Texts = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="N,...", help="Tokens of the model's own text, sampled; for a curve 64 if not set, else none."
    ),
]
Depths = Annotated[str, typer.Option("--depth", "-d", metavar="N,...", help="Tokens in the cache before each test.")]
Repetitions = Annotated[int, typer.Option("--repetitions", "-r", metavar="N", min=1, help="Runs of each test.")]
Residencies = Annotated[
    str | None,
    typer.Option(
        "--residency",
        metavar="SHARE,...",
        help="Hold these shares of the experts in RAM, such as 12.5%,25%,50%,100%; several: the residency curve.",
        rich_help_panel="Runtime",
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME,...",
        help="Which experts stay in RAM: lru, lfu, lfru, edgemoe, cost, pinned; several: compare them.",
        rich_help_panel="Runtime",
    ),
]


@command()
def bench(
    model: ModelName = None,
    prompt: Prompts = None,
    generate: Generations = "64",
    text: Texts = None,
    depth: Depths = "0",
    repetitions: Repetitions = 5,
    residency: Residencies = None,
    policy: Policies = None,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Measure a model's speed; the last line is one JSON document.

    Shares are of what this machine reaches in the same run: reading memory (up to 1 GiB more is taken for it), dot
    products of int8 in registers, and reading flash. The context is as long as the tests need, unless --context says
    more. Several residencies or policies give the residency curve: the same tokens at each, once the buffer is full.
    """
    from edgert.bench import WARM, tests_of
    from edgert.bench_runner import context_for

    shares = parse_shares(residency) if residency else []
    policies = [name.strip() for name in policy.split(",")] if policy else []
    is_curve = len(shares) > 1 or len(policies) > 1
    prompt = prompt if prompt is not None else "" if is_curve else "512,128"
    text = text if text is not None else "64" if is_curve else ""
    tests = tests_of(
        parse_counts("--prompt", prompt),
        parse_counts("--generate", generate),
        parse_counts("--depth", depth),
        parse_counts("--text", text),
    )
    runtime = {"context": context_for(tests, repetitions, WARM if is_curve else 1), **chosen.runtime}
    if is_curve:
        document = _curve(model, runtime, shares, policies or ["auto"], tests, repetitions)
    else:
        runtime |= {"residency": shares[0]} if shares else {}
        runtime |= {"policy": policies[0]} if policies else {}
        with output.open_model(model, runtime) as opened:
            found = _run(opened, tests, repetitions, runtime.get("memory"))
            document = found.as_json()
            if not shares:
                _note_speed(opened, found, runtime.get("threads"))
    if not json:
        bench_tables.show(document)
    output.write_json(document, in_one_line=True)


def _note_speed(model: Model, report: Report, threads: int | None) -> None:
    """Keep how fast the device answers with all experts in RAM, for `--device auto`."""
    from edgert.device_speed import record_speed

    if model.memory.slots:
        return
    with model.held() as parts:
        device = parts.engine.device.name
    for result in report.results:
        if result.test.kind == "generate" and not result.test.depth:
            record_speed(model.path, device, result.test.n_tokens / result.seconds, threads)


def _curve(
    model: str | None,
    runtime: Mapping[str, Any],
    shares: list[float],
    policies: list[str],
    tests: list[Test],
    repetitions: int,
) -> dict[str, Any]:
    """The document of a residency curve."""
    from edgert.residency_bench import measure_curve

    if not shares:
        raise OptionError("--policy compares several only at given residencies: add for example --residency 25%,50%")

    def measure(share: float, policy: str) -> Report:
        with output.open_model(model, {**runtime, "residency": share, "policy": policy}) as opened:
            where = f"residency {share:.4g}" + (f", {policy}" if len(policies) > 1 else "")
            return _run(opened, tests, repetitions, runtime.get("memory"), steady=True, where=where)

    return measure_curve(shares, policies, measure).as_json()


def _run(
    model: Model, tests: list[Test], repetitions: int, memory: str | None, *, steady: bool = False, where: str = ""
) -> Report:
    """The measurement, with progress drawn between runs only: a thread that draws would take time from them."""
    with output.progress("measuring", live=False) as draw, while_loading(draw) as waiting:
        last = ""

        def report(stage: str, fraction: float) -> None:
            nonlocal last
            if stage != last:
                waiting.report(f"{where}: {stage}" if where else stage, fraction)
            elif not stage.startswith("compiling"):
                waiting.check()
            last = stage

        return model.bench(tests, repetitions=repetitions, memory=memory, steady=steady, progress=report)


def parse_counts(option: str, text: str) -> list[int]:
    """The numbers of "512,128"; OptionError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(f"{option} {text!r} is not a list of numbers: write for example 512,128") from None

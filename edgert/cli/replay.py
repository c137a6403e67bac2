"""`edgert replay`: what each policy and predictor would have done on a recorded run, beside the best possible."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgert.cli import output
from edgert.cli.options import Chosen, Json, command, parse_shares

if TYPE_CHECKING:
    from edgert.experts.replay import Report
    from edgert.experts.trace import Trace

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A file that --trace has written.")]
Residencies = Annotated[
    str, typer.Option("--residency", metavar="SHARE,...", help="Parts of the experts' bytes that are in RAM.")
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=2, help="Replay the last N tokens at most.")]
Save = Annotated[bool, typer.Option("--save/--no-save", help="Keep the choice for this model.")]


@command(runtime=False)
def replay(
    trace: TraceFile,
    residency: Residencies = "12.5%,25%,50%",
    tokens: Tokens = 1000,
    save: Save = True,
    json: Json = False,
    *,
    chosen: Chosen,
) -> None:
    """Compare policies and predictors on a routing trace, and keep the best for this model.

    The second half of the trace is counted; the first fills the buffer and the tables.
    """
    from edgert.experts import replay as replays
    from edgert.experts.trace import Trace

    shares = parse_shares(residency)
    recorded = Trace.load(trace).last(tokens)
    with output.progress("replaying") as progress:
        report = replays.replay(recorded, shares, progress)
    document = as_json(report, _kept(report) if save else None)
    if json:
        output.write_json(document)
    else:
        show(document)


def _kept(report: Report) -> Path | None:
    """Where the choice was kept; None, with a note, where that is impossible: the tables are worth their minutes."""
    try:
        return report.save()
    except (OSError, RuntimeError) as problem:  # a full disk; a user without a home
        output.note(f"the choice is not kept: {output.reason(problem)}")
        return None


def as_json(report: Report, kept: Path | None) -> dict[str, Any]:
    """The report as one document; rates are shares, recall has one number a layer."""
    return {
        "trace": _about(report.trace),
        "residency": list(report.residencies),
        "equal_sizes": len(set(report.trace.record_bytes[report.trace.record_bytes > 0].tolist())) == 1,
        "policies": {
            name: {
                "hit_rate": [one.rate for one in hits],
                "byte_hit_rate": [one.byte_rate for one in hits],
                "regret": [report.regret(name, place) for place in range(len(hits))],
                "bytes_per_token": [one.bytes_missed / max(1, one.n_tokens) for one in hits],
            }
            for name, hits in report.policies.items()
        },
        "predictors": {
            name: [[None if math.isnan(share) else share for share in layers.tolist()] for layers in recall]
            for name, recall in report.predictors.items()
        },
        "choice": {
            "policies": {f"{share:.4g}": name for share, name in report.best_policies().items()},
            "predictors": report.best_predictors(),
            "path": kept and str(kept),
        },
    }


def _about(trace: Trace) -> dict[str, Any]:
    """What was recorded."""
    from edgert.experts.replay import working_set_bytes

    return {
        "model": trace.model,
        "tokens": trace.n_tokens,
        "layers": len(trace.layers),
        "experts": trace.n_expert,
        "used": trace.top_k,
        "expert_bytes": int(trace.record_bytes.sum()),
        "working_set": working_set_bytes(trace),
    }


# ---- for a person ----------------------------------------------------------------------------------------------------
def show(document: dict[str, Any]) -> None:
    """The report as tables, as wide as they are: a pipe gets them whole."""
    screen, about = output.console(), document["trace"]
    size, working_set = output.binary_size(about["expert_bytes"]), output.binary_size(about["working_set"])
    screen.print(
        f"{about['tokens']:,} tokens, {about['layers']} layers with {about['experts']} experts each of which a token "
        f"uses {about['used']}; {size} in all, a token's {working_set}",
        style="dim",
    )
    screen.width = max(screen.width, 200)
    screen.print()
    screen.print(_policies(document))
    if not document["equal_sizes"]:
        screen.print("records differ in size: belady knows the future, but is no bound then", style="dim")
    screen.print()
    screen.print(_predictors(document))
    screen.print()
    for line in _choice(document["choice"]):
        screen.print(output.harmless(line))


def _policies(document: dict[str, Any]) -> Any:
    """Hit rates, the regret against Belady, and what a token reads; the best of the online ones first."""
    from rich.table import Table

    table = Table("hits (below belady)", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for share in document["residency"]:
        table.add_column(f"{share:.4g}" if share < 0.001 else f"{share:.4%}".rstrip("0%").rstrip(".") + "%")
    rows = sorted(document["policies"].items(), key=lambda row: sum(row[1]["regret"]))
    for name, found in rows:
        cells = []
        for rate, regret, n_bytes in zip(found["hit_rate"], found["regret"], found["bytes_per_token"], strict=True):
            behind = f" (-{regret * 100:4.1f})" if name != "belady" else " " * 8
            cells.append(f"{rate:6.1%}{behind}  {output.binary_size(int(n_bytes))} a token")
        table.add_row(name, *cells)
    return table


def _predictors(document: dict[str, Any]) -> Any:
    """Recall one and two layers ahead: the mean, and layer by layer."""
    from rich.table import Table

    table = Table("recall", "next", "after next", "next, by layer", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, (near, far) in document["predictors"].items():
        table.add_row(name, _mean(near), _mean(far), " ".join("--" if s is None else f"{s * 100:2.0f}" for s in near))
    return table


def _mean(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{sum(known) / len(known):.1%}" if known else "--"


def _choice(choice: dict[str, Any]) -> Iterator[str]:
    """What was chosen, and where it is kept."""
    policies = ", ".join(f"{name} at {float(share):.4g}" for share, name in choice["policies"].items())
    yield f"policy: {policies}; predictors: {', '.join(choice['predictors'])}"
    if choice["path"]:
        yield f"kept for this model in {choice['path']}"

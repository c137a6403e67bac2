"""What `edgert plan` expects of a board, beside what `edgert bench` found there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy_board import Facts

PROMPT = 128  # tokens, in forecast and bench alike
GENERATE = 32


@dataclass(frozen=True)
class Forecast:
    """Tokens a second and seconds to the first token (slow, usual, fast); reason: why there is none."""

    board: str = ""
    tokens_per_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ttft_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bound: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def forecast(bundle: Path, facts: Facts, memory: int, context: int | None) -> Forecast:
    """The plan for a bundle on a board with so many bytes for edgert."""
    if not facts.planned_as:
        return Forecast(reason=f"`edgert plan` knows no board called {facts.model or facts.machine!r}")
    try:
        from edgert.boards import board_named
        from edgert.memory import Budget
        from edgert.plan import Request, make_plan
        from edgert.plan_hits import profiled_hits, usual_hits
        from edgert.plan_model import open_plan_model
    except ImportError:
        return Forecast(reason="this edgert has no `edgert plan`")
    from edgert.errors import EdgertError

    try:
        subject = open_plan_model(str(bundle))
        profile = subject.profile
        hits = usual_hits(subject.name) if profile is None else profiled_hits(profile, subject.record_bytes)
        n_context = subject.context(context)
        board = replace(board_named(facts.planned_as), ram_bytes=facts.ram)
        request = Request(n_context, min(PROMPT, n_context))
        plan = make_plan(subject, board, request, hits, Budget(memory, memory, memory, strict=True))
    except EdgertError as problem:
        return Forecast(reason=str(problem))
    if plan.memory is None:
        return Forecast(board.title, reason=plan.refusal)
    best = plan.main
    return Forecast(board.title, tuple(best.tokens_per_s), tuple(best.ttft_s), best.bound)


def compared(expected: Mapping[str, Any], bench: Mapping[str, Any]) -> Iterator[str]:
    """A line for each figure that was measured, with what was expected of it."""
    for test in bench.get("tests", ()):
        prompt = test["kind"] == "prompt"
        measured = test["ttft_s"] if prompt else test["tokens_per_s"]
        what = f"first token of {test['n_tokens']} after" if prompt else "tokens a second:"
        line = f"{what} {figure(measured)}{' s' if prompt else ''}"
        if expected.get("reason"):
            yield line
            continue
        slow, usual, fast = expected["ttft_s" if prompt else "tokens_per_s"]
        low, high = sorted((slow, fast))
        faster = (measured < low) if prompt else (measured > high)
        verdict = (
            "as planned" if low <= measured <= high else "faster than planned" if faster else "slower than planned"
        )
        yield f"{line} ({verdict}: {figure(low)} to {figure(high)}, usually {figure(usual)})"
    if expected.get("reason"):
        yield f"not compared: {expected['reason']}"


def figure(value: float) -> str:
    """Three digits, for a person."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

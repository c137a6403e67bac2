"""The residency curve: one model at several sizes of its expert buffer, the same steps at each, beside what binds it.

For each residency and policy the model is loaded anew and runs the same tokens: random ids, and the text that it says
itself. The largest residency goes first; with all experts in RAM its times are the arithmetic of the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgert.bench import SCHEMA, Report, Result
from edgert.errors import MemoryLimitError

Measure = Callable[[float, str], Report]  # a steady report of a residency and a policy


@dataclass(frozen=True)
class Row:
    """One residency with one policy."""

    residency: float
    policy: str
    report: Report | None
    reason: str = ""  # why there is no report

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {"residency": self.residency, "policy": self.policy}
        if self.report is None:
            return {**found, "left_out": self.reason}
        return {**found, "tests": self.report.as_json()["tests"]}


@dataclass(frozen=True)
class Curve:
    """All rows, the largest residency first."""

    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """One document of plain values."""
        subject: dict[str, Any] = next((row.report.subject for row in self.rows if row.report is not None), {})
        return {"schema": SCHEMA, **subject, "curve": [row.as_json() for row in self.rows]}


def measure_curve(residencies: Sequence[float], policies: Sequence[str], measure: Measure) -> Curve:
    """Measure every policy at every residency, in descending order.

    A residency of 1 that does not fit is left out, with the reason. Raises what measure() raises.
    """
    rows: list[Row] = []
    for residency in sorted(set(residencies), reverse=True):
        for policy in policies if residency < 1 else ["resident"]:
            try:
                report = measure(residency, policy if residency < 1 else policies[0])
            except MemoryLimitError as error:
                if residency < 1:
                    raise
                rows.append(Row(residency, policy, None, str(error)))
                continue
            first = next((row.report for row in rows if row.report is not None), report)
            rows.append(Row(residency, policy, _completed(report, first)))
    return Curve(tuple(rows))


def _completed(report: Report, first: Report) -> Report:
    """The report with what only the curve as a whole knows: the time of the arithmetic, and Belady's hits."""
    results = [_with_bounds(ours, theirs) for ours, theirs in zip(report.results, first.results, strict=True)]
    return replace(report, results=tuple(results))


def _with_bounds(result: Result, first: Result) -> Result:
    if result.experts is None or result.routed is None:
        return result
    assert first.routed is not None and np.array_equal(first.routed.ids, result.routed.ids), "the routes differ"
    resident_s = None if first.experts is not None else first.seconds / first.test.n_tokens
    belady = result.routed.belady(result.experts.buffer_bytes)
    return replace(result, experts=replace(result.experts, resident_s=resident_s, belady=belady))

"""`edgert plan --verify`: forecasts beside real runs on this machine, and what else ran beside them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from models import golden_path
from typer.testing import CliRunner

from edgert.cli.app import app
from edgert.cli.plan_compared import words
from edgert.plan import Range, Request
from edgert.plan_machine import measured_unit
from edgert.plan_model import open_plan_model
from edgert.plan_verify import Compared, verify, waited_s
from edgert.quant.jit import JIT_ENABLED

pytestmark = pytest.mark.skipif(not JIT_ENABLED, reason="nothing is compiled: no speed to forecast")
_TRIES = 4  # a shared machine is quiet in one of them, or not at all


def test_the_machine_is_measured_alike_whatever_else_runs() -> None:
    unit, remarks = measured_unit(open_plan_model(None), 512, 1)
    assert 1e9 < unit.bytes_per_s < 1e12 and unit.int8_per_s is not None and 1e9 < unit.int8_per_s < 1e14
    assert unit.n_cores == 1 and "GB/s" in remarks[0]


def test_waiting_for_processors_is_added_up(tmp_path: Path) -> None:
    for task, text in (("1", "5 2000000000 9"), ("2", "5 500000000 9"), ("3", "damaged")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()
    assert waited_s([1, 2, 3, 4, 5], tmp_path) == 2.5
    assert waited_s([threading.get_native_id()]) >= 0.0


def test_a_run_that_others_disturbed_is_compared_with_what_it_would_have_been() -> None:
    forecast = Range(8.0, 10.0, 12.0)
    quiet = Compared("tokens a second", 1.0, forecast, 10.0, 10.2)
    assert quiet.within and not quiet.disturbed and quiet.off == 0.0
    busy = Compared("tokens a second", 1.0, forecast, 6.0, 9.0)
    assert busy.disturbed and busy.tells and busy.off == pytest.approx(1 / 9)
    lost = Compared("tokens a second", 1.0, forecast, 1.0, 9.0)
    assert not lost.tells
    hits = Compared("found in RAM", 0.5, Range(0.4, 0.5, 0.6), 0.0)
    assert hits.tells and not hits.disturbed and not hits.within
    said = " ".join(words([quiet, busy, lost]))
    assert "2 of 2 forecasts" in said and "left alone" in said
    assert "left alone" not in " ".join(words([quiet]))


def test_forecast_and_measurement_of_a_tiny_model_as_json() -> None:
    """What is said, not how good it is: of such a model the software takes nearly all of the time."""
    path = golden_path("olmoe-q4_0")
    result = CliRunner().invoke(app, ["plan", str(path), "--verify", "--prompt", "16", "--context", "128", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["verify"]
    assert [(row["what"], row["residency"]) for row in rows] == [
        ("tokens a second", 1.0),
        ("first token, s", 1.0),
        ("tokens a second", 0.5),
        ("first token, s", 0.5),
        ("found in RAM", 0.5),
    ]
    assert all(row["measured"] > 0 and row["forecast"]["usual"] > 0 for row in rows)


def test_the_embedded_model_is_as_fast_as_forecast() -> None:
    """Tokens a second within 25 %, resident and with half of the experts on flash, on one thread."""
    model, seen = open_plan_model(None), list[list[Compared]]()
    for _ in range(_TRIES):
        seen.append(verify(model, Request(512, 128), lambda stage, fraction: None, 1))
        hits = seen[-1][-1]
        assert hits.what == "found in RAM" and abs(hits.off) < 0.1
        if all(row.within for row in seen[-1] if row.what == "tokens a second"):
            return
    if any(row.disturbed for rows in seen for row in rows):
        pytest.skip("other programs took the processors in every try")
    raise AssertionError([[(row.what, row.residency, row.off) for row in rows] for rows in seen])

"""The residency curve: the same steps at every residency, its bound and the best possible policy; no speeds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path

import edgert
from edgert import bench, bench_experts, bench_runner
from edgert.bench_experts import Routed, Streaming
from edgert.cli import main
from edgert.devices import roofline
from edgert.errors import MemoryLimitError, ModelFileError, OptionError
from edgert.experts.buffer import READY
from edgert.experts.replay import Hits
from edgert.experts.streamed import Streamed
from edgert.pack import pack
from edgert.residency_bench import measure_curve
from edgert.storage.flash import FlashFile
from edgert.types import ExpertCounts

TESTS = bench.tests_of([], [6], [0], [6])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest memory, and the shortest turns, that a machine is measured with."""
    monkeypatch.setattr(roofline, "WANTED_BYTES", 16 << 20)
    monkeypatch.setattr(bench_experts, "_TURN_S", 0.005)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(golden_path("olmoe-q4_0"), tmp_path_factory.mktemp("model") / "m.edge", progress=lambda *_: None)


def report_of(bundle: Path, share: float, policy: str = "auto", repetitions: int = 2) -> bench.Report:
    context = bench_runner.context_for(TESTS, repetitions, bench.WARM)
    with edgert.load(bundle, residency=share, policy=policy, context=context, threads=2) as model:
        return model.bench(TESTS, repetitions=repetitions, steady=True)


# ---- the curve -------------------------------------------------------------------------------------------------------
def test_a_curve_runs_the_same_steps_everywhere_and_knows_what_was_possible(bundle: Path) -> None:
    curve = measure_curve([0.5, 1.0], ["lru", "lfu"], lambda share, policy: report_of(bundle, share, policy))
    assert [(row.residency, row.policy) for row in curve.rows] == [(1.0, "resident"), (0.5, "lru"), (0.5, "lfu")]
    document = json.loads(json.dumps(curve.as_json()))
    resident, *others = document["curve"]
    assert all(test["experts"] is None for test in resident["tests"])
    for row in others:
        assert [test["test"] for test in row["tests"]] == ["tg6", "text6"]
        for test, alone in zip(row["tests"], resident["tests"], strict=True):
            experts = test["experts"]
            assert experts["policy"] == row["policy"] and 0 < experts["residency"] <= 0.5
            assert 0 <= experts["kept_rate"] <= experts["belady_rate"] <= 1
            assert experts["regret"] == pytest.approx(experts["belady_rate"] - experts["kept_rate"])
            assert experts["compute_s_per_token"] == pytest.approx(alone["tpot_s"])
            assert experts["tokens_per_s"] == pytest.approx(test["tokens_per_s"])
            assert experts["bound_s_per_token"] >= 0.999 * alone["tpot_s"] and experts["bound_share"] > 0
            assert len(experts["flash_measured_bytes_per_s"]) == 3 and min(experts["flash_measured_bytes_per_s"]) > 0


def test_a_model_that_does_not_fit_whole_leaves_its_line_out(bundle: Path) -> None:
    def measure(share: float, policy: str) -> bench.Report:
        if share == 1 or share < 0.1:
            raise MemoryLimitError("too large")
        return report_of(bundle, share, repetitions=1)

    whole, half = measure_curve([0.5, 1.0], ["lru"], measure).rows
    assert whole.as_json() == {"residency": 1.0, "policy": "resident", "left_out": "too large"}
    assert half.report is not None
    for result in half.report.results:
        assert result.experts is not None and result.experts.resident_s is None and result.experts.belady is not None
        per_token = result.experts.seconds / result.experts.n_tokens
        assert result.experts.compute_s <= per_token * (1 + 1e-9)  # equal where nothing was waited for
    with pytest.raises(MemoryLimitError):
        measure_curve([0.01], ["lru"], measure)


def test_the_bound_counts_what_the_policy_had_not_kept() -> None:
    counts = ExpertCounts(
        expert_hits=30,
        expert_misses=10,
        bytes_read=5000,
        prefetch_wasted=800,
        prefetch_evicted=200,
        flash_wait_s=1.0,
        flash_busy_s=2.0,
    )
    runs, flash = ((counts, 6.0), (counts, 6.0), (counts, 21.0)), (900.0, 1100.0, 5000.0, 1000.0)
    made = Streaming(runs, 4, flash, 4000, 8000, 0.5, "lru", "off")
    assert made.needed == 1000 and made.kept == 0.75 and made.compute_s == 1.25
    assert made.flash_bytes_per_s == 1050 and made.bounds_s() == [1.25] * 3
    slow = replace(made, flash=(400.0, 600.0, 600.0, 400.0), resident_s=0.5, belady=Hits(4, 4, 1, 4, 1))
    assert slow.bounds_s() == pytest.approx([2, 1000 / 600, 2])
    found = slow.as_json(decoding=True)
    assert found["bound_s_per_token"] == 2 and found["compute_measured"] == "resident"
    assert found["tokens_per_s"] == pytest.approx(4 / 6) and found["bound_share"] == pytest.approx(1000 / 600 / 1.5)
    assert found["hit_rate"] == 0.75 and found["belady_rate"] == 0.75 and found["regret"] == 0
    assert found["flash_used_bytes_per_s"] == 2500


def test_belady_is_asked_about_the_tokens_that_were_timed() -> None:
    ids = np.array([[[0], [1], [0], [1], [0], [1]]])  # one layer, six tokens; two experts, room for one and a passer-by
    routed = Routed(ids, 2, np.full((1, 2), 4096))
    assert routed.belady(8192).rate == 1.0 and routed.belady(8192).n_asked == 4
    assert routed.belady(4096).rate == 0.0


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_a_text_goes_on_from_run_to_run_and_is_the_same_wherever_experts_are(bundle: Path) -> None:
    texts = []
    for share in (0.3, 1.0):
        with edgert.load(bundle, residency=share, context=128, threads=2) as model:
            parts = model._open()
            runner = bench_runner.Runner(parts, warm=3, keep_routes=True)
            runner.prepare(TESTS[1])
            assert len(runner.routes) == runner.n_warm == 3
            start = len(parts.session.tokens)
            for _ in range(2):
                assert runner.run(TESTS[1]).counts.expert_hits > 0
            texts.append(list(parts.session.tokens))
            assert len(texts[-1]) == start + 12 and len(runner.routes) == 15
            assert not set(texts[-1][start:]) & set(model.tokenizer.stop_ids)
    assert texts[0] == texts[1]


def test_flash_is_measured_without_changing_what_is_in_ram(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgert.load(bundle, residency=0.4, context=64, threads=1, prefetch="always") as model:
        before = model.generate([1, 2, 3], max_tokens=8).token_ids
        residency = model._open().engine.residency
        assert isinstance(residency, Streamed)
        rate = bench_experts.flash_rate_of(residency)
        assert rate is not None and rate.measure() > 0 and not residency.check()
        here = residency.buffer.state == READY
        contents = [read.buffer.copy() for read in residency.buffer.read_again(np.flatnonzero(here).tolist())]
        assert rate.measure() > 0 and (here == (residency.buffer.state == READY)).all()
        again = [read.buffer for read in residency.buffer.read_again(np.flatnonzero(here).tolist())]
        assert all((a == b).all() for a, b in zip(contents, again, strict=True))
        assert model.generate([1, 2, 3], max_tokens=8).token_ids == before

        def fail(*_: Any) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(FlashFile, "_preadv", fail)
            with pytest.raises(ModelFileError):
                rate.measure()
        assert residency.buffer.reader.pending == 0 and not residency.check()
        assert model.generate([1, 2, 3], max_tokens=8).token_ids == before


# ---- the command -----------------------------------------------------------------------------------------------------
def call(capfd: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["edgert", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


def test_the_command_prints_the_curve(capfd: Any, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    sizes = ["-n", "4", "--text", "4", "-r", "1", "--threads", "2"]
    code, out, err = call(capfd, monkeypatch, "bench", str(bundle), "--residency", "60%,100%", *sizes)
    assert code == 0 and "error" not in err
    *lines, last = out.splitlines()
    rows = json.loads(last)["curve"]
    assert [row["residency"] for row in rows] == [1.0, 0.6]
    for row in rows:
        for test in row["tests"]:
            assert any(f"{100 * row['residency']:.4g}% " in line and f" {test['test']} " in line for line in lines)


def test_an_ordinary_bench_says_what_was_read(capfd: Any, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    sizes = ["-p", "9", "-n", "4", "-r", "1", "--threads", "1", "--residency", "40%", "--policy", "lru"]
    code, out, _ = call(capfd, monkeypatch, "bench", str(bundle), *sizes)
    *lines, last = out.splitlines()
    prompt, decode = json.loads(last)["tests"]
    assert code == 0 and prompt["experts"]["policy"] == "lru" and "kept_rate" not in prompt["experts"]
    names = {"tokens_per_s", "hit_rate", "bytes_per_token", "bound_tokens_per_s", "bound_share", "prefetch"}
    assert names < set(decode["experts"]) and decode["experts"]["compute_measured"] == "not waiting"
    assert any(line.startswith("tg4: ") and "policy lru; hit rate " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--policy", "lru,lfu"], "--policy compares several only at given residencies"),
        (["bench", "--residency", "10%,x"], "'x' is not a share"),
        (["generate", "-p", "a", "--residency", "10%,20%"], "--residency: give one share"),
    ],
)
def test_bad_options_are_named(capfd: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    code, out, err = call(capfd, monkeypatch, *arguments)
    assert code == 2 and not out and said in " ".join(err.split())


def test_a_text_that_the_context_does_not_hold_is_refused(bundle: Path) -> None:
    with (
        edgert.load(bundle, context=64, threads=1) as model,
        pytest.raises(OptionError, match="needs a context of 108"),
    ):
        model.bench(TESTS, repetitions=2, steady=True)

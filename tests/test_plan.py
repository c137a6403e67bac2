"""`edgert plan`: the survey's table cell by cell, forecasts that obey their formulas, and what the command prints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_profiles import made_profile
from models import golden_path
from typer.testing import CliRunner

from edgert.boards import BOARDS, board_named
from edgert.cli.app import app
from edgert.describing import describe
from edgert.memory import STARTING_BYTES, Budget
from edgert.plan import Plan, Planner, Request, make_plan, usable
from edgert.plan_hits import DIALOGUE, EVEN, Hits, along, replayed_hits, usual_hits
from edgert.plan_model import open_plan_model
from edgert.plan_parts import Numbers, even_distinct, step_parts
from edgert.traffic import ModelTraffic

# arXiv 2402.16363, table 1: LLaMA-2-7B, 16-bit floats, 2,048 tokens, batch 1, NVIDIA A6000. Each cell as printed.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDE = ("gate_proj", "up_proj", "down_proj")
TABLE_1 = {
    "prefill": {
        **dict.fromkeys(LINEAR, "69G / 67M / 1024 / 155T / compute"),
        **dict.fromkeys(WIDE, "185G / 152M / 1215 / 155T / compute"),
        **dict.fromkeys(("qk_matmul", "sv_matmul"), "34G / 302M / 114 / 87T / memory"),
        "softmax": "671M / 537M / 1.25 / 960G / memory",
        "norm": "59M / 34M / 1.75 / 1.34T / memory",
        "add": "8M / 34M / 0.25 / 192G / memory",
    },
    "decode": {
        **dict.fromkeys(LINEAR, "34M / 34M / 1 / 768G / memory"),
        **dict.fromkeys(WIDE, "90M / 90M / 1 / 768G / memory"),
        **dict.fromkeys(("qk_matmul", "sv_matmul"), "17M / 17M / 0.99 / 762G / memory"),
        "softmax": "328K / 262K / 1.25 / 960G / memory",
        "norm": "29K / 16K / 1.75 / 1.34T / memory",
        "add": "4K / 16K / 0.25 / 192G / memory",
    },
}
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def as_printed(value: float, cell: str) -> str:
    """A value with the unit and the digits of a cell."""
    unit = cell[-1] if cell[-1] in UNITS else ""
    digits = cell.removesuffix(unit).partition(".")[2]
    return f"{value / UNITS[unit]:.{len(digits)}f}{unit}"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_cell_of_the_surveys_table_1(phase: str) -> None:
    model, unit = open_plan_model("llama-2-7b:f16"), board_named("a6000").main
    parts = step_parts(model.weights, 2048 if phase == "prefill" else 1, 2048, Numbers(2.0, 2.0, nodes=True))
    found = {part.name: part for part in parts}
    for name, row in TABLE_1[phase].items():
        part, cells = found[name], row.split(" / ")
        values = (part.operations, part.n_bytes, part.intensity, part.rate(unit))
        assert [as_printed(value, cell) for value, cell in zip(values, cells, strict=False)] == cells[:4], name
        assert part.bound(unit) == cells[4], name
    assert set(found) == {*TABLE_1[phase], "head"}


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["olmoe-q4_0", "qwen2moe-f32", "granitemoe-shared-f32", "llama-q4_k", "llama-f32"])
def test_parts_of_a_token_add_up_to_its_traffic(name: str) -> None:
    model = open_plan_model(str(golden_path(name)))
    c, seen, position = model.config, 37, 64.0
    cached = position / (c.n_layers * c.n_kv_heads * (c.d_head + c.d_value))
    parts = step_parts(model.weights, 1, seen, Numbers(activation=0.0, cached=cached))
    traffic = ModelTraffic.of(model.weights, position)
    n_experts = c.n_layers * c.router.top_k if c.router else 0
    step = traffic.step(1, seen - 1, n_experts, with_head=True)
    vectors = sum(model.weights.bytes_of(key) for key, shape in model.weights.shapes.items() if len(shape) == 1)
    assert sum(p.count * p.n_bytes for p in parts) == pytest.approx(
        step.n_bytes - traffic.embedding_row - vectors, rel=1e-6
    )
    counted = [part for part in parts if part.name not in ("softmax", "norm", "add", "quantise", "activation")]
    assert sum(p.count * p.operations for p in counted) == pytest.approx(
        step.int8_operations + step.float_operations, rel=1e-3
    )


def test_a_window_is_planned_for() -> None:
    """gpt-oss sees 128 positions in every other layer; a runtime of graphs computes all scores all the same."""
    weights, n_seen = open_plan_model("gpt-oss-20b").weights, 32768
    for numbers, seen in ((Numbers(activation=0.0), (128 + n_seen) / 2), (Numbers(0.0, nodes=True), n_seen)):
        part = next(part for part in step_parts(weights, 1, n_seen, numbers) if part.name == "qk_matmul")
        assert part.count == 24 and part.operations == 2 * 64 * 64 * seen and part.n_bytes == 2 * 8 * 64 * seen


def test_of_a_window_only_a_ring_is_kept() -> None:
    """gpt-oss-20b at all its positions: 12 layers keep 2 KiB of each, 12 no more than steps and what is kept take."""
    needed, position = open_plan_model("gpt-oss-20b").needs(131072, "f16", 4), 2 * 8 * 64 * 2
    for chunk in needed.work:
        blocks = (127 + chunk + 62) // 64 + 1 + 2 * 3
        assert needed.kv[chunk] == needed.plan(chunk).kv == 12 * position * (131072 + 64 * blocks)
    assert needed.floor().kv < needed.plan(512).kv < 0.51 * 24 * position * 131072


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 4096))
def test_distinct_experts_lie_between_top_k_and_all(n_expert: int, top_k: int, n_tokens: int) -> None:
    top_k = min(top_k, n_expert)
    found = even_distinct(n_expert, top_k, n_tokens)
    assert min(top_k, n_expert) <= found + 1e-9 and found <= n_expert + 1e-9
    assert even_distinct(n_expert, top_k, 1) == pytest.approx(top_k)


# ---- rates of hits ---------------------------------------------------------------------------------------------------
@given(st.floats(0, 1))
def test_rates_of_hits_are_shares_in_order(residency: float) -> None:
    for name in ("some model", "Qwen3-30B-A3B"):
        hard, usual, easy = usual_hits(name).at(residency)
        assert 0 <= hard <= usual <= easy <= 1
    assert along(EVEN, residency) == pytest.approx(residency)


def test_the_curve_of_dialogues_is_what_replay_finds() -> None:
    from edgert.experts.trace import Trace

    found = replayed_hits(Trace.load(Path(__file__).parent / "golden" / "smollm2-moe-trace.npz"), "replayed")
    for residency, rate in DIALOGUE.items():
        assert along(found.usual, residency) == pytest.approx(rate, abs=0.011)
    hard, usual, easy = found.at(0.3)
    assert hard < usual < easy


# ---- forecasts -------------------------------------------------------------------------------------------------------
def planned(
    name: str = "qwen3-30b-a3b", board: str = "raspberry-pi-5", memory: int | None = None, tpot: float | None = None
) -> Plan:
    model = open_plan_model(name)
    budget = None if memory is None else Budget(memory, memory, memory, strict=True)
    request = Request(model.context(None), 512, tpot_s=tpot)
    return make_plan(model, board_named(board), request, usual_hits(model.name), budget)


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_gives_a_plan_in_order(board: str) -> None:
    plan = planned(board=board)
    assert plan.memory is not None and plan.memory.total <= usable(plan.board) < plan.board.ram_bytes
    for speed in plan.speeds:
        assert 0 < speed.tokens_per_s.slow <= speed.tokens_per_s.usual <= speed.tokens_per_s.fast
        assert speed.ttft_s.slow >= speed.ttft_s.usual >= speed.ttft_s.fast > 0
    json.dumps(plan.as_dict(), allow_nan=False)


@settings(deadline=None, max_examples=25)
@given(st.integers(1600, 18_000), st.integers(50, 1500))
def test_more_memory_is_never_slower_and_the_memory_found_is_enough(mebibytes: int, milliseconds: int) -> None:
    plan = planned(memory=mebibytes << 20, tpot=milliseconds / 1000)
    more = planned(memory=(mebibytes + 500) << 20)
    assert more.main.tokens_per_s.usual >= plan.main.tokens_per_s.usual * (1 - 1e-9)
    assert plan.wanted is not None
    if plan.wanted.bytes is not None:
        with_it = planned(memory=plan.wanted.bytes)
        assert 1 / with_it.main.tokens_per_s.usual <= milliseconds / 1000 * 1.01


def test_at_break_even_flash_takes_as_long_as_arithmetic() -> None:
    model, board = open_plan_model("qwen3-30b-a3b"), board_named("jetson-orin-nano")
    planner = Planner(model, board, Request(4096, 512), usual_hits(model.name))
    for flash in board.flash:
        rate = planner.break_even(flash)
        assert rate is not None and 0 < rate < 1
        reach = planner.reaches.usual
        assert planner.flash_s(rate, flash, reach) == pytest.approx(planner.arithmetic_s(reach), rel=1e-3)


def test_a_model_on_a_pi_that_others_have_measured() -> None:
    """llama.cpp on a Raspberry Pi 5 16GB, Qwen3-30B-A3B in 2.7 bits a weight, all in RAM: 8.0 tok/s
    (geerlingguy/ai-benchmarks #47). Of the nearest size here, scaled by bytes, the range holds it."""
    plan = planned("qwen3-30b-a3b:q3_k_m", "raspberry-pi-5-16gb", memory=15 << 30)
    scale = plan.model.file_bytes / (9.58 * 2**30)
    low, _, high = (scale * rate for rate in plan.main.tokens_per_s)
    assert plan.hits is None and low < 7.99 < high


def test_a_dense_model_has_no_flash_in_its_plan() -> None:
    plan = planned("llama-2-7b", tpot=0.1)
    assert plan.hits is None and plan.ladder == () and plan.main.break_even is None and plan.main.flash_s == 0
    assert math.isclose(1 / plan.main.tokens_per_s.usual, plan.main.arithmetic_s)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", str(golden_path("qwen3moe-f32"))])
def test_every_memory_that_a_plan_names_runs_and_holds_less_than_all(name: str) -> None:
    plan = planned(name, tpot=1.0)
    least = Planner(plan.model, plan.board, plan.request, usual_hits(plan.model.name)).needs.least_budget
    memories = [n_bytes for n_bytes, _, _ in plan.ladder]
    assert memories == sorted(set(memories)) and memories[0] >= least and plan.ladder[-1][1] == 1.0
    assert plan.wanted is not None and plan.wanted.bytes is not None and plan.wanted.bytes >= least


# ---- the command -----------------------------------------------------------------------------------------------------
def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_two_boards_beside_each_other() -> None:
    text = run("qwen3-30b-a3b", "--board", "jetson-orin-nano,raspberry-pi-5", "--tpot", "200ms")
    for words in ("Jetson Orin Nano 8GB", "Raspberry Pi 5 8GB", "tok/s", "NVMe", "microSD", "nobody has tried"):
        assert words in text
    assert "times as fast as Raspberry Pi 5 8GB" in text and "Nobody has measured edgert on these boards" in text
    first, second = text.splitlines()[:2]
    assert "30.5 billion parameters" in first and "128 experts, 8 used" in second


def test_one_board_in_full_and_as_json() -> None:
    text = run("qwen3-30b-a3b", "--board", "jetson-orin-nano", "--memory", "75%")
    for words in ("hot weights", "attention cache", "q_proj", "qk_matmul", "gate_proj (experts)", "experts from flash"):
        assert words in text
    document = json.loads(run("qwen3-30b-a3b", "--board", "jetson-orin-nano", "--memory", "6GiB", "--json"))
    (plan,) = document["plans"]
    assert plan["memory_budget"] == 6 << 30 and plan["speeds"][0]["bound"] == "flash"
    assert {"decode", "prompt"} == set(plan["parts"])


def test_the_smallest_budget_is_told_of_every_board() -> None:
    """Also where all experts fit, and where the model does not; and with it the plan is the smallest."""
    table = run("deepseek-v3", "--board", "jetson-agx-orin,raspberry-pi-5", "--context", "2048")
    (row,) = (line for line in table.splitlines() if line.startswith("smallest budget"))
    first, second = re.findall(r"--memory (\d+)MiB(, more than it has)?", row)
    floor = open_plan_model("deepseek-v3").needs(2048, "f16", 12).floor().total
    assert int(first[0]) == -(-floor // (1 << 20)) and not first[1] and second[1], row
    for name, memory in (("olmoe-1b-7b", ()), ("llama-2-7b", ()), ("olmoe-1b-7b", ("--memory", "1200MiB"))):
        (row,) = (
            line
            for line in run(name, "--board", "jetson-orin-nano", *memory).splitlines()
            if line.startswith("smallest budget")
        )
        least = int(re.findall(r"--memory (\d+)MiB", row)[0])
        run(name, "--board", "jetson-orin-nano", "--memory", f"{least}MiB")
        assert f"use --memory {least}MiB" in refused(name, "-b", "jetson-orin-nano", "--memory", f"{least - 1}MiB")


def test_the_smallest_budget_is_one_that_starts() -> None:
    """A tiny model needs less than a process of edgert takes while it starts."""
    path = str(golden_path("olmoe-q4_0"))
    least = describe(path)["memory"]["floor"]
    assert least == STARTING_BYTES > open_plan_model(path).needs(128, "f16").floor().total
    assert f"--memory {least >> 20}MiB" in run(path, "--board", "raspberry-pi-5")
    run(path, "--board", "raspberry-pi-5", "--memory", f"{least >> 20}MiB")


def test_this_machine_and_the_embedded_model() -> None:
    (plan,) = json.loads(run("--json"))["plans"]
    assert plan["board"]["measured"] and plan["memory"]["residency"] == 1.0
    assert plan["speeds"][0]["tokens_per_s"]["usual"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--board", "pi"), "raspberry-pi-5"),
        (("--board", ","), "names no board"),
        (("--board", "raspberry-pi-5", "--memory", "9GiB"), "more than the 8 GiB"),
        (("--board", "raspberry-pi-5", "--memory", "200MiB"), "below this model's floor"),
        (("--board", "raspberry-pi-5", "--memory", "lots"), "is not a size"),
        (("--tpot", "fast"), "is not a time"),
        (("--tpot", "0ms"), "is not a time"),
        (("--prompt", "99999"), "longer --context"),
        (("--context", "999999"), "context=999999"),
        (("--profile", "/nowhere.npz"), "/nowhere.npz"),
        (("--plot", "roof.pdf"), "neither .svg nor .png"),
        (("--plot", "/nowhere/roof.svg"), "cannot be written"),
        (("qwen3-30b-a3b", "--verify"), "holds no weights"),
        (("--board", "raspberry-pi-5", "--verify"), "measures the machine in hand"),
        (("--memory", "2GiB", "--verify"), "leave --memory away"),
    ],
)
def test_bad_input_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


def test_a_board_that_is_for_planning_only_says_why() -> None:
    text = run("olmoe-1b-7b", "--board", "jetson-tx2,jetson-xavier-nx")
    assert "for comparison only" in run("llama-2-7b", "--board", "a6000")
    assert "for planning only" in text and "glibc 2.27" in text and "Python 3.8" in text


def test_a_model_that_no_board_holds_is_told_for_several_and_refused_for_one() -> None:
    assert "too little memory" in run("mixtral-8x22b", "--board", "raspberry-pi-5,jetson-agx-orin", "--memory", "3GiB")
    assert "below this model's floor" in refused("mixtral-8x22b", "--board", "raspberry-pi-5", "--memory", "3GiB")


@pytest.mark.parametrize("memory", [(), ("--memory", "3GiB")])
def test_what_a_board_on_paper_cannot_hold_is_told_of_that_board(memory: tuple[str, ...]) -> None:
    told = refused("mixtral-8x22b", "--board", "jetson-tx2", "--context", "65536", *memory)
    assert "it leaves" in told and "smaller model or a shorter --context" in told and "close" not in told
    assert "a board that holds it: " in told and "jetson-agx-orin" in told.partition("holds it: ")[2]
    assert "jetson-tx2" not in told.partition("holds it: ")[2]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_roofline_is_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roof.{suffix}"
    run("qwen3-30b-a3b", "--board", "jetson-orin-nano,raspberry-pi-5", "--plot", str(path))
    raw = path.read_bytes()
    if suffix == "png":
        assert raw.startswith(b"\x89PNG")
        return
    text = raw.decode()
    for words in ("Qwen3-30B-A3B on Jetson Orin Nano 8GB", "memory, 11 GB/s", "NVMe, 1.8 GB/s", "missing experts"):
        assert words in text
    assert "operations a byte" in text and "operations a second" in text


def test_a_roofline_of_a_dense_model_has_no_flash(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.svg"
    run("llama-2-7b:f16", "--board", "a6000", "--plot", str(path))
    assert "missing experts" not in path.read_text() and "floats, 155T" in path.read_text()


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    made_profile().save(tmp_path / "other.npz")
    assert "name its own profile" in refused("--profile", str(tmp_path / "other.npz"))


def test_hits_of_a_profile_are_used() -> None:
    model = open_plan_model("qwen3-30b-a3b")
    always = Hits({0.001: 0.99}, {0.001: 0.99}, {0.001: 0.99}, "made", measured=True)
    plan = make_plan(model, board_named("raspberry-pi-5"), Request(4096, 512), always)
    assert plan.hits is not None and plan.hits.usual > 0.98 and plan.main.bound == "memory"

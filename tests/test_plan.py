"""`edgert plan`: the survey's table cell by cell, sizes from headers cut short, forecasts that obey their formulas."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_models import decoded, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from models import golden_path
from typer.testing import CliRunner

from edgert.boards import BOARDS, board_named
from edgert.cli.app import app
from edgert.describing import describe
from edgert.errors import ModelFileError, OptionError
from edgert.loading import resolve
from edgert.memory import STARTING_BYTES, Budget
from edgert.plan import Plan, Planner, Request, make_plan, usable
from edgert.plan_hits import DIALOGUE, EVEN, Hits, along, replayed_hits, usual_hits
from edgert.plan_model import PlanModel, open_plan_model
from edgert.plan_parts import Numbers, even_distinct, step_parts
from edgert.preset_keys import KEY_PRESETS
from edgert.presets import PRESETS
from edgert.storage.gguf_file import GgufFile
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


# ---- models ----------------------------------------------------------------------------------------------------------
BILLIONS = {  # as their makers count them
    "qwen3-30b-a3b": 30.5,
    "qwen3-coder-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "olmoe-1b-7b": 6.92,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "granite-3.1-1b-a400m": 1.33,
    "granite-3.1-3b-a800m": 3.3,
    "llama-2-7b": 6.74,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_model(name: str) -> None:
    assert open_plan_model(name).n_parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("qwen3-30b-a3b", 18.56), ("qwen3-30b-a3b:q8_0", 32.48), ("olmoe-1b-7b", 4.21), ("mixtral-8x7b:Q4_0", 26.4)],
)
def test_a_preset_is_as_large_as_the_published_file(name: str, gigabytes: float) -> None:
    assert open_plan_model(name).file_bytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's header, and little of what follows."""
    whole = resolve(None)
    with GgufFile.open(whole) as file:
        start = min(tensor.offset for tensor in file.tensors.values())
    path = tmp_path_factory.mktemp("cut") / "head.gguf"
    path.write_bytes(whole.read_bytes()[: start + 100])
    return path


def test_the_first_megabytes_tell_what_the_whole_file_tells(header: Path) -> None:
    cut, whole = open_plan_model(str(header)), open_plan_model(None)
    assert header.stat().st_size < 4 << 20
    assert (cut.n_parameters, cut.file_bytes) == (whole.n_parameters, whole.file_bytes)
    assert cut.needs(4096, "f16", 2) == whole.needs(4096, "f16", 2)


def test_a_header_that_is_cut_is_said_to_be_so(header: Path, tmp_path: Path) -> None:
    raw = header.read_bytes()
    for n_bytes in (30, 1000, len(raw) // 2, len(raw) - 5000):
        path = tmp_path / f"{n_bytes}.gguf"
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(ModelFileError, match=r"header goes on behind these .* take more"):
            open_plan_model(str(path))


def test_what_is_not_a_plan_still_wants_the_whole_file(header: Path) -> None:
    with pytest.raises(ModelFileError, match="truncated"):
        GgufFile.open(header)


def test_a_config_json_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["olmoe-1b-7b"]))
    preset = open_plan_model("olmoe-1b-7b:q8_0")
    for name in (f"{tmp_path}/config.json:q8_0", f"{tmp_path}:q8_0"):
        assert open_plan_model(name).file_bytes == preset.file_bytes
    assert open_plan_model(str(tmp_path)).file_bytes == open_plan_model("olmoe-1b-7b").file_bytes


GPT_OSS = {  # as openai/gpt-oss-20b has it
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.mark.parametrize("quantisation", ["q4_k_m", "q8_0"])
def test_a_config_json_says_that_experts_stay_in_mxfp4(quantisation: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT_OSS))
    found, preset = open_plan_model(f"{path}:{quantisation}"), open_plan_model(f"gpt-oss-20b:{quantisation}")
    assert found.weights.file.tensors == preset.weights.file.tensors
    assert (found.record_bytes == preset.record_bytes).all() and found.record_bytes.sum() < 11 << 30
    path.write_text(json.dumps({key: value for key, value in GPT_OSS.items() if key != "quantization_config"}))
    floats = open_plan_model(f"{path}:{quantisation}")  # widened by whoever saved it: quantised as anything else
    assert {floats.weights.file.tensors[f"blk.0.ffn_{part}_exps.weight"].type.name for part in ("gate", "down")} <= (
        {"Q5_0", "Q8_0"} if quantisation == "q4_k_m" else {"Q8_0"}
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3-30b-a3", "did you mean qwen3-30b-a3b"),
        ("qwen3-coder-30b", "did you mean qwen3-coder-30b-a3b"),
        ("nothing", "neither a file nor a preset"),
        ("qwen3-30b-a3b:q9", "no quantisation"),
        ("qwen3-30b-a3b:", "no quantisation"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_plan_model(name)


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


# ---- edgert inspect --------------------------------------------------------------------------------------------------
def inspected(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["inspect", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("more", [None, 0, 100])
def test_a_header_is_inspected_as_the_whole_file_is(
    header: Path, more: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs, and what goes where in a budget: the smallest one and a larger one."""
    monkeypatch.setattr("edgert.memory.taken", lambda: 0)  # by pytest and the tests before
    floor = max(describe(context=1024)["memory"]["floor"], STARTING_BYTES)
    memory = () if more is None else ("--memory", f"{-(-floor // (1 << 20)) + more}MiB")
    cut, whole = (inspected(*model, *memory, "--context", "1024") for model in ((str(header),), ()))
    n_bytes = Path(whole.pop("path")).stat().st_size
    assert cut.pop("path") == str(header)
    assert cut.pop("source") == f"the first {header.stat().st_size:,} of {n_bytes:,} bytes: it cannot run"
    assert cut == whole and cut["memory"]["floor"] > cut["memory"]["hot"] and cut["template"]["source"] == "model"


def test_a_split_model_is_cut_where_one_part_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=20))
    metadata, weights = decoded(golden_path("olmoe-f32"))
    write_gguf(tmp_path / "m.gguf", metadata, weights, "F32")
    first, *_, last = sorted(tmp_path.glob("*.gguf"))
    whole = describe(first)
    assert "source" not in whole and whole["bytes"]["total"] == sum(
        path.stat().st_size for path in first.parent.iterdir()
    )
    last.write_bytes(last.read_bytes()[:-1000])
    cut, missing = describe(first), whole["bytes"]["total"] - 1000
    assert cut["source"].startswith(f"the first {missing:,} of ")
    assert 0 <= whole["bytes"]["total"] - cut["bytes"]["total"] < 1000, "but what pads the last tensor of each part"
    assert {**cut, "bytes": whole["bytes"], "source": ""} == {**whole, "source": ""}


@pytest.mark.parametrize("name", [*PRESETS, *KEY_PRESETS])
def test_a_preset_is_inspected(name: str) -> None:
    """Sizes, and a smallest budget that is enough, one MiB less being refused."""
    found, model = describe(name, context=2048), open_plan_model(name)
    assert found["source"] == "preset, as Q4_K_M on paper: no weights, it cannot run" and "path" not in found
    assert (found["name"], found["architecture"]) == (model.name, model.config.architecture)
    assert (found["parameters"], found["bytes"]["total"]) == (model.n_parameters, model.file_bytes)
    assert found["bytes"]["hot"] + found["bytes"]["cold"] == found["bytes"]["total"]
    memory, needed = found["memory"], model.needs(2048, "f16")
    assert memory["floor"] == needed.least_budget and memory["working_set"] == needed.working_set
    assert memory["total"] == needed.plan(512).total and found["vocabulary"] == {"size": model.config.n_vocab}
    assert "tokenizer" not in found and "template" not in found
    assert (found["experts"] is None) == (model.config.router is None)


def test_what_inspect_shows_of_a_preset() -> None:
    for columns in ("80", "120"):
        result = CliRunner().invoke(app, ["inspect", "gpt-oss-20b"], env={"COLUMNS": columns})
        lines = [line.split() for line in result.stdout.splitlines()]
        for row in ("parameters 20,914.8 million (20,914,757,184)", "used 4", "working set 1.18 GiB", "context 4,096"):
            assert row.split() in lines, row
        assert (
            any(line[:2] == ["smallest", "budget"] for line in lines) and max(map(len, result.stdout.splitlines())) < 80
        )


def test_a_config_json_is_inspected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    for name in (f"{tmp_path}", f"{tmp_path}/config.json"):
        found = inspected(name)
        assert found["source"].startswith(f"{tmp_path}/config.json, as Q4_K_M on paper: ")
        assert found["memory"] == inspected("gpt-oss-20b")["memory"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpt-oss-20",), "'gpt-oss-20' is neither a file nor a preset; did you mean gpt-oss-20b?"),
        (("absent.gguf",), "absent.gguf: no such file"),
        (("absent.edge",), "absent.edge: no such file"),
        (("gpt-oss-20b:q9",), "'q9' is no quantisation"),
        (("gpt-oss-20b", "--memory", "900MiB"), "below this model's floor of 1,"),
        (("gpt-oss-20b", "--context", "999999"), "must lie between 1 and 131072"),
    ],
)
def test_what_cannot_be_inspected(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and words in result.stderr, result.output


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
    from test_report import made_profile

    made_profile().save(tmp_path / "other.npz")
    assert "name its own profile" in refused("--profile", str(tmp_path / "other.npz"))


def test_hits_of_a_profile_are_used() -> None:
    model = open_plan_model("qwen3-30b-a3b")
    always = Hits({0.001: 0.99}, {0.001: 0.99}, {0.001: 0.99}, "made", measured=True)
    plan = make_plan(model, board_named("raspberry-pi-5"), Request(4096, 512), always)
    assert plan.hits is not None and plan.hits.usual > 0.98 and plan.main.bound == "memory"


def test_a_model_is_planned_from_its_tables_alone() -> None:
    model = open_plan_model("qwen3-30b-a3b")
    assert isinstance(model, PlanModel)
    with pytest.raises(ModelFileError, match="on paper"):
        model.weights.embed([1])

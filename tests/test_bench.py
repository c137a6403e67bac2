"""`edgert bench`: what a step has to move, the loops that measure the machine, the shape of the report; no speeds."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import golden_path

from edgert import bench, bench_runner, loading, model
from edgert.cli import main
from edgert.devices import roofline
from edgert.devices.threads import ThreadPool
from edgert.errors import OptionError
from edgert.storage.gguf_file import GgufFile
from edgert.traffic import ModelTraffic, Traffic, positions
from edgert.types import LayerConfig, ModelConfig, RopeConfig

TESTS = bench.tests_of([20, 3], [4], [0, 7])
KEYS = {
    "board",
    "test",
    "kind",
    "n_tokens",
    "depth",
    "tokens_per_s",
    "tokens_per_s_min",
    "tokens_per_s_max",
    "ttft_s",
    "tpot_s",
    "bytes_per_token",
    "read_gb_per_s",
    "read_share",
    "machine_read_gb_per_s",
    "int8_gop_per_s",
    "int8_share",
    "float_gop_per_s",
    "phases_s_per_token",
    "experts",
    "runs_s",
}


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest memory that is measured with."""
    monkeypatch.setattr(roofline, "WANTED_BYTES", 16 << 20)


def parts_of(name: str, context: int = 64) -> loading.Parts:
    return loading.load_parts(
        golden_path(name),
        memory=None,
        residency=None,
        policy="auto",
        prefetch="auto",
        trace=None,
        context=context,
        threads=2,
        device="auto",
        kv_type="f16",
        activations="int8",
        progress=lambda stage, fraction: None,
    )


# ---- traffic ---------------------------------------------------------------------------------------------------------
LIMITS = (LayerConfig(), LayerConfig(window=12), LayerConfig(span=16), LayerConfig(window=5, span=16))


@given(st.lists(st.sampled_from(LIMITS), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 90))
def test_layers_count_the_positions_that_their_tokens_attend_to(
    layers: list[LayerConfig], n_tokens: int, start: int
) -> None:
    config = ModelConfig(
        "llama", len(layers), 64, 2, 2, 32, 32, 100, 64, 1e-5, RopeConfig("norm", 32), None, layers=tuple(layers)
    )
    token, other = np.ogrid[start : start + n_tokens, : start + n_tokens]
    attends = [
        (other <= token)
        & (token - other < (layer.window or 1000))
        & (token // (layer.span or 1000) == other // (layer.span or 1000))
        for layer in layers
    ]
    one, together = positions(config, n_tokens, start)
    assert one == pytest.approx(np.sum(attends) / n_tokens / len(layers))
    assert together == pytest.approx(np.any(attends, axis=1).sum() / len(layers))


@pytest.mark.parametrize("name", ["olmoe-q4_0", "granitemoe-shared-f32", "llama-q8_0"])
def test_a_step_that_uses_every_expert_moves_every_weight_once(name: str) -> None:
    parts = parts_of(name)
    try:
        weights, config = parts.weights, parts.engine.config
        assert config.router is not None
        traffic = ModelTraffic.of(weights, position=1000.0)
        with GgufFile.open(golden_path(name)) as file:
            untied = "output.weight" in file.tensors
            names = [key for key in file.tensors if not (untied and key == "token_embd.weight")]
            row = weights.bytes_of("token_embd.weight") / config.n_vocab
        step = traffic.step(3, 10, config.n_layers * config.router.n_expert, with_head=True)
        assert step.n_bytes == pytest.approx(sum(map(weights.bytes_of, names)) + 3 * row + 13 * 1000)
        without = traffic.step(3, 10, config.n_layers * config.router.n_expert, with_head=False)
        head = "output.weight" if untied else "token_embd.weight"
        assert step.n_bytes - without.n_bytes == weights.bytes_of(head) + weights.bytes_of("output_norm.weight")
    finally:
        parts.close()


@pytest.mark.parametrize("name", ["olmoe-q4_0", "granitemoe-shared-f32"])
def test_a_token_multiplies_with_every_hot_weight_and_top_k_experts(name: str) -> None:
    parts = parts_of(name)
    try:
        c = parts.engine.config
        assert c.router is not None
        shapes = {key: info.shape for key, info in parts.file.tensors.items() if len(info.shape) > 1}
        head = shapes.get("output.weight", shapes["token_embd.weight"])
        hot = sum(math.prod(s) for key, s in shapes.items() if key.startswith("blk.") and "_exps" not in key)
        cold = sum(math.prod(s) for key, s in shapes.items() if "_exps" in key)
        expected = 2 * (hot + cold * c.router.top_k // c.router.n_expert + math.prod(head))
        attention = 2 * c.n_layers * c.n_heads * (c.d_head + c.d_value) * 6  # of a token that sees 6 positions
        step = ModelTraffic.of(parts.weights, 0.0).step(1, 5, c.n_layers * c.router.top_k, with_head=True)
        assert step.int8_operations + step.float_operations == pytest.approx(expected + attention)
        assert (step.int8_operations > 0) == name.endswith("q4_0")
    finally:
        parts.close()


def test_tokens_of_a_chunk_see_those_before_them() -> None:
    parts = parts_of("olmoe-q4_0")
    try:
        traffic = ModelTraffic.of(parts.weights, 8.0)
        one_by_one = sum((traffic.step(1, at, 0, with_head=False) for at in (4, 5, 6)), Traffic())
        chunk = traffic.step(3, 4, 0, with_head=False)
        assert chunk.float_operations == pytest.approx(one_by_one.float_operations)
        assert chunk.int8_operations == pytest.approx(one_by_one.int8_operations)
        assert chunk.n_bytes < one_by_one.n_bytes
    finally:
        parts.close()


# ---- the machine's ceiling -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [0, 1])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_every_byte_is_read_once(n_threads: int, streams: int) -> None:
    numbers = np.random.default_rng(0).integers(-(2**31), 2**31, size=5 * 1024, dtype=np.int64).astype(np.int32)
    sums = np.zeros(16 * n_threads, np.int32)
    pool = ThreadPool(n_threads)
    try:
        argument = np.array([(numbers.ctypes.data, numbers.nbytes, streams, sums.ctypes.data)], roofline.READ)
        roofline._run(pool, roofline.read_all, argument)
        assert sums[::16].astype(np.int64).sum() % 2**32 == numbers.astype(np.int64).sum() % 2**32
        before = numbers.copy()
        roofline._run(pool, roofline.touch, argument)
        assert (numbers[::1024] == 1).all() and (
            np.delete(numbers, np.s_[::1024]) == np.delete(before, np.s_[::1024])
        ).all()
    finally:
        pool.close()


@pytest.mark.parametrize(("wide", "n_unsigned", "n_signed"), [(1, 4, 3), (0, 2, 2)])
def test_every_dot_product_is_computed(wide: int, n_unsigned: int, n_signed: int) -> None:
    operands = np.random.default_rng(1).integers(256, size=128 * 64).astype(np.uint8)
    n_rounds, sums = 70, np.zeros(32, np.int32)
    pool = ThreadPool(2)
    try:
        argument = np.array([(operands.ctypes.data, n_rounds, wide, sums.ctypes.data)], roofline.DOTS)
        roofline._run(pool, roofline.dot_all, argument)
    finally:
        pool.close()
    n_sums = n_unsigned * n_signed
    expected = 16 * n_sums * (n_sums - 1) // 2  # the sums start at 0, 1, 2, ... in each lane
    vectors = operands.reshape(128, 64)
    for i in range(n_rounds):
        first = i % 64
        unsigned = vectors[first : first + n_unsigned].astype(np.int64)
        signed = vectors[first + n_unsigned :][:n_signed].view(np.int8).astype(np.int64)
        expected += int((unsigned @ signed.T).sum())
    assert sums[::16].tolist() == [np.int64(expected).astype(np.int32)] * 2


def test_memory_to_read_is_a_gigabyte_or_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "WANTED_BYTES", 1 << 30)
    assert roofline.memory_for(8 << 30) == 1 << 30
    assert roofline.memory_for(300 << 20) == 150 << 20
    assert roofline.memory_for(20 << 20) == roofline.memory_for(-5) == 0


# ---- tests and their options -----------------------------------------------------------------------------------------
def test_tests_are_named_as_llama_bench_names_them() -> None:
    assert [test.name for test in TESTS] == ["pp20", "pp3", "tg4", "pp20 @ d7", "pp3 @ d7", "tg4 @ d7"]
    assert [test.name for test in bench.DEFAULT] == ["pp512", "pp128", "tg64"]
    assert bench_runner.context_for(TESTS) == 27


@pytest.mark.parametrize("sizes", [([0], [], [0]), ([], [-1], [0]), ([1], [], [-1]), ([], [], [0]), ([1], [1], [])])
def test_what_cannot_be_measured_is_refused(sizes: tuple[list[int], list[int], list[int]]) -> None:
    with pytest.raises(OptionError):
        bench.tests_of(*sizes)


# ---- running ---------------------------------------------------------------------------------------------------------
def test_a_run_starts_and_ends_at_its_depth_and_counts_what_it_used() -> None:
    parts = parts_of("olmoe-q4_0")
    try:
        router, n_layers = parts.engine.config.router, parts.engine.config.n_layers
        assert router is not None
        runner, tokens = bench_runner.Runner(parts), parts.session.tokens
        for test in TESTS:
            runner.prepare(test)
            assert len(tokens) == test.depth
            filled = list(tokens)
            run = runner.run(test)
            traffic = run.traffic
            assert tokens == filled and run.seconds > 0
            sizes = bench_runner.traffic_of(parts)
            if test.kind == "generate":
                each = n_layers * router.top_k
                steps = [sizes.step(1, test.depth + i, each, with_head=True) for i in range(test.n_tokens)]
                assert traffic.n_bytes == pytest.approx(sum(steps, Traffic()).n_bytes)
            else:
                least = sizes.step(test.n_tokens, test.depth, n_layers * router.top_k, with_head=True)
                most = sizes.step(test.n_tokens, test.depth, n_layers * router.n_expert, with_head=True)
                assert least.n_bytes <= traffic.n_bytes <= most.n_bytes
                assert traffic.int8_operations == pytest.approx(most.int8_operations)
    finally:
        parts.close()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_the_report_has_every_figure(device: str) -> None:
    with model.load(golden_path("qwen2moe-f32"), context=64, threads=2, device=device) as loaded:
        stages: list[str] = []
        report = loaded.bench(TESTS, repetitions=2, progress=lambda stage, fraction: stages.append(stage))
        document = json.loads(json.dumps(report.as_json()))
    assert set(document) == {"schema", "model", "machine", "settings", "versions", "ceiling", "tests"}
    assert [test["test"] for test in document["tests"]] == [test.name for test in TESTS]
    assert document["machine"]["threads"] == (2 if device == "cpu" else 1)
    for test in document["tests"]:
        assert set(test) == KEYS
        assert len(test["runs_s"]) == 2 and min(test["runs_s"]) > 0
        assert test["tokens_per_s_min"] <= test["tokens_per_s"] <= test["tokens_per_s_max"]
        assert (test["ttft_s"] is None) == (test["kind"] == "generate") == (test["tpot_s"] is not None)
        assert {"embed", "attend", "experts", "head", "other"} <= set(test["phases_s_per_token"])
        assert (test["read_share"] is None) == (device == "reference")
        assert test["int8_gop_per_s"] == 0 < test["float_gop_per_s"]  # this model holds floats
    if device == "cpu":
        assert document["ceiling"]["read_bytes"] == 16 << 20
        assert document["ceiling"]["read_gb_per_s"] == max(document["ceiling"]["read_passes_gb_per_s"])
        assert "compiling the loops that measure this machine" in stages
    else:
        assert document["ceiling"] is None


def test_a_model_answers_as_before_when_its_bench_was_interrupted() -> None:
    with model.load(golden_path("olmoe-q4_0"), context=64, threads=2) as loaded:
        before = loaded.generate([1, 2, 3], max_tokens=8).text

        def stop(stage: str, fraction: float) -> None:
            if stage.startswith("tg4: phases"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loaded.bench(TESTS, repetitions=1, progress=stop)
        assert loaded.generate([1, 2, 3], max_tokens=8).text == before
        assert loaded.bench(TESTS[:1], repetitions=1).results[0].runs_s


def test_the_timed_device_is_taken_away_again() -> None:
    parts = parts_of("olmoe-q4_0")
    try:
        device, embed = parts.engine.device, parts.engine.embed
        runner = bench_runner.Runner(parts, check=lambda: None)
        runner.prepare(TESTS[2])
        phases = runner.phases(TESTS[2])
        assert phases["attend"] > 0 and phases["experts"] > 0 and "run_layers" not in phases
        runner._check = lambda: 1 / 0  # type: ignore[assignment, return-value]   # it stops the run
        with pytest.raises(ZeroDivisionError):
            runner.phases(TESTS[2])
        assert parts.engine.device is device and parts.engine.embed == embed
    finally:
        parts.close()


def test_bad_requests_are_refused_before_anything_runs() -> None:
    with model.load(golden_path("olmoe-q4_0"), context=16, threads=1) as loaded:
        with pytest.raises(OptionError, match="pp20 @ d7 needs a context of 27, the model was loaded with 16"):
            loaded.bench(TESTS)
        with pytest.raises(OptionError, match="repetitions=0"):
            loaded.bench(bench.tests_of([1], [], [0]), repetitions=0)


# ---- the command -----------------------------------------------------------------------------------------------------
def call(capfd: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["edgert", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    out, err = capfd.readouterr()
    return int(left.value.code or 0), out, err


def test_the_last_line_is_json_and_a_table_goes_before_it(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = str(golden_path("olmoe-q4_0")), ["--prompt", "9,3", "--generate", "2", "--depth", "0,5"]
    code, out, err = call(capfd, monkeypatch, "bench", path, *sizes, "--repetitions", "1", "--threads", "2")
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    document = json.loads(last)
    assert document["settings"]["context"] == 14 and document["machine"]["threads"] == 2
    for test in document["tests"]:
        assert any(line.startswith(f"{test['test']} ") and f"{test['tokens_per_s']:.1f}" in line for line in lines)
        assert any(line.startswith(f"{test['test']}: ") and "%" in line for line in lines)
    code, out, _ = call(capfd, monkeypatch, "bench", path, "--prompt", "4", "--generate", "", "--json")
    assert code == 0 and [test["test"] for test in json.loads(out)["tests"]] == ["pp4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a"], "--prompt 'a' is not a list of numbers"),
        (["--prompt", "", "--generate", ""], "there is nothing to measure"),
        (["--depth", "4090"], "context=4602 must lie between 1 and 4096"),
        (["--repetitions", "0"], "--repetitions"),
    ],
)
def test_bad_options_are_named(capfd: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    code, out, err = call(capfd, monkeypatch, "bench", str(golden_path("olmoe-q4_0")), *arguments)
    assert code == 2 and not out and said in " ".join(err.split())

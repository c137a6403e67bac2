"""ONNX Runtime's devices: llama.cpp's logits and the CPU device's, in parts too, and streamed as if resident.

Runs on each provider that is installed of those that edgert is proven on: the CPU's always, OpenVINO's where the
package onnxruntime-openvino is in the place of onnxruntime.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
from models import engine_of, golden, golden_names, golden_path, run
from streaming_models import Host, answer
from test_device import N_CONTEXT, Weights, config
from test_device import logits as logits_of
from test_kernels import random_matrix

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

import edgert
from edgert import verifying
from edgert.devices import onnx_runtime
from edgert.devices.base import ExpertWeights
from edgert.devices.onnx_forms import Forms
from edgert.devices.onnx_weights import blocks, floats, half_split
from edgert.devices.selection import parse
from edgert.errors import OptionError
from edgert.pack import pack
from edgert.quant.formats import FORMATS
from edgert.storage.bundle import Bundle
from edgert.types import LayerConfig

PROVIDERS = [provider.name for provider in onnx_runtime.available() if provider.proven]
SPLITS = ("attention=onnx:cpu,experts=cpu", "attention=cpu,experts=onnx:cpu")
FAMILIES = ("llama", "olmoe", "qwen2moe", "qwen3moe", "granitemoe")  # that graphs have all of
NAMES = [name for name in golden_names() if name.split("-")[0] in FAMILIES]
FLOAT = [name for name in NAMES if name.endswith("-f32")]
QUANTISED = [name for name in NAMES if not name.endswith("-f32")]
OTHERS = sorted(set(golden_names()) - set(NAMES))
F32_BOUND, KL_BOUND = 2e-3, 5e-3


def device(name: str, **options: Any) -> Any:
    return partial(parse(name).make, **options)


def on(name: str, path: Path, tokens: list[int], chunk: int = 64, **options: Any) -> Any:
    """Logits of a text on a device."""
    kv_type = options.get("kv_type", "f32")
    engine, session = engine_of(path, device=device(name, kv_type=kv_type), **options)
    found = run(engine, session, tokens, chunk=chunk)
    engine.device.close()
    return found


def divergence(expected: Any, found: Any) -> float:
    """Mean Kullback-Leibler divergence of logits (n, n_vocab), nats a token."""

    def logs(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = logs(expected), logs(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


# ---- the same answers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", FLOAT)
def test_f32_equals_llama_cpp(name: str, provider: str) -> None:
    path, expected = golden(name)
    engine, session = engine_of(path, device=device(f"onnx:{provider}", kv_type="f32"))
    ids: list[Any] = []
    layers = range(engine.config.n_layers)
    engine.trace = lambda device: ids.extend(np.sort(device.chosen(layer)[0], axis=1) for layer in layers)
    tokens = expected["tokens"].tolist()
    found = run(engine, session, tokens)
    assert np.abs(found - expected["logits"]).max() <= F32_BOUND
    assert (np.array(ids) == np.sort(expected["router_ids"], axis=2)).all()
    session.tokens.clear()
    assert np.abs(run(engine, session, tokens[:20], chunk=1) - expected["logits"][:20]).max() <= F32_BOUND
    engine.device.close()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_with_float_activations_is_exact(name: str, provider: str) -> None:
    if provider != "cpu" and name.partition("-")[0] != "olmoe":
        pytest.skip("one architecture shows what this provider makes of the formats")
    path, expected = golden(name)
    found = on(f"onnx:{provider}", path, expected["tokens"].tolist(), activations="f32")
    assert np.abs(found - expected["logits_dequant"]).max() <= F32_BOUND


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", QUANTISED)
def test_int8_activations_stay_close_to_the_cpu_device(name: str, provider: str) -> None:
    if provider != "cpu" and name.partition("-")[0] != "olmoe":
        pytest.skip("one architecture shows what this provider makes of the formats")
    path, expected = golden(name)
    tokens = expected["tokens"].tolist()
    options = {"activations": "int8", "kv_type": "f16"}
    assert divergence(*(on(d, path, tokens, **options) for d in ("cpu", f"onnx:{provider}"))) <= KL_BOUND


@pytest.mark.parametrize("name", OTHERS)
def test_what_graphs_do_not_have_is_refused_by_name(name: str) -> None:
    path, _ = golden(name)
    architecture = name.rpartition("-")[0].removesuffix("-lite").removesuffix("-v3")
    with pytest.raises(
        OptionError, match=rf"device='onnx:cpu' does not have [\w ']+, which {architecture.split('-')[0]}"
    ):
        engine_of(path, device=device("onnx:cpu", kv_type="f32"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["olmoe-q4_0", "granitemoe-shared-f32", "qwen2moe-f32"])
def test_parts_on_different_devices_give_the_same(name: str, split: str) -> None:
    path, expected = golden(name)
    engine, session = engine_of(path, device=device(split, kv_type="f32"))
    right = expected["logits_dequant" if "q4" in name else "logits"]
    for chunk in (1, 64, 7, 17):
        for every_layer in (False, True):
            engine.every_layer = every_layer
            session.tokens.clear()
            found = run(engine, session, expected["tokens"].tolist(), chunk=chunk)
            assert np.abs(found - right).max() <= F32_BOUND, (chunk, every_layer)
    engine.device.close()


CASES = {
    "odd-floats": (config(40, 24, (3, 1), 12, (5, 2), 9, shared_gate=True), ("f16", "bf16", "f16", "f16")),
    "one-expert": (config(33, 17, (2, 2), 8, (1, 1), 0), ("f32", "f32", "bf16", "f32")),
    "dense": (config(96, 0, (3, 3), 32, (0, 0), 64), ("int4", "int8", "f16", "int4")),
    "bits": (config(64, 32, (4, 1), 16, (3, 3), 0), ("int3-min", "int2-g16-min", "iq4-nl", "int6-g16")),
    "gelu": (config(64, 32, (4, 2), 16, (4, 2), 0, activation="gelu"), ("int4", "int4", "int4", "int4")),
    "oss": (config(64, 32, (4, 2), 16, (4, 2), 32, activation="swiglu-oss"), ("mxfp4", "mxfp4", "mxfp4", "int8")),
    "window": (
        config(64, 32, (4, 2), 16, (4, 2), 0, layers=(LayerConfig(window=9),) * 2),
        ("int4", "int4", "int4", "int4"),
    ),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CASES)
def test_odd_sizes_and_formats_give_what_the_cpu_device_gives(name: str, provider: str) -> None:
    c, formats = CASES[name]
    weights = Weights(c, *formats)
    options = {"activations": "f32", "kv_type": "f32"}
    expected = logits_of(*weights.engine(device("cpu", **options)(c, N_CONTEXT), "f32"), 34)
    engine, session = weights.engine(device(f"onnx:{provider}", **options)(c, N_CONTEXT), "f32")
    for chunk in (34, 5, 1):
        assert np.abs(logits_of(engine, session, chunk) - expected).max() <= F32_BOUND * np.abs(expected).max()
    engine.device.close()


@pytest.mark.parametrize("name", ["onnx:cpu", *SPLITS])
def test_whoever_observes_sees_the_rows_that_the_cpu_device_shows(name: str) -> None:
    path, expected = golden("olmoe-f32")
    seen: list[dict[int, Any]] = []
    for one in ("cpu", name):
        engine, session = engine_of(path, device=device(one, kv_type="f32"))
        rows: dict[int, Any] = {}

        def observe(layer: int, made: Any = engine.device, rows: dict[int, Any] = rows) -> None:
            hidden = np.empty((made.routed(layer).tokens.size, made.config.d_expert), np.float32)
            hidden[made.routed(layer).slots] = made.hidden(layer)
            rows[layer] = made.inputs(layer).copy(), hidden

        engine.observe = observe
        run(engine, session, expected["tokens"].tolist()[:20])
        seen.append(rows)
        engine.device.close()
    for layer, right in seen[0].items():
        for ours, theirs in zip(seen[1][layer], right, strict=True):
            assert np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["onnx:cpu", *SPLITS])
def test_routers_look_ahead(name: str) -> None:
    path, expected = golden("olmoe-f32")
    scores = []
    for one in ("cpu", name):
        engine, session = engine_of(path, device=device(one, kv_type="f32"))
        found: list[Any] = []
        layers = range(engine.config.n_layers)
        engine.trace = lambda made, found=found, layers=layers: found.extend(  # type: ignore[misc]   # bound early
            row.copy() for layer in layers for row in made.ahead(layer)
        )
        run(engine, session, expected["tokens"].tolist()[:5], chunk=5)
        scores.append(np.array(found))
        engine.device.close()
    assert len(scores[0]) and np.allclose(*scores, atol=1e-3)


def test_a_row_of_a_memory_apart_is_copied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    c = CASES["window"][0]
    part = parse("attention=onnx:cpu,experts=cpu").make(c, N_CONTEXT)._attention  # type: ignore[attr-defined]
    rows = np.random.default_rng(5).random((6, c.d_model), np.float32)
    part.begin(rows)
    monkeypatch.setattr(part._stream.buffer, "host", None)  # nobody asks for all of it
    for row in (4, 1):
        assert (part._copied(part._stream.rows(row, 1)) == rows[row]).all()
    part.close()


# ---- experts on flash ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["onnx:cpu", *SPLITS])
def test_streamed_equals_resident(name: str, tmp_path: Path) -> None:
    source = golden_path("olmoe-q4_0")
    prompt = [(7 * i * i + 3 * i + 11) % 200 for i in range(40)]
    made = device(name)
    engine, session = engine_of(source, activations="int8", kv_type="f16", device=made)
    expected, tokens = answer(engine, session, prompt, 20, 24)
    engine.device.close()
    bundle = Bundle.open(pack(source, tmp_path / "m.edge", progress=lambda stage, fraction: None))
    with bundle, Host(bundle, device=made) as host:
        for share, mode in ((0.0, "off"), (0.25, "off"), (0.25, "always"), (0.5, "always"), (1.0, "off")):
            engine, session, experts = host.streamed(share=share, mode=mode)
            found, said = answer(engine, session, prompt, 20, 24)
            assert (found == expected).all() and said == tokens, (share, mode)
            assert experts.residency.check() == []
            counts = experts.residency.counts
            assert counts.expert_misses > 0 and counts.expert_hits > 0


def test_sessions_of_streamed_experts_go_when_others_take_their_places(tmp_path: Path) -> None:
    source = golden_path("olmoe-q4_0")
    bundle = Bundle.open(pack(source, tmp_path / "m.edge", progress=lambda stage, fraction: None))
    with bundle, Host(bundle, device=device("onnx:cpu")) as host:
        engine, session, experts = host.streamed(share=0.25)
        answer(engine, session, list(range(40)), 1, 10)
        alive = sum(row.run is not None for table in experts.residency.tables for row in table)
        assert 0 < alive <= len(experts.slots.memory) // int(bundle.record_bytes.min())


def test_sessions_of_streamed_experts_go_with_the_end_of_the_buffer(tmp_path: Path) -> None:
    source = golden_path("olmoe-q4_0")
    bundle = Bundle.open(pack(source, tmp_path / "m.edge", progress=lambda stage, fraction: None))
    with bundle, Host(bundle, device=device("onnx:cpu")) as host:
        engine, session, experts = host.streamed(share=1.0)
        expected = answer(engine, session, list(range(40)), 40, 4)
        session.tokens.clear()
        made = [weakref.ref(row.run) for table in experts.residency.tables for row in table if row.run is not None]
        experts.residency.request_bytes(experts.residency.least_bytes)
        n_slots = experts.residency.least_bytes // int(bundle.record_bytes.min())
        engine.step([1], session)
        session.tokens.clear()
        assert len(made) > 2 * n_slots >= 2 * sum(run() is not None for run in made)
        found = answer(engine, session, list(range(40)), 40, 4)
        assert (found[0] == expected[0]).all() and found[1] == expected[1]


@pytest.mark.parametrize("own", [True, False])
def test_experts_whose_weights_are_inputs_give_the_same(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forms, "_decide", lambda self, weights: own)
    path, expected = golden("olmoe-q4_1")
    found = on("onnx:cpu", path, expected["tokens"].tolist())
    assert np.abs(found - expected["logits_dequant"]).max() <= F32_BOUND


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_faster_form_is_chosen_whatever_else_the_machine_does(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forms, "_seconds", None)  # the forms differ in their last bits: nothing is timed
    c = config(256, 512, (4, 2), 16, (4, 2), 0)
    parts = [random_matrix(FORMATS["int4"], *shape, seed=7) for shape in ((512, 256), (512, 256), (256, 512))]
    forms = Forms(c, onnx_runtime.settings_for(provider, 1, "int8"))
    forms.make(ExpertWeights(*parts))
    assert forms.own  # by far on the CPU's; the only one on OpenVINO's


# ---- several models --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("provider", PROVIDERS)
def test_two_models_in_one_process_answer_as_each_alone(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "folder", lambda: tmp_path / "verdicts")
    sizes = replace(tiny_moe.SIZES, n_layer=3, d_expert=96)
    paths = [tiny_moe.write(tmp_path / "a.gguf"), tiny_moe.write(tmp_path / "b.gguf", seed=6, sizes=sizes)]
    paths[1] = pack(paths[1], tmp_path / "b.edge", progress=lambda stage, fraction: None)
    options: list[dict[str, Any]] = [{}, {"residency": 0.5}]
    prompts = [tiny_moe.text(9, seed) for seed in range(3)]

    def load(i: int) -> edgert.Model:
        return edgert.load(paths[i], device=f"onnx:{provider}", context=64, threads=2, **options[i])

    def answer(model: edgert.Model, prompt: str) -> Any:
        with model.held() as parts:
            parts.session.tokens.clear()  # in chunks of other sizes the last bits are others
        return model.generate(prompt, max_tokens=12, temperature=0, logprobs=3).logprobs

    def answers(model: edgert.Model) -> list[Any]:
        return [answer(model, prompt) for prompt in prompts]

    alone = []
    for i in range(2):
        with load(i) as model:
            alone.append(answers(model))
    assert alone[0] != alone[1]
    with load(0) as first, load(1) as second:
        turns = [(answer(first, prompt), answer(second, prompt)) for prompt in prompts]
        assert turns == list(zip(*alone, strict=True))
        for model in (first, second):
            answer(model, prompts[1])
        both = [
            model.generate(prompts[0], max_tokens=12, temperature=0, logprobs=3, stream=True)
            for model in (first, second)
        ]
        for _ in zip_longest(*both):  # a piece of each in turn
            pass
        found = [[piece.token_id for piece in stream.completion.logprobs or ()] for stream in both]
        assert found == [[piece.token_id for piece in answers[0]] for answers in alone]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                assert list(pool.map(answers, (first, second))) == alone
        assert [answers(first), answers(second)] == alone


# ---- weights ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [format.name for format in FORMATS.values()])
def test_every_format_carries_over(name: str) -> None:
    format = FORMATS[name]
    matrix = random_matrix(format, 37, 512, seed=3)
    right = matrix.to_float()
    rows = np.random.default_rng(1).permutation(37)
    if not format.is_integer:
        assert (floats(matrix) == right).all() and (floats(matrix, rows) == right[rows]).all()
        return
    w = blocks(matrix, rows)
    values = w.integers if w.bits == 8 else np.stack((w.integers & 15, w.integers >> 4), axis=-1)
    stored = values.reshape(37, -1, w.block).astype(np.float64) - (1 << (w.bits - 1))
    made = stored * w.scales[:, :, None] + (0 if w.minima is None else w.minima[:, :, None])
    assert np.abs(made.reshape(37, 512) - right[rows]).max() <= 1e-6 * np.abs(right).max()


def test_pairs_of_a_rotation_are_put_apart_within_each_head() -> None:
    assert half_split(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


# ---- the whole -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_embedded_model_chats(provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider != "cpu":
        pytest.skip("240 experts take this provider minutes to compile; tried by hand")
    monkeypatch.setattr(verifying, "folder", lambda: tmp_path)
    with edgert.load(device=f"onnx:{provider}", context=256) as model:
        answer = model.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
        assert answer.text == "The capital of France is Paris."
        assert model._open().engine.device.name == f"onnx:{provider}"
    (verdict,) = verifying.verdicts()
    assert not verdict.problems and verdict.divergence < 0.8 * KL_BOUND  # trusted with room


def test_nothing_is_imported_until_asked() -> None:
    code = (
        "import sys, edgert; edgert.load(context=64, device='cpu').close();"
        "sys.exit(any(name in sys.modules for name in ('onnx', 'onnxruntime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

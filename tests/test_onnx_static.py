"""Graphs whose shapes are fixed, and those whose products are of 8-bit integers: what NPUs are given, run elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
from hypothesis import given
from hypothesis import strategies as st
from models import GgufFile, Weights, engine_of, golden, read_config, run

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from test_onnx import F32_BOUND, KL_BOUND, PROVIDERS, divergence

import edgert
from edgert import verifying
from edgert.devices import onnx_ranges, onnx_runtime
from edgert.devices.onnx_quantised import Ranges, int8_rows, steps
from edgert.devices.selection import parse
from edgert.errors import OptionError

# Weights of a golden model are random: 8 bits with a scale a row, and inputs with a scale for all of them, lose more of
# such than of a trained model's weights, and less of its inputs.
QDQ_BOUND = 5e-2


def ranges_of(path: Path) -> Ranges:
    """Seen on a text that is not the one to be run."""
    with GgufFile.open(path) as file:
        config = read_config(file.metadata, str(path))
        weights = Weights(file, config)
        return onnx_ranges.measure(config, weights, weights.embed([(7 * i * i + 3 * i) % 200 for i in range(64)]), 2)


def on(name: str, path: Path, tokens: list[int], chunk: int, *, activations: str, **options: Any) -> Any:
    kv_type = "f32" if activations == "f32" else "f16"
    device = partial(parse(name).make, kv_type=kv_type, chunk=16, **options)
    engine, session = engine_of(path, device=device, activations=activations, kv_type=kv_type)
    found = run(engine, session, tokens, chunk=chunk)
    engine.device.close()
    return found


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["granitemoe-shared-f32", "olmoe-f32"])
def test_padded_steps_give_llama_cpps_logits(name: str, provider: str) -> None:
    path, expected = golden(name)
    for chunk in (16, 7):  # whole chunks and a rest, and no whole one
        found = on(f"onnx:{provider}+static", path, expected["tokens"].tolist(), chunk, activations="f32")
        assert np.abs(found - expected["logits"]).max() <= F32_BOUND
    found = on(f"onnx:{provider}+static", path, expected["tokens"].tolist()[:6], 1, activations="f32")
    assert np.abs(found - expected["logits"][:6]).max() <= F32_BOUND


@pytest.mark.parametrize("provider", PROVIDERS)
def test_padding_leaves_the_last_positions_of_the_context_alone(provider: str) -> None:
    path, expected = golden("olmoe-f32")
    tokens = expected["tokens"].tolist()[:30]
    device = partial(parse(f"onnx:{provider}+static").make, kv_type="f32", chunk=16)
    engine, session = engine_of(path, device=device, n_context=len(tokens))
    assert np.abs(run(engine, session, tokens, chunk=16) - expected["logits"][: len(tokens)]).max() <= F32_BOUND
    engine.device.close()


@pytest.mark.parametrize("split", ["attention=onnx:cpu+static,experts=cpu", "attention=cpu,experts=onnx:cpu+static"])
def test_one_part_may_be_static(split: str) -> None:
    path, expected = golden("olmoe-q4_0")
    found = on(split, path, expected["tokens"].tolist(), 16, activations="f32")
    assert np.abs(found - expected["logits_dequant"]).max() <= F32_BOUND


@pytest.mark.parametrize("provider", PROVIDERS)
def test_static_graphs_of_low_bits_stay_close_to_the_cpu_device(provider: str) -> None:
    path, expected = golden("olmoe-q4_0")
    tokens = expected["tokens"].tolist()
    right, found = (on(name, path, tokens, 16, activations="int8") for name in ("cpu", f"onnx:{provider}+static"))
    assert divergence(right, found) <= KL_BOUND


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", ["granitemoe-shared-f32", "olmoe-q4_0", "qwen2moe-f32"])
def test_products_of_8_bits_stay_near_the_cpu_device(name: str, provider: str) -> None:
    path, expected = golden(name)
    tokens = expected["tokens"].tolist()
    right = on("cpu", path, tokens, 16, activations="int8")
    found = on(f"onnx:{provider}+qdq", path, tokens, 16, activations="int8", ranges=ranges_of(path))
    assert divergence(right, found) <= QDQ_BOUND


def test_16_bits_round_outputs_too_and_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = golden("olmoe-q4_0")
    tokens, ranges = expected["tokens"].tolist(), ranges_of(path)
    right, found = on("cpu", path, tokens, 16, activations="int8"), []
    for inputs in ("uint16", "int8"):
        provider = onnx_runtime.Provider("cpu", "CPUExecutionProvider", inputs=inputs)
        monkeypatch.setitem(onnx_runtime.PROVIDERS, "cpu", provider)
        found.append(divergence(right, on("onnx:cpu+qdq", path, tokens, 16, activations="int8", ranges=ranges)))
    assert found[0] <= KL_BOUND and found[0] < found[1] <= QDQ_BOUND


def test_a_device_of_8_bit_products_is_loaded_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "folder", lambda: tmp_path / "verdicts")
    with edgert.load(tiny_moe.write(tmp_path / "tiny.gguf"), device="onnx:cpu+qdq!", context=64) as model:
        assert model.generate("one two", max_tokens=4, temperature=0).usage.generated_tokens
    (verdict,) = verifying.verdicts()
    assert verdict.device == "onnx:cpu+qdq" and not verdict.fallen
    assert 1e-4 < verdict.errors["attention"] < 0.2  # it rounds


def test_rounding_needs_inputs_that_may_be_rounded() -> None:
    with pytest.raises(OptionError, match="--activations int8"):
        edgert.load(device="onnx:cpu+qdq", activations="f32", context=64)
    with pytest.raises(OptionError, match=r"\+dynamic is no form of graphs; use \+static, \+qdq"):
        parse("onnx:cpu+dynamic")


def test_providers_that_need_a_form_get_it_unasked() -> None:
    assert onnx_runtime.form_of("onnx:qnn") == "qdq" and onnx_runtime.form_of("onnx:cuda") == ""
    assert parse("qnn").quantised and parse("openvino+qdq").name == "onnx:openvino+qdq"
    assert not parse("attention=openvino+static,experts=cpu").quantised


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.sampled_from(["uint8", "int8", "uint16"]))
def test_what_was_seen_is_kept_to_half_a_step(one: float, other: float, dtype: str) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero = steps(low, high, dtype)
    info = np.iinfo(dtype)
    for value in (low, high, 0.0):
        integer = np.clip(np.rint(value / scale) + int(zero), info.min, info.max)
        assert abs((integer - int(zero)) * scale - value) <= scale * 0.51 + 1e-9


def test_rows_have_scales_of_their_own() -> None:
    weights = np.array([[1.0, -2.0], [0.0, 0.0], [1e-3, 5e-4]], np.float32)
    integers, scales = int8_rows(weights)
    assert np.allclose(integers * scales[:, None], weights, atol=np.abs(weights).max(axis=1, keepdims=True) / 254)

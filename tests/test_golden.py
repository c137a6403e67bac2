"""Against llama.cpp: logits, routing and greedy text of tiny random models of every supported architecture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import engine_of, golden, golden_names, run

FLOAT = [name for name in golden_names() if name.endswith("-f32")]
QUANTISED = [name for name in golden_names() if not name.endswith("-f32")]
MARGIN = 0.15  # where llama.cpp's best token leads by this much, 8-bit activations must agree


def routed(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """What llama.cpp answered, our logits, and our expert ids (layers that route, n_tokens, top_k), ascending."""
    path, expected = golden(name)
    engine, session = engine_of(path, **options)
    ids: list[Any] = []
    layers = expected["router_layers"].tolist()
    assert layers == [layer for layer in range(engine.config.n_layers) if engine.config.has_experts(layer)]
    engine.trace = lambda device: ids.extend(np.sort(device.chosen(layer)[0], axis=1) for layer in layers)
    logits = run(engine, session, expected["tokens"].tolist())
    return expected, logits, np.array(ids)


def greedy(name: str, **options: Any) -> list[int]:
    """16 greedy tokens after the fixture's prompt."""
    path, expected = golden(name)
    engine, session = engine_of(path, **options)
    logits = run(engine, session, expected["greedy_prompt"].tolist())[-1]
    tokens: list[int] = []
    while len(tokens) < 16:
        tokens.append(int(logits.argmax()))
        logits = run(engine, session, tokens[-1:])[-1]
    return tokens


@pytest.mark.parametrize("name", FLOAT)
def test_f32_equals_llama_cpp(name: str) -> None:
    expected, logits, ids = routed(name)
    assert np.abs(logits - expected["logits"]).max() <= 1e-3
    assert (ids == np.sort(expected["router_ids"], axis=2)).all()
    assert greedy(name) == expected["greedy"].tolist()


@pytest.mark.parametrize("name", FLOAT)
def test_f16_cache_stays_close(name: str) -> None:
    expected, logits, _ = routed(name, kv_type="f16")
    difference = logits - expected["logits"]
    assert np.sqrt(np.mean(difference**2)) <= 3e-3
    assert np.abs(difference).max() <= 3e-2


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_with_float_activations_is_exact(name: str) -> None:
    expected, logits, ids = routed(name)
    assert np.abs(logits - expected["logits_dequant"]).max() <= 1e-3
    assert (ids == np.sort(expected["router_ids_dequant"], axis=2)).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_with_int8_activations_is_as_good_as_llama_cpp(name: str) -> None:
    expected, logits, _ = routed(name, activations="int8")
    exact = expected["logits_dequant"]
    own = np.sqrt(np.mean((expected["logits"] - exact) ** 2))
    assert np.sqrt(np.mean((logits - exact) ** 2)) <= 1.25 * own
    ranked = np.sort(exact, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] >= MARGIN
    assert clear.any()
    assert (logits.argmax(axis=1) == exact.argmax(axis=1))[clear].all()

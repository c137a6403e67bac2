"""Scalings of the rotation as files name them: logits are llama.cpp's, of fixtures whose keys were changed.

The numbers are those of llama.cpp b11434: of the first six tokens behind the fixture's text, computed in F32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_models import rewritten
from models import engine_of, golden, run

LOGITS: list[tuple[str, dict[str, Any], list[float]]] = [
    (
        "deepseek2-lite-f32",
        {"rope__scaling__attn_factor": 1.5},
        [-4.0504, 1.5716, -0.5326, -3.1736, 0.8909, -1.2136],
    ),
    (
        "deepseek2-lite-f32",
        {"rope__scaling__attn_factor": 1.5, "rope__scaling__yarn_log_multiplier": None},
        [-2.6008, 2.4966, 0.1332, -2.5192, 1.0936, 1.0027],
    ),
    (
        "deepseek2-lite-f32",
        {"rope__scaling__type": "linear"},
        [-5.7187, 0.2758, 0.9372, -3.6712, -0.1202, -0.6747],
    ),
    (
        "deepseek2-lite-f32",
        {"rope__scaling__type": None, "rope__scaling__attn_factor": 0.7},
        [-5.8366, 0.3115, 2.9377, -2.5081, -0.4851, -2.2464],
    ),
    (
        "deepseek2-lite-f32",
        {"rope__scaling__type": "none", "rope__scaling__attn_factor": 1.5},
        [-3.4774, 0.1269, 0.7218, -3.7342, -0.4108, -2.6131],
    ),
    (
        "deepseek2-lite-f32",
        {"rope__scaling__factor": 0.5, "rope__scaling__yarn_log_multiplier": None},
        [-3.1124, 0.499, 2.9858, -1.9144, -0.9242, -3.8982],
    ),
    (
        "deepseek2-v3-f32",
        {"rope__scaling__attn_factor": 1.5},
        [-0.1728, -0.8676, 1.8081, 2.874, 2.3379, -1.2225],
    ),
    (
        "deepseek2-v3-f32",
        {"rope__scaling__type": "linear"},
        [1.6604, -2.5966, -0.2785, 1.4071, 2.2035, 3.6138],
    ),
    (
        "qwen3moe-f32",
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 0.5},
        [-0.7146, -2.8474, 1.5016, -0.2717, -2.2591, -1.269],
    ),
    (
        "qwen3moe-f32",
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 1.5},
        [1.7071, -0.7187, 0.4992, -0.4296, -2.3085, -0.7037],
    ),
]


@pytest.mark.parametrize(("name", "keys", "expected"), LOGITS)
def test_logits_are_those_of_llama_cpp(name: str, keys: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    path = rewritten(name, tmp_path / "scaled.gguf", **keys)
    logits = run(*engine_of(path), golden(name)[1]["tokens"].tolist())
    assert np.abs(logits[-1, : len(expected)] - expected).max() <= 1e-3

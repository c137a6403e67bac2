"""tools/balance.py: only the nibbles that stand for -8 change, and the model still runs."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
from models import golden_path

import edgert

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import balance  # noqa: E402   # found through the line above


def test_nibbles_that_stand_for_the_least_value_become_zero() -> None:
    every = np.arange(256, dtype=np.uint8)
    expected = [(high or 8) << 4 | (low or 8) for high in range(16) for low in range(16)]
    assert balance.balanced(every).tolist() == expected


def test_a_balanced_model_differs_in_those_alone(tmp_path: Path) -> None:
    source, out = golden_path("olmoe-q4_0"), tmp_path / "out.gguf"
    assert balance.balance(source, out) > 0 and [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    for before, after in zip(gguf.GGUFReader(source).tensors, gguf.GGUFReader(out).tensors, strict=True):
        if before.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            pairs = (np.array(tensor.data).reshape(-1, 18) for tensor in (before, after))
            (old, new) = pairs
            assert (old[:, :2] == new[:, :2]).all() and (balance.balanced(old[:, 2:]) == new[:, 2:]).all()
        else:
            assert (np.array(before.data) == np.array(after.data)).all()
    with edgert.load(out, context=16, threads=1) as model:
        assert len(model.generate([1, 2, 3], max_tokens=4).token_ids) >= 1

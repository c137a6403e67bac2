"""The widening tool: more bytes an expert, the same logits bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from models import engine_of, golden_path, run

from edgert.errors import ModelFileError, OptionError
from edgert.storage.gguf_file import GgufFile

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools")]  # it is no package

import widen  # noqa: E402   # found through the line above

TOKENS = [int(token) for token in np.random.default_rng(1).integers(100, size=40)]


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("name", ["llama-q4_0", "llama-q4_k", "qwen2moe-f32"])
def test_wider_experts_give_the_same_logits(name: str, activations: str, tmp_path: Path) -> None:
    source, out = golden_path(name), tmp_path / "wide.gguf"
    with GgufFile.open(source) as file:
        old = file.tensors["blk.0.ffn_gate_exps.weight"].shape[1]
    widen.widen(source, out, 8 * old)
    with GgufFile.open(source) as before, GgufFile.open(out) as after:
        assert list(before.tensors) == list(after.tensors)
        for part, axis in (("gate", 1), ("up", 1), ("down", 2)):
            name = f"blk.0.ffn_{part}_exps.weight"
            assert (
                after.tensors[name].shape[axis] == 8 * old
                and after.tensors[name].n_bytes > 7 * before.tensors[name].n_bytes
            )
        assert before.metadata["tokenizer.ggml.tokens"] == after.metadata["tokenizer.ggml.tokens"]
    logits = [run(*engine_of(path, activations=activations), TOKENS) for path in (source, out)]
    assert np.array_equal(*logits) and np.isfinite(logits[0]).all()


def test_what_cannot_be_widened_is_refused(tmp_path: Path) -> None:
    source = golden_path("llama-q4_0")
    with pytest.raises(OptionError, match="--width 33: it must be at least"):
        widen.widen(source, tmp_path / "out.gguf", 33)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    with pytest.raises(ModelFileError, match=r"bad\.gguf: not readable as GGUF"):
        widen.widen(tmp_path / "bad.gguf", tmp_path / "out.gguf", 64)
    assert not list(tmp_path.glob("out*"))

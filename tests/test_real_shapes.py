"""tools/real_shapes.py: blocks without a mean, and both shapes in small, which run the same whole and streamed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

import edgert

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path[:0] = [str(TOOLS)]  # it is no package

import real_shapes  # noqa: E402   # found through the line above
from random_blocks import BLOCKS, random_blocks  # noqa: E402

# Both shapes with fewer of everything, wide enough for K-quants; rows of 352 make their types fall back.
SMALL = {
    "gpt-oss-20b": {
        "block_count": 2,
        "embedding_length": 288,
        "expert_feed_forward_length": 352,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.sliding_window": 16,
        "expert_count": 8,
        "vocab_size": 2000,
    },
    "deepseek-v2-lite": {
        "block_count": 4,
        "embedding_length": 256,
        "feed_forward_length": 352,
        "expert_feed_forward_length": 352,
        "attention.head_count": 2,
        "attention.kv_lora_rank": 256,
        "attention.key_length": 320,
        "attention.value_length": 256,
        "expert_count": 12,
        "vocab_size": 2000,
    },
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("spread", [1.0, 2880**-0.5, 0.03])
def test_blocks_have_the_spread_and_no_mean(kind: gguf.GGMLQuantizationType, spread: float) -> None:
    values = gguf.dequantize(random_blocks(kind, np.random.default_rng(1), 4000, spread), kind).ravel()
    assert abs(values.std() / spread - 1) < 0.02
    assert abs(values.mean()) < 5 * spread * len(values) ** -0.5, "five standard errors"


@pytest.mark.parametrize("name", SMALL)
def test_the_full_model_has_the_sizes_of_the_public_file(name: str) -> None:
    """ggml-org's gpt-oss-20b-mxfp4.gguf: 289 tensors of F32, 98 of Q8_0, 72 of MXFP4, 12.1 GB. A Q4_K_M of
    DeepSeek-V2-Lite: 14 of Q5_0 and 13 of Q8_0 down projections, 10.4 GB.
    """
    tensors = list(real_shapes.SHAPES[name].tensors(real_shapes.keys_of(name)))
    counts = {kind.name: sum(tensor.type == kind for tensor in tensors) for kind in {one.type for one in tensors}}
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    if name == "gpt-oss-20b":
        assert counts == {"F32": 289, "Q8_0": 98, "MXFP4": 72} and abs(n_bytes / 12.1e9 - 1) < 0.01
    else:
        down = [
            tensor.type.name
            for tensor in tensors
            if tensor.name.endswith(("ffn_down_exps.weight", "0.ffn_down.weight"))
        ]
        assert (down.count("Q5_0"), down.count("Q8_0")) == (14, 13) and abs(n_bytes / 10.4e9 - 1) < 0.01
        assert counts["Q6_K"] == 13


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_runs_the_same_from_flash(name: str, tmp_path: Path) -> None:
    path, bundle, keys = tmp_path / "small.gguf", tmp_path / "small.edge", real_shapes.keys_of(name, **SMALL[name])
    n_bytes = real_shapes.write(name, path, keys)
    assert n_bytes == path.stat().st_size and [one.name for one in tmp_path.iterdir()] == [path.name]
    assert real_shapes.write(name, tmp_path / "again.gguf", keys) == n_bytes
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes(), "the same seed, the same file"
    subprocess.run(
        [sys.executable, "-c", "from edgert.cli.main import main; main()", "pack", path, bundle],
        check=True,
        capture_output=True,
    )
    tokens = np.random.default_rng(2).integers(0, 1500, 40).tolist()
    with edgert.load(path, context=64) as whole, edgert.load(bundle, context=64, residency=0.5) as streamed:
        logits = whole.logits(tokens)
        assert np.isfinite(logits).all() and 2 < logits.std() < 4
        assert (streamed.logits(tokens) == logits).all()
        assert whole.tokenizer.decode(whole.tokenizer.encode("a small word", bos=False)) == "a small word"


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_shapes.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    keys = real_shapes.keys_of("gpt-oss-20b")
    with pytest.raises(edgert.EdgertError, match=r"MiB are needed, 1,024 MiB are free"):
        real_shapes.write("gpt-oss-20b", tmp_path / "full.gguf", keys)
    assert not list(tmp_path.iterdir())

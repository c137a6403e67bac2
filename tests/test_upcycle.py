"""The upcycling tool: what it assembles from a dense file and experts, and, with torch, that it trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]  # neither is a package

import upcycle  # noqa: E402
import upcycle_file  # noqa: E402
from toy_dense import (  # noqa: E402
    D_FF,
    D_HEAD,
    D_MODEL,
    N_HEAD,
    N_KV_HEAD,
    N_LAYER,
    N_VOCAB,
    TEMPLATE,
    TOKEN_TYPES,
    TOKENS,
    write_dense,
)
from upcycle_file import Card, DenseFile  # noqa: E402

from edgert.errors import ModelFileError, OptionError, UnsupportedError  # noqa: E402

N_EXPERT, D_EXPERT = 4, 32


def random_experts() -> dict[str, np.ndarray]:
    """Routed experts that fit the toy."""
    random = np.random.default_rng(3)
    shapes = {
        "ffn_gate_inp": (N_EXPERT, D_MODEL),
        "ffn_gate_exps": (N_EXPERT, D_EXPERT, D_MODEL),
        "ffn_up_exps": (N_EXPERT, D_EXPERT, D_MODEL),
        "ffn_down_exps": (N_EXPERT, D_MODEL, D_EXPERT),
    }
    return {
        f"blk.{n}.{part}.weight": random.standard_normal(shape).astype(np.float32)
        for n in range(N_LAYER)
        for part, shape in shapes.items()
    }


def assembled(folder: Path, *, tied: bool = True, expert_type: str = "Q4_0") -> tuple[Any, Any]:
    """Readers of a toy dense file and of the file assembled from it and random experts."""
    dense = DenseFile(write_dense(folder / "dense.gguf", tied=tied))
    out = folder / "moe.gguf"
    card = upcycle_file.default_card(dense, N_EXPERT, 2)
    experts = upcycle_file.as_stored(random_experts())
    upcycle_file.assemble(dense, experts, out, top_k=2, expert_type=expert_type, card=card)
    return dense.reader, gguf.GGUFReader(out)


def test_the_hot_weights_are_the_dense_files_blocks_bit_for_bit(tmp_path: Path) -> None:
    dense, moe = assembled(tmp_path)
    made = {tensor.name: tensor for tensor in moe.tensors}
    for tensor in dense.tensors:
        name = tensor.name
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            name = name.replace(f"{part}.", f"{part}_shexp.")
        copy = made.pop(name)
        assert copy.tensor_type == tensor.tensor_type
        assert copy.shape.tolist() == tensor.shape.tolist()
        assert copy.data.tobytes() == tensor.data.tobytes()
    assert set(made) == set(random_experts())  # nothing else is in the file


@pytest.mark.parametrize("expert_type", upcycle_file.EXPERT_TYPES)
def test_the_experts_are_stored_in_the_type_asked_for(tmp_path: Path, expert_type: str) -> None:
    _, moe = assembled(tmp_path, expert_type=expert_type)
    kind = gguf.GGMLQuantizationType[expert_type]
    made = {tensor.name: tensor for tensor in moe.tensors}
    for name, values in upcycle_file.as_stored(random_experts()).items():
        if name.endswith("ffn_gate_inp.weight"):
            assert np.array_equal(made[name].data, values)
        else:
            assert made[name].tensor_type == kind
            wanted = gguf.quants.quantize(values.astype(np.float32), kind)
            assert made[name].data.tobytes() == wanted.tobytes()
    back = upcycle_file.experts_of(tmp_path / "moe.gguf")
    assert {name: value.shape for name, value in back.items()} == {
        name: value.shape for name, value in random_experts().items()
    }


def test_every_key_of_the_new_file_is_right(tmp_path: Path) -> None:
    _, moe = assembled(tmp_path)
    found = {key: field.contents() for key, field in moe.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        "general.architecture": "granitemoe",
        "general.type": "model",
        "general.name": "Toy 1M MoE",
        "general.basename": "dense-moe",
        "general.license": "mit",
        "general.description": found["general.description"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Toy 1M",
        "general.base_model.0.organization": "unknown",
        "general.quantization_version": 2,
        "granitemoe.block_count": N_LAYER,
        "granitemoe.context_length": 128,
        "granitemoe.embedding_length": D_MODEL,
        "granitemoe.feed_forward_length": D_EXPERT,
        "granitemoe.attention.head_count": N_HEAD,
        "granitemoe.attention.head_count_kv": N_KV_HEAD,
        "granitemoe.rope.freq_base": 5000.0,
        "granitemoe.rope.dimension_count": D_HEAD,
        "granitemoe.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "granitemoe.vocab_size": N_VOCAB,
        "granitemoe.expert_count": N_EXPERT,
        "granitemoe.expert_used_count": 2,
        "granitemoe.expert_shared_feed_forward_length": D_FF,
        "granitemoe.embedding_scale": 1.0,
        "granitemoe.residual_scale": 1.0,
        "granitemoe.logit_scale": 1.0,
        "granitemoe.attention.scale": 0.25,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TOKEN_TYPES,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": N_VOCAB - 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert "4 routed experts a layer, top-2" in found["general.description"]


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    dense, moe = assembled(tmp_path, tied=False)
    heads = [next(t for t in reader.tensors if t.name == "output.weight") for reader in (dense, moe)]
    assert heads[0].data.tobytes() == heads[1].data.tobytes()


def test_a_feature_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "scaled.gguf", **{"rope.scaling.factor": 4.0})
    with pytest.raises(UnsupportedError, match=r"scaled\.gguf: llama\.rope\.scaling\.factor = 4\.0"):
        DenseFile(path)


def test_a_file_that_lies_about_its_shapes_is_refused(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "lies.gguf", vocab_size=N_VOCAB + 1)
    with pytest.raises(ModelFileError, match=r"token_embd\.weight has shape \(259, 64\)"):
        DenseFile(path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda e: e.pop("blk.1.ffn_gate_inp.weight"), r"blk\.1\.ffn_gate_inp\.weight has shape None"),
        (lambda e: e.update({"blk.2.ffn_gate_inp.weight": np.zeros((4, 64))}), r"blk\.2\.ffn_gate_inp"),
        (lambda e: e.update({"blk.0.ffn_up_exps.weight": np.zeros((4, 64, 32))}), r"blk\.0\.ffn_up_exps"),
        (lambda e: e.clear(), r"blk\.0\.ffn_gate_exps"),
    ],
)
def test_experts_that_do_not_fit_are_refused(tmp_path: Path, broken: Any, message: str) -> None:
    dense = DenseFile(write_dense(tmp_path / "dense.gguf"))
    experts = random_experts()
    broken(experts)
    with pytest.raises(ModelFileError, match=message):
        upcycle_file.expert_shape(dense, experts)


@pytest.mark.parametrize(
    ("n_expert", "width", "top_k", "kind", "option"),
    [
        (4, 32, 5, "F16", "--top-k 5"),
        (4, 97, 2, "F16", "--width 97"),
        (4, 48, 2, "Q4_0", "blocks of 32"),
        (4, 32, 2, "Q4_1", "--expert-type Q4_1"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    tmp_path: Path, n_expert: int, width: int, top_k: int, kind: str, option: str
) -> None:
    config = DenseFile(write_dense(tmp_path / "dense.gguf")).config
    upcycle_file.check_expert_options(config, 4, 48, 4, "F16")
    with pytest.raises(OptionError, match=option):
        upcycle_file.check_expert_options(config, n_expert, width, top_k, kind)


def test_a_card_names_the_model_and_refuses_other_fields(tmp_path: Path) -> None:
    default = Card("a", "b", "c", "d", "e")
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"name": "new", "base_name": "old"}))
    assert Card.read(path, default) == Card("new", "b", "c", "old", "e")
    path.write_text(json.dumps({"title": "new"}))
    with pytest.raises(OptionError, match=r"card\.json"):
        Card.read(path, default)
    Card.read(ROOT / "tools" / "smollm2_moe.json", default)


def test_the_command_joins_dense_file_and_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors", reason="expert files are safetensors")
    dense, experts = write_dense(tmp_path / "dense.gguf"), tmp_path / "e.safetensors"
    out = tmp_path / "moe.gguf"
    upcycle_file.save_experts(random_experts(), experts)
    assert upcycle.main([str(dense), "--out", str(out), "--from-experts", str(experts)]) == 0
    wanted = assembled(tmp_path)[1].data
    assert np.array_equal(gguf.GGUFReader(out).data, wanted)
    assert upcycle.main([str(dense), "--out", str(out), "--from-experts", str(dense)]) == 2
    assert "dense.gguf: not readable as safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--minutes", "nan"], ["--experts", "x"]])
def test_numbers_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        upcycle.options(["dense.gguf", "--out", "moe.gguf", "--text", "t", *arguments])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--from-experts", "e", "--text", "t"],
        ["--text", "t", "--self-samples", "3"],
        ["--text", "t", "--resume"],
        ["--text", "t", "--save-experts", "no/such/folder/e"],
        ["--text", "t", "--out", "dense.gguf"],
    ],
)
def test_contradictory_options_are_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert upcycle.main(["dense.gguf", "--out", "moe.gguf", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("upcycle.py: ") and error.count("\n") == 1

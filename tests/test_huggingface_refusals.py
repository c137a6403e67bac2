"""Folders that are refused: settings that edgert does not honour, and hostile or damaged files, each in one line."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import config_json, decoded, huggingface_tensors, write_folder, write_json, write_safetensors
from models import golden_path
from test_safetensors import entry, stored

from edgert.architectures import read_config
from edgert.errors import EdgertError, ModelFileError, TokenizerError, UnsupportedError
from edgert.huggingface import HuggingFaceFolder
from edgert.storage import json_file
from edgert.storage.json_file import parse_json
from edgert.weights import Weights


def make(folder: Path, name: str = "olmoe", **options: Any) -> Path:
    """A sound folder, unless the options change it."""
    return write_folder(folder / name, *decoded(golden_path(f"{name}-f32")), **options)


def open_and_check(folder: Path) -> None:
    """What loading does before it reads weights."""
    with HuggingFaceFolder.open(folder) as file:
        as_gguf: Any = file
        Weights(as_gguf, read_config(file.metadata, str(file.path)))


def refused(folder: Path, message: str, kind: type[EdgertError]) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_and_check(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


# --- settings: (model, changes of config.json, message)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]; supported are Llama"),
    ("olmoe", {"quantization_config": {"quant_method": "gptq"}}, r"weights are quantised \('gptq'\); take the model"),
    ("olmoe", {"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised \('fp8'\)"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the only activation"),
    ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv is 8.0; edgert does not clip"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True; edgert runs this class with false"),
    ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob is True; edgert runs this class with false"),
    ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is False; edgert runs this class with true"),
    ("qwen3moe", {"norm_topk_prob": None}, "norm_topk_prob is None; edgert runs this class with true"),
    ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; edgert runs this class with experts in every"),
    ("qwen3moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; edgert runs this class with experts in every"),
    ("qwen3moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; edgert rotates whole heads"),
    ("qwen3moe", {"use_sliding_window": True}, "sliding_window is 1024; edgert attends to all 4,096 positions"),
    ("qwen3moe", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window is 1024"),
    ("qwen3moe", {"layer_types": ["full_attention", "chunked"], "sliding_window": 0}, "layer_types is .*'chunked'"),
    ("llama", {"sliding_window": 4096}, "sliding_window is 4096; edgert attends to all 32,768 positions"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: the key type is 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; supported are default, linear"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "a": {}}}, "rope_type is 'linear'; supported"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_scaling": YARN | {"beta_fast": 64}}, "beta_fast is 64; edgert's YaRN has 32"),
    ("llama", {"rope_scaling": YARN | {"beta_slow": 2}}, "beta_slow is 2; edgert's YaRN has 1"),
    ("llama", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor is 1.0; edgert's YaRN has 1.1386"),
    ("llama", {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}, "mscale_all_dim is 1.0; edgert's YaRN does not"),
    ("llama", {"rope_scaling": YARN | {"truncate": False}}, "truncate is False; edgert's YaRN has true"),
    ("llama", {"attention_bias": True, "num_hidden_layers": 1}, "the tensor 'model.layers.1.* is not one that edgert"),
]
DAMAGED_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"architectures": None}, r"architectures is \[\], not a list with the name of one class"),
    ("olmoe", {"architectures": [["a"]]}, "architectures is .* not a list with the name"),
    ("olmoe", {"num_hidden_layers": None}, "the key num_hidden_layers is missing"),
    ("olmoe", {"num_hidden_layers": 3}, "the tensor blk.2.attn_norm.weight is missing"),
    ("olmoe", {"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776, not a whole number from 1"),
    ("olmoe", {"num_experts": 8}, "of 'model.layers.0.mlp.experts.0.*' and its like that of expert 7 is missing"),
    ("olmoe", {"num_experts": 1 << 30}, "num_experts is 1073741824, not a whole number from 1 to 65536"),
    ("olmoe", {"num_experts_per_tok": 9}, "expert_used_count is 9"),
    ("olmoe", {"num_local_experts": 8}, "num_experts is 7, not num_local_experts = 8"),
    ("olmoe", {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number from 1"),
    ("olmoe", {"num_attention_heads": 128}, "head_dim is 0, not a whole number from 1"),
    ("olmoe", {"num_attention_heads": 3}, "head_count_kv is 4, not a divisor"),
    ("olmoe", {"hidden_size": 4.5}, "hidden_size is 4.5, not a whole number"),
    ("olmoe", {"hidden_size": True}, "hidden_size is True, not a whole number"),
    ("olmoe", {"vocab_size": 301}, r"token_embd.weight has shape \(300, 64\), but the metadata ask for \(301, 64\)"),
    ("olmoe", {"vocab_size": 294}, "the key .* is 294, not below vocab_size = 294 of config.json"),
    ("olmoe", {"vocab_size": 1 << 30}, "vocab_size is 1073741824, not a whole number from 1 to 1048576"),
    ("olmoe", {"head_dim": 1 << 30}, "head_dim is 1073741824, not a whole number from 1 to 65536"),
    ("olmoe", {"rms_norm_eps": 1e300}, "layer_norm_rms_epsilon is inf, not a finite number"),
    ("olmoe", {"rms_norm_eps": 0}, "layer_norm_rms_epsilon is 0.0, not a number above zero"),
    ("olmoe", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a finite number"),
    ("olmoe", {"rope_theta": -1.0}, "rope_theta is -1.0, not a number above zero"),
    ("olmoe", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
    ("olmoe", {"intermediate_size": 25}, "ffn_gate_exps.weight has shape"),
    ("llama", {"head_dim": 24}, r"shape \(.*, 64\), which is no whole number of heads of 24"),
    ("llama", {"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5, not a number from 1"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "original_max_position_embeddings is missing"),
]


@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS)
def test_unsupported_settings(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(make(tmp_path, name, **changes), message, UnsupportedError)


@pytest.mark.parametrize(("name", "changes", "message"), DAMAGED_SETTINGS)
def test_settings_that_make_no_sense(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(make(tmp_path, name, **changes), message, ModelFileError)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 32768},
        {"sliding_window": 4096, "max_position_embeddings": 4096},
        {"layer_types": ["full_attention"] * 2, "sliding_window": 4096},
        {"rope_scaling": YARN | {"attention_factor": 1.1386294361119891, "beta_fast": 32.0}},
        {"rope_scaling": {"rope_type": "default"}},
        {"quantization_config": None, "some_training_key": {"a": 1}},
    ],
)
def test_settings_that_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    open_and_check(make(tmp_path, "llama", **changes))


# --- tensors

Tensors = dict[str, Any]


def rewritten(folder: Path, change: Callable[[Tensors], Any], name: str = "olmoe", **options: Any) -> Path:
    """A folder whose tensors are changed before they are written."""
    metadata, weights = decoded(golden_path(f"{name}-f32"))
    folder = write_folder(folder / name, metadata, weights)
    tensors = huggingface_tensors(metadata, weights, config_json(metadata, weights), options.get("stacked", False))
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors, "F32")
    return folder


LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing, and config.json does not say", ModelFileError),
        (lambda t: t.pop(LAYER + "mlp.gate.weight"), "blk.0.ffn_gate_inp.weight is missing", ModelFileError),
        (lambda t: t.pop(LAYER + "mlp.experts.3.up_proj.weight"), "that of expert 3 is missing", ModelFileError),
        (lambda t: t.update({"extra.weight": np.ones(3, "f4")}), r"'extra.weight' \(3,\) is not one", UnsupportedError),
        (lambda t: t.update({LAYER + "mlp.gate.bias": np.ones(7, "f4")}), "may change the answers", UnsupportedError),
        (
            lambda t: t.update({LAYER + "mlp.experts.7.up_proj.weight": np.ones((24, 64), "f4")}),
            "is not one that edgert uses",
            UnsupportedError,
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(64, "f4")}),
            "is not one that edgert uses",
            UnsupportedError,
        ),
        (
            lambda t: t.update({LAYER + "mlp.experts.down_proj": np.ones((7, 64, 24), "f4")}),
            "down_proj' are the same|down_proj.weight' are the same",
            ModelFileError,
        ),
        (
            lambda t: t.update({LAYER + "mlp.experts.1.up_proj.weight": np.ones((64, 24), "f4")}),
            r"is \(7, 24, 64\) of F32, but .* is \(7, 64, 24\) of F32|is \(7, 64, 24\) of F32, but",
            ModelFileError,
        ),
        (
            lambda t: t.update({LAYER + "mlp.experts.1.up_proj.weight": np.ones(64, "f4")}),
            r"has the shape \(64,\), but an expert's should have two dimensions",
            ModelFileError,
        ),
        (
            lambda t: t.update({LAYER + "self_attn.q_proj.weight": np.ones((32, 128), "f4")}),
            r"attn_q.weight has shape \(32, 128\), but the metadata ask for \(64, 64\)",
            ModelFileError,
        ),
        (
            lambda t: t.update({LAYER + "input_layernorm.weight": np.ones((1, 1, 1, 64), "f4")}),
            "should have one to three dimensions",
            ModelFileError,
        ),
        (
            lambda t: t.update({LAYER + "input_layernorm.weight": np.ones((0,), "f4")}),
            "should have one to three dimensions, none of them 0",
            ModelFileError,
        ),
    ],
)
def test_tensors(change: Callable[[Tensors], Any], message: str, kind: type[EdgertError], tmp_path: Path) -> None:
    refused(rewritten(tmp_path, change), message, kind)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 64, 48), r"ffn_gate_exps.weight has shape \(7, 32, 48\), but"),  # turned round, as some models have it
        ((6, 48, 64), "but the model has 7 experts"),
        ((7, 47, 64), "but it should hold two halves"),
        ((336,), "but it should hold two halves"),
    ],
)
def test_stacked_experts(shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    name = LAYER + "mlp.experts.gate_up_proj"
    folder = rewritten(tmp_path, lambda t: t.update({name: np.ones(shape, "f4")}), stacked=True)
    refused(folder, message, ModelFileError)


def test_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    name = LAYER + "self_attn.rotary_emb.inv_freq"
    open_and_check(rewritten(tmp_path, lambda t: t.update({name: np.ones(8, "f4")})))


# --- the folder

INDEX = "model.safetensors.index.json"


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"none: no such folder; check the path"):
        HuggingFaceFolder.open(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"config.json: no such file"):
        HuggingFaceFolder.open(tmp_path)
    folder = make(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"neither model.safetensors nor model.safetensors.index.json is there", ModelFileError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"lm_head.weight": "../model.safetensors"}),
            "is not the name of a safetensors file beside",
        ),
        (lambda w: w.update({"lm_head.weight": "/etc/passwd"}), "'/etc/passwd' is not the name"),
        (lambda w: w.update({"lm_head.weight": "a\0.safetensors"}), "is not the name"),
        (lambda w: w.update({"lm_head.weight": 5}), "5 is not the name"),
        (lambda w: w.update({"lm_head.weight": "model-9.safetensors"}), "model-9.safetensors: no such file"),
        (lambda w: w.update({"other.weight": w["lm_head.weight"]}), "'other.weight' should be in 'model-0"),
        (lambda w: w.clear(), "it names 0 files"),
        (lambda w: w.update({str(i): f"{i}.safetensors" for i in range(5000)}), "it names 5,003 files, 1 to 4,096"),
    ],
)
def test_indices(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path, shards=3)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    write_json(folder / INDEX, index)
    refused(folder, message, ModelFileError)


def test_a_tensor_in_the_wrong_shard_or_in_two(tmp_path: Path) -> None:
    folder = make(tmp_path, shards=2)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    aside = first.rename(folder / "aside")
    second.rename(first)
    aside.rename(second)
    refused(folder, "should be in 'model-00001-of-00002.safetensors', but is not", ModelFileError)
    second.write_bytes(first.read_bytes())
    refused(folder, "is in an earlier file too", ModelFileError)


def test_a_refused_folder_leaves_no_file_open(tmp_path: Path) -> None:
    folder = make(tmp_path, shards=3, clip_qkv=None)
    (folder / "tokenizer.json").unlink()
    before = len(os.listdir("/proc/self/fd"))
    refused(folder, "tokenizer.json: no such file", ModelFileError)
    assert len(os.listdir("/proc/self/fd")) == before


def test_generation_settings_that_make_no_sense(tmp_path: Path) -> None:
    folder = make(tmp_path)
    write_json(folder / "generation_config.json", {"temperature": "hot"})
    refused(folder, r"generation_config.json: the key temperature is 'hot', not a finite number", ModelFileError)


@pytest.mark.parametrize("kind", ["F8_E4M3", "I64", "F64"])
def test_other_kinds_of_numbers(kind: str, tmp_path: Path) -> None:
    size = {"F8_E4M3": 1}.get(kind, 8)
    folder = make(tmp_path)
    stored(folder / "model.safetensors", {"lm_head.weight": entry(kind, [2], [0, 2 * size])}, bytes(2 * size))
    refused(folder, f"'lm_head.weight' holds {kind} numbers; take the model in BF16, F16 or F32", UnsupportedError)
    stored(folder / "model.safetensors", {"lm_head.weight": entry("F4", [2], [0, 1])}, bytes(1))
    refused(folder, "'lm_head.weight' holds 'F4' numbers, which edgert cannot read", UnsupportedError)


def test_a_shard_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with HuggingFaceFolder.open(folder) as file:
        os.truncate(folder / "model.safetensors", 20_000)
        with pytest.raises(ModelFileError, match=r"model.safetensors: the file has 20,000 bytes now"):
            for name in file.tensors:
                file.read(name)


def test_json_files_have_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make(tmp_path)
    monkeypatch.setattr(json_file, "MAX_VALUES", 20)
    refused(folder, r"config.json: it may hold \d+ values, at most 20 are read", ModelFileError)
    monkeypatch.undo()
    with open(folder / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(folder, r"tokenizer.json: it has 1,099,511,627,776 bytes, at most 134,217,728 are read", ModelFileError)


def test_the_dearest_json_takes_little_memory() -> None:
    """Empty lists in a list take the most for what is written."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = b'{"a":[' + b"[]," * (json_file.MAX_VALUES // 2 - 9) + b"0]}"
    assert len(parse_json(text, "it").array("a")) > 2_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def test_mutants(tmp_path: Path) -> None:
    """A folder with one file damaged anywhere opens or is refused; nothing else happens."""
    folder = make(tmp_path, "llama", shards=2)
    draw = random.Random(11)
    outcomes = {"opened": 0, "refused": 0}
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        limit = len(sound) if path.suffix == ".json" else 8 + int.from_bytes(sound[:8], "little")
        for _ in range(60):
            raw = bytearray(sound)
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(limit)
                raw[at] = draw.choice((draw.randrange(256), ord("0"), ord("9"), ord('"'), ord("]")))
            path.write_bytes(raw[: draw.choice((len(raw), len(raw), draw.randrange(len(raw))))])
            try:
                open_and_check(folder)
                outcomes["opened"] += 1
            except (ModelFileError, UnsupportedError, TokenizerError):
                outcomes["refused"] += 1
        path.write_bytes(sound)
    assert outcomes["refused"] > 200 and outcomes["opened"] > 5

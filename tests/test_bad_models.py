"""Files of models that edgert runs in part or not at all: one line says what is skipped, or why it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from changed_models import Tensors, rewritten, unchanged
from models import engine_of, golden, run
from typer.testing import CliRunner

from edgert.cli.app import app
from edgert.describing import describe
from edgert.errors import EdgertError, ModelFileError, UnsupportedError

LINE = "layer 2 predicts tokens beyond the next (MTP): it is not run, and answers are the same without"


def plus(**tensors: tuple[int, ...]) -> Callable[[Tensors], None]:
    """A change that adds tensors of zeros; two underscores in a name are a dot."""
    return lambda found: found.update({name.replace("__", "."): np.zeros(s) for name, s in tensors.items()})


def without(*starts: str) -> Callable[[Tensors], None]:
    """A change that takes away tensors whose names begin so."""

    def change(found: Tensors) -> None:
        for name in [name for name in found if name.startswith(starts)]:
            del found[name]

    return change


def renamed(**names: str) -> Callable[[Tensors], None]:
    def change(found: Tensors) -> None:
        for old, new in names.items():
            found[new.replace("__", ".")] = found.pop(old.replace("__", "."))

    return change


def with_rows(n_rows: int) -> Callable[[Tensors], None]:
    """A change of the rows of the embedding table, and of the head."""

    def change(found: Tensors) -> None:
        for name in {"token_embd.weight", "output.weight"} & found.keys():
            found[name] = np.resize(found[name], (n_rows, found[name].shape[1]))

    return change


# ---- skipped ---------------------------------------------------------------------------------------------------------
def test_layers_that_are_not_run_are_said_once_by_each_command(tmp_path: Path) -> None:
    path = rewritten("glm4moe-f32", tmp_path / "further.gguf")
    command, bundle = CliRunner().invoke, str(tmp_path / "further.edge")
    packed = command(app, ["pack", str(path), bundle])
    assert packed.exit_code == 0 and packed.stdout.count(LINE) == 1 and f"not packed: {LINE}\n" in packed.stdout
    for model in (str(path), bundle):
        shown = command(app, ["inspect", model])
        assert shown.exit_code == 0 and shown.stdout.count(LINE) == 1
        said = command(app, ["generate", model, "-p", "a", "--max-tokens", "1", "--context", "64", "--json"])
        assert said.exit_code == 0 and said.stderr.count(LINE) == 1, said.stderr
    assert json.loads(command(app, ["pack", str(path), bundle, "--json"]).stdout)["skipped"] == LINE


def test_of_several_layers_and_of_none() -> None:
    from dataclasses import replace

    from edgert.architectures import read_config
    from edgert.storage.gguf_file import GgufFile
    from edgert.tensor_views import skipped

    with GgufFile.open(golden("glm4moe-f32")[0]) as file:
        config = read_config(file.metadata, "m")
    assert skipped(replace(config, n_unused_layers=2)).startswith("layers 2 to 3 predict tokens beyond the next (MTP)")
    assert skipped(replace(config, n_unused_layers=0)) == ""


@pytest.mark.parametrize("name", ["deepseek2-lite-f32", "bailingmoe2-f32", "qwen3next-f32", "qwen35moe-f32"])
@pytest.mark.parametrize("is_there", [True, False])
def test_families_that_may_have_such_layers(name: str, is_there: bool, tmp_path: Path) -> None:
    """With their tensors, or left out as some converters do: the answers are those of the model without."""
    path, expected = golden(name)
    n_layers = int(gguf.GGUFReader(path).fields[f"{name.split('-')[0]}.block_count"].contents())
    further = {f"blk__{n_layers}__nextn__eh_proj__weight": (64, 128), f"blk__{n_layers}__attn_norm__weight": (64,)}
    change = plus(**further) if is_there else unchanged
    more = rewritten(name, tmp_path / "more.gguf", change, block_count=n_layers + 1, nextn_predict_layers=1)
    tokens = expected["tokens"].tolist()
    assert (run(*engine_of(more), tokens) == run(*engine_of(path), tokens)).all()
    assert describe(more)["layers"] == n_layers and "skipped" not in describe(path)


def test_a_size_of_the_vocabulary_that_is_not_that_of_the_tokenizer(tmp_path: Path) -> None:
    """As in llama.cpp: tokens count, and the key says nothing."""
    path, expected = golden("qwen3moe-f32")
    tokens, plain = expected["tokens"].tolist(), run(*engine_of(path), expected["tokens"].tolist())
    for n_vocab in (None, 280, 320):
        other = rewritten("qwen3moe-f32", tmp_path / "other.gguf", vocab_size=n_vocab)
        assert (run(*engine_of(other), tokens) == plain).all()
        assert describe(other)["vocabulary"]["size"] == 300


def test_delta_nets_that_are_listed(tmp_path: Path) -> None:
    """Newer files say of each layer whether it is one, also of those that are not run."""
    tokens = golden("qwen3next-f32")[1]["tokens"].tolist()
    same = {"attention__recurrent_layers": [True, True, True, False, False]}
    path = rewritten(
        "qwen3next-f32", tmp_path / "a.gguf", block_count=5, nextn_predict_layers=1, full_attention_interval=3, **same
    )
    assert (run(*engine_of(path), tokens) == run(*engine_of(golden("qwen3next-f32")[0]), tokens)).all()
    path = rewritten("qwen3next-f32", tmp_path / "b.gguf", attention__recurrent_layers=[True])
    refused(path, ModelFileError, "attention.recurrent_layers is array", "true or false for each of 4 layers")


# ---- refused ---------------------------------------------------------------------------------------------------------
def refused(path: Path, kind: type[EdgertError], *words: str) -> None:
    """Inspecting, and so loading and packing, is refused in one line with these words."""
    with pytest.raises(kind) as caught:
        describe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}") and "\n" not in message
    assert all(word in message for word in words), message


UNSUPPORTED: list[tuple[str, Callable[[Tensors], None], dict[str, Any], tuple[str, ...]]] = [
    ("bailingmoe2-f32", unchanged, {"expert_gating_func": 4}, ("expert_gating_func is 4; supported are 1 (softmax)",)),
    ("dots1-f32", unchanged, {"expert_gating_func": 9}, ("expert_gating_func is 9", "2 (sigmoid)")),
    ("qwen3moe-f32", unchanged, {"rope__scaling__type": "dynamic"}, ("rope.scaling.type is 'dynamic'", "yarn")),
    ("qwen3moe-f32", unchanged, {"rope__dimension_sections": [4, 6, 6, 0]}, ("the key qwen3moe.rope.dimension_sec",)),
    ("dots1-f32", unchanged, {"nextn_predict_layers": 1}, ("nextn_predict_layers = 1 is not supported",)),
    (
        "llama-f32",
        renamed(blk__0__ffn_gate_exps__weight="blk__0__ffn_gate__0__weight"),
        {},
        ("it holds one tensor per expert (blk.0.ffn_gate.0.weight)",),
    ),
    (
        "llama-f32",
        plus(blk__1__ffn_gate_chexps__weight=(4, 8, 64)),
        {},
        ("the tensor blk.1.ffn_gate_chexps.weight (4, 8, 64) is not one that edgert uses for 'llama'",),
    ),
    (
        "llama4-f32",
        plus(v__patch_embd__weight=(8, 64), mm__model__fc__weight=(8, 8)),
        {},
        ("it holds a part that sees or hears (v.patch_embd.weight and 1 more tensors)", "take the text model alone"),
    ),
    ("llama4-f32", unchanged, {"vision__block_count": 3}, ("the key llama4.vision.block_count = 3",)),
]


@pytest.mark.parametrize(("name", "change", "keys", "words"), UNSUPPORTED)
def test_variants_that_edgert_does_not_run(
    name: str, change: Callable[[Tensors], None], keys: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(rewritten(name, tmp_path / "variant.gguf", change, **keys), UnsupportedError, *words)


def test_only_the_layers_that_predict_further(tmp_path: Path) -> None:
    path = rewritten("glm4moe-f32", tmp_path / "mtp.gguf", without("blk.0.", "blk.1."))
    refused(path, UnsupportedError, "only layers that predict tokens beyond the next (MTP)", "blk.0.attn_norm.weight")


def test_a_tower_of_its_own(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "mmproj.gguf", UnsupportedError, "is 'clip': this is the part of a model that sees or hears")


CONTRADICTIONS: list[tuple[str, Callable[[Tensors], None], dict[str, Any], tuple[str, ...]]] = [
    (
        "qwen3moe-f32",
        unchanged,
        {"expert_count": 4},
        ("blk.0.ffn_gate_inp.weight has shape (8, 64)", "ask for (4, 64)", "expert_count = 4"),
    ),
    (
        "qwen3moe-f32",
        unchanged,
        {"attention__head_count_kv": 1},
        ("blk.0.attn_k.weight has shape", "attention.head_count_kv = 1, attention.key_length = 32"),
    ),
    (
        "qwen3moe-f32",
        unchanged,
        {"expert_feed_forward_length": 16},
        ("blk.0.ffn_gate_exps.weight has shape", "expert_feed_forward_length = 16"),
    ),
    (
        "qwen3moe-f32",
        with_rows(200),
        {"vocab_size": 200},
        ("token_embd.weight has shape (200, 64)", "vocab_size = 200", "tokenizer.ggml.tokens has 300"),
    ),
    (
        "qwen3moe-f32",
        with_rows(320),
        {"vocab_size": 320},
        ("token_embd.weight has shape (320, 64)", "vocab_size = 320", "tokenizer.ggml.tokens has 300"),
    ),
    (
        "qwen3moe-f32",
        with_rows(320),
        {"vocab_size": None},
        ("token_embd.weight has shape (320, 64)", "tokenizer.ggml.tokens has 300"),
    ),
    ("qwen3moe-f32", unchanged, {"embedding_length": 96}, ("token_embd.weight has shape", "embedding_length = 96")),
    (
        "qwen3moe-f32",
        unchanged,
        {"block_count": 5},
        ("blk.2.attn_norm.weight is missing, as are all of layer 2", "qwen3moe.block_count is 5"),
    ),
    (
        "deepseek2-v3-f32",
        unchanged,
        {"leading_dense_block_count": 2},
        ("blk.1.ffn_gate.weight is missing, but there is blk.1.ffn_gate_exps.weight", "leading_dense_block_count = 2"),
    ),
    (
        "deepseek2-v3-f32",
        unchanged,
        {"leading_dense_block_count": 0},
        ("blk.0.ffn_gate_inp.weight is missing, but there is blk.0.ffn_gate.weight", "leading_dense_block_count = 0"),
    ),
    (
        "llama4-f32",
        unchanged,
        {"interleave_moe_layer_step": 1},
        ("blk.0.ffn_gate_inp.weight is missing, but there is blk.0.ffn_gate.weight", "interleave_moe_layer_step = 1"),
    ),
    (
        "qwen3moe-f32",
        unchanged,
        {"block_count": 1},
        ("blk.1.attn_norm.weight (64,) is of layer 1, counted from 0, but qwen3moe.block_count is 1",),
    ),
    (
        "deepseek2-v3-f32",
        unchanged,
        {"attention__q_lora_rank": None},
        ("attn_q.weight is missing, but there is blk.0.attn_q_a.weight (24, 64)", "attention.q_lora_rank is missing)"),
    ),
    (
        "deepseek2-lite-f32",
        unchanged,
        {"attention__q_lora_rank": 16},
        ("attn_q_a.weight is missing, but there is blk.0.attn_q.weight (96, 64)", "attention.q_lora_rank = 16)"),
    ),
    (
        "deepseek2-lite-f32",
        unchanged,
        {"attention__value_length": 32},
        ("attn_k_b.weight is missing, but there is blk.0.attn_kv_b.weight (128, 32)", "attention.value_length = 32)"),
    ),
    (
        "qwen35moe-gateup-f32",
        unchanged,
        {"expert_feed_forward_length": 8},
        ("but there is blk.0.ffn_gate_up_exps.weight (5, 32, 64)", "expert_feed_forward_length = 8"),
    ),
    (
        "qwen35moe-f32",
        unchanged,
        {"full_attention_interval": 2},
        ("blk.1.attn_output.weight is missing, but there is blk.1.ssm_conv1d.weight", "full_attention_interval = 2)"),
    ),
    (
        "qwen3next-f32",
        unchanged,
        {"full_attention_interval": 8},
        ("blk.3.attn_qkv.weight is missing, but there is blk.3.attn_output.weight", "full_attention_interval = 8)"),
    ),
    (
        "lfm2moe-f32",
        unchanged,
        {"attention__head_count_kv": 2},
        ("blk.0.attn_q.weight is missing, but there is blk.0.shortconv.conv.weight", "attention.head_count_kv = 2)"),
    ),
    (
        "lfm2moe-f32",
        unchanged,
        {"attention__head_count_kv": [0, 0, 0, 2]},
        (
            "blk.2.shortconv.in_proj.weight is missing, but there is blk.2.attn_o",
            "attention.head_count_kv = [0, 0, 0, 2])",
        ),
    ),
    (
        "deepseek2-v3-f32",
        unchanged,
        {"expert_shared_count": 0},
        ("blk.1.ffn_gate_shexp.weight (16, 64) is of a shared expert", "expert_shared_count = 0)"),
    ),
    (
        "granitemoe-f32",
        unchanged,
        {"expert_shared_feed_forward_length": 16},
        ("blk.0.ffn_gate_shexp.weight is missing", "expert_shared_feed_forward_length = 16)"),
    ),
    (
        "qwen3next-f32",
        unchanged,
        {"expert_shared_feed_forward_length": None},
        (
            "blk.0.ffn_gate_shexp.weight has shape (16, 64), but the metadata ask for (64, 64)",
            "feed_forward_length = 64",
        ),
    ),
    (
        "llama-f32",
        unchanged,
        {"expert_count": None, "expert_used_count": None},
        ("blk.0.ffn_gate.weight is missing, but there is blk.0.ffn_gate_exps.weight", "llama.expert_count is missing)"),
    ),
    (
        "deepseek2-lite-f32",
        unchanged,
        {"attention__kv_lora_rank": 16},
        ("blk.0.attn_kv_a_mqa.weight has shape", "attention.kv_lora_rank = 16, rope.dimension_count = 8"),
    ),
    (
        "glm4moe-f32",
        unchanged,
        {"nextn_predict_layers": 2, "leading_dense_block_count": 0},
        ("the tensors of layer 1, such as blk.1.", "glm4moe.nextn_predict_layers is 2"),
    ),
    (
        "glm4moe-f32",
        unchanged,
        {"nextn_predict_layers": 0},
        ("blk.2.nextn.eh_proj.weight", "glm4moe.nextn_predict_layers is 0"),
    ),
    (
        "bailingmoe2-f32",
        unchanged,
        {"nextn_predict_layers": 1},
        ("bailingmoe2.nextn_predict_layers is 1, but the tensors of layer 2, such as blk.2.attn_k_norm.weight",),
    ),
    (
        "lfm2moe-f32",
        unchanged,
        {"shortconv__l_cache": 4},
        ("blk.0.shortconv.conv.weight has shape", "shortconv.l_cache = 4"),
    ),
    (
        "gpt-oss-f32",
        unchanged,
        {"attention__head_count": 8},
        ("has shape", "attention.head_count = 8"),
    ),
]


@pytest.mark.parametrize(("name", "change", "keys", "words"), CONTRADICTIONS)
def test_metadata_and_tensors_that_contradict_each_other_are_both_named(
    name: str, change: Callable[[Tensors], None], keys: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(rewritten(name, tmp_path / "torn.gguf", change, **keys), ModelFileError, *words)

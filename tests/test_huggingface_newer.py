"""Folders of gpt-oss and DeepSeek: the tensors and metadata of the GGUF that they were made of, and its answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_newer_models import (
    as_bf16,
    deepseek_config,
    deepseek_tensors,
    joined,
    oss_config,
    oss_tensors,
    read_all,
    write,
)
from models import golden_path
from test_huggingface import logits_of

from edgert.architectures import read_config
from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.huggingface import HuggingFaceFolder
from edgert.pack import pack
from edgert.quant import ggml
from edgert.storage.bundle import Bundle
from edgert.storage.gguf_file import GgufFile
from edgert.tensor_views import skipped

OSS = ("gpt-oss-f32", "gpt-oss-mxfp4")
DEEPSEEK = ("deepseek2-lite-f32", "deepseek2-lite-mla-f32", "deepseek2-v3-f32")
Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def make(folder: Path, name: str, change: Change | None = None, *, bf16: bool = False) -> Path:
    """The folder of a golden model, unless something of its configuration or tensors is changed."""
    metadata, tensors = read_all(golden_path(name))
    config = oss_config(metadata) if name in OSS else deepseek_config(metadata, tensors)
    made = oss_tensors(metadata, tensors) if name in OSS else deepseek_tensors(metadata, tensors)
    if change is not None:
        change(config, made)
    return write(folder / name, config, as_bf16(made) if bf16 else made, metadata)


@pytest.mark.parametrize("name", OSS + DEEPSEEK)
def test_tensors_are_those_of_the_gguf(name: str, tmp_path: Path) -> None:
    """By name, shape, type and bytes, and any rows of them."""
    with GgufFile.open(golden_path(name)) as expected, HuggingFaceFolder.open(make(tmp_path, name)) as file:
        names = {n.replace("attn_k_b", "attn_kv_b") for n in expected.tensors if "attn_v_b" not in n}
        assert file.tensors.keys() == names
        for tensor in names & expected.tensors.keys():
            info, mine = expected.tensors[tensor], file.tensors[tensor]
            for field in ("name", "shape", "type", "n_bytes", "n_rows", "row_bytes"):
                assert getattr(mine, field) == getattr(info, field), tensor
            assert (file.read(tensor) == expected.read(tensor)).all(), tensor
            for first, n in ((0, 1), (info.n_rows // 3, info.n_rows // 2), (info.n_rows - 1, 1), (1, 0)):
                if first + n <= info.n_rows:
                    rows = expected.read_rows(tensor, first, n)
                    assert np.array_equal(file.read_rows(tensor, first, n), rows), (tensor, first, n)


@pytest.mark.parametrize("name", DEEPSEEK[1:])
def test_keys_and_values_of_all_heads_are_one_matrix(name: str, tmp_path: Path) -> None:
    _, tensors = read_all(golden_path(name))
    with HuggingFaceFolder.open(make(tmp_path, name)) as file:
        for layer in range(3):
            mine = {key.removeprefix(f"blk.{layer}."): w for key, w in tensors.items()}
            both = file.read(f"blk.{layer}.attn_kv_b.weight").view(np.float32)
            assert np.array_equal(both, joined(mine).reshape(-1))


@pytest.mark.parametrize("name", OSS + DEEPSEEK)
def test_metadata_are_those_of_the_gguf(name: str, tmp_path: Path) -> None:
    metadata, _ = read_all(golden_path(name))
    with HuggingFaceFolder.open(make(tmp_path, name)) as file:
        found = dict(file.metadata)
    if "deepseek2.attention.key_length_mla" in metadata:  # the same model in the other form
        heads, sizes = "deepseek2.attention.head_count", {"key": "key_length", "value": "value_length"}
        metadata |= {f"{heads}_kv": metadata[heads]}
        metadata |= {f"deepseek2.attention.{n}": metadata.pop(f"deepseek2.attention.{n}_mla") for n in sizes.values()}
    n_further = found.pop("deepseek2.nextn_predict_layers", 0)  # layers that the folder has and the GGUF has not
    assert n_further == (name == "deepseek2-v3-f32")
    if n_further:
        metadata["deepseek2.block_count"] += n_further
        assert skipped(read_config(found | {"deepseek2.nextn_predict_layers": 1}, "m")).startswith("layer 3 predicts")
    for key in set(metadata) - {"general.name", "general.file_type", "tokenizer.ggml.padding_token_id"}:
        assert np.array_equal(found.pop(key), metadata[key]), key
    assert found.keys() == {"general.name", "tokenizer.ggml.add_eos_token"}


def runnable(name: str) -> Path:
    """The golden GGUF, if edgert runs its architecture yet."""
    path = golden_path(name)
    with GgufFile.open(path) as file:
        try:
            read_config(file.metadata, "")
        except UnsupportedError as problem:
            pytest.skip(str(problem))
    return path


TOKENS = [5, 70, 260, 31, 7, 81, 2, 19, 4, 250, 33, 9, 12, 18, 44, 3]


@pytest.mark.parametrize("name", OSS + DEEPSEEK)
def test_logits_equal_the_gguf(name: str, tmp_path: Path) -> None:
    path, folder = runnable(name), make(tmp_path, name)
    logits = logits_of(HuggingFaceFolder.open(folder), TOKENS)
    assert (logits == logits_of(GgufFile.open(path), TOKENS)).all()


@pytest.mark.parametrize("name", [OSS[1], DEEPSEEK[2]])
def test_a_bundle_packed_from_a_folder(name: str, tmp_path: Path) -> None:
    path, folder = runnable(name), make(tmp_path, name)
    bundle = pack(folder, tmp_path / "packed.edge", progress=lambda *_: None)
    logits = logits_of(Bundle.open(bundle), TOKENS, "int8")
    assert (logits == logits_of(GgufFile.open(path), TOKENS, "int8")).all()


@pytest.mark.parametrize("name", OSS)
def test_bf16_beside_mxfp4(name: str, tmp_path: Path) -> None:
    """As the checkpoints are: all but the experts' matrices in BF16, of which biases are in turns too."""
    with GgufFile.open(golden_path(name)) as expected, HuggingFaceFolder.open(make(tmp_path, name, bf16=True)) as file:
        for tensor, info in expected.tensors.items():
            mine = file.tensors[tensor]
            floats = ggml.to_float(file.read(tensor), mine.type, mine.shape)
            np.testing.assert_allclose(floats, ggml.to_float(expected.read(tensor), info.type, info.shape), rtol=0.01)
            assert mine.type.name == ("MXFP4" if info.type.name == "MXFP4" else "BF16")


# --- refusals: what is changed, and the message


def settings(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def rope(**changes: Any) -> Change:
    return lambda config, tensors: config["rope_scaling"].update(changes)


def tensor(name: str, new: Callable[[Any], Any] | None) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        old = tensors.pop(name)
        if new is not None:
            tensors[name] = new(old)

    return change


BLOCKS, SCALES = (f"model.layers.0.mlp.experts.gate_up_proj_{kind}" for kind in ("blocks", "scales"))
REFUSED: list[tuple[str, Change, type[EdgertError], str]] = [
    (OSS[0], settings(layer_types=["full_attention"] * 2), UnsupportedError, "layer_types is .* in turns"),
    (OSS[0], settings(swiglu_limit=5.0), UnsupportedError, "swiglu_limit is 5.0; edgert has 7.0"),
    (OSS[0], settings(quantization_config={"quant_method": "fp8"}), UnsupportedError, r"quantised \('fp8'\)"),
    (OSS[0], rope(beta_fast=16), UnsupportedError, "beta_fast is 16; edgert's YaRN has 32"),
    (DEEPSEEK[0], settings(quantization_config={"quant_method": "mxfp4"}), UnsupportedError, r"quantised \('mxfp4'\)"),
    (DEEPSEEK[0], settings(moe_layer_freq=2), UnsupportedError, "moe_layer_freq is 2; edgert runs"),
    (DEEPSEEK[0], settings(attention_bias=True), UnsupportedError, "attention_bias is True; edgert has latent"),
    (DEEPSEEK[0], settings(scoring_func="sigmoid"), UnsupportedError, "scoring_func is 'sigmoid'; .* softmax"),
    (DEEPSEEK[0], settings(norm_topk_prob=True), UnsupportedError, "norm_topk_prob is True; .* false"),
    (
        DEEPSEEK[0],
        settings(topk_method="group_limited_greedy", n_group=8),
        UnsupportedError,
        "topk_method is 'group_limited_greedy'; .* V2-Lite or V3",
    ),
    (DEEPSEEK[0], rope(mscale=1.0), UnsupportedError, "mscale_all_dim is 0.707; edgert runs this class with that"),
    (DEEPSEEK[0], rope(mscale_all_dim=None), UnsupportedError, "mscale_all_dim is None"),
    (DEEPSEEK[0], rope(truncate=False), UnsupportedError, "truncate is False; edgert's YaRN has true"),
    (DEEPSEEK[2], settings(rope_interleave=False), UnsupportedError, "rope_interleave is False; .* with true"),
    (DEEPSEEK[2], settings(topk_method="greedy"), UnsupportedError, "topk_method is 'greedy'; .* noaux_tc"),
    (DEEPSEEK[2], settings(scoring_func="softmax"), UnsupportedError, "scoring_func is 'softmax'; .* sigmoid"),
    (
        DEEPSEEK[2],
        settings(num_nextn_predict_layers=0),
        UnsupportedError,
        r"'model.layers.3.eh_proj.weight' \(64, 128\) is not one that edgert uses",
    ),
    (
        DEEPSEEK[0],
        tensor("model.layers.1.mlp.experts.4.up_proj.weight", None),
        ModelFileError,
        "that of expert 4 is missing",
    ),
    (OSS[1], tensor(SCALES, None), ModelFileError, "gate_up_proj_blocks' is there without its scales"),
    (OSS[1], tensor(BLOCKS, None), ModelFileError, "gate_up_proj_scales' is there without its blocks"),
    (OSS[1], tensor(SCALES, lambda t: t[:, :-2]), ModelFileError, r"has the shape \(5, 126, 2\), but .*_blocks' has"),
    (OSS[1], tensor(BLOCKS, lambda t: t[..., :8]), ModelFileError, r"has the shape \(5, 128, 2, 8\), but 5 experts"),
    (OSS[1], tensor(BLOCKS, lambda t: t[:, 1:]), ModelFileError, r"has the shape \(5, 127, 2, 16\), but 5 experts"),
    (OSS[1], tensor(BLOCKS, lambda t: t[1:]), ModelFileError, r"has the shape \(4, 128, 2, 16\), but 5 experts"),
    (OSS[1], tensor(BLOCKS, lambda t: t[0]), ModelFileError, r"has the shape \(128, 2, 16\), but 5 experts"),
    (
        OSS[1],
        tensor(SCALES, lambda t: t.astype(np.float32)),
        UnsupportedError,
        "_scales' holds F32 numbers, edgert takes U8 there",
    ),
    (
        OSS[1],
        lambda config, tensors: tensors.update({BLOCKS.removesuffix("_blocks"): np.zeros((5, 64, 128), np.float32)}),
        ModelFileError,
        "gate_up_proj' is there in MXFP4 too",
    ),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), REFUSED)
def test_refused(name: str, change: Change, kind: type[EdgertError], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, change)
    with pytest.raises(kind, match=message) as caught:
        HuggingFaceFolder.open(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

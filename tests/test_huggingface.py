"""Hugging Face folders answer as the GGUF of the same weights does, bit for bit: layouts, shards, kinds of numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import config_json, decoded, huggingface_tensors, rounded, write_folder, write_gguf, write_json
from models import golden, golden_path, run
from toy_dense import write_dense

from edgert.architectures import read_config
from edgert.devices.cpu import CpuDevice
from edgert.engine import Engine, Session
from edgert.experts.residency import AllResident
from edgert.huggingface import HuggingFaceFolder, is_huggingface_folder
from edgert.pack import open_source, pack
from edgert.storage.bundle import Bundle
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights

MODELS = ("llama", "olmoe", "qwen2moe", "qwen3moe", "granitemoe", "granitemoe-shared")


def logits_of(file: Any, tokens: list[int], activations: str = "f32") -> Any:
    """Logits (n_tokens, n_vocab) of a model file or folder."""
    with file:
        config = read_config(file.metadata, str(file.path))
        weights = Weights(file, config, decode_to_f32=activations == "f32")
        made = CpuDevice(config, 64, threads=1, activations=activations, rope_divisors=weights.rope_divisors())
        tables = weights.load_into(made, lambda stage, fraction: None)
        table = weights.embed(list(range(config.n_vocab)))
    engine = Engine(config, made, AllResident(made, tables), lambda ids: table[ids])
    logits = run(engine, Session(made.new_cache(64, "f32")), tokens)
    made.close()
    return logits


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_gguf(name: str, stacked: bool, tmp_path: Path) -> None:
    path, expected = golden(f"{name}-f32")
    folder = write_folder(tmp_path / name, *decoded(path), shards=3 if stacked else 1, stacked=stacked)
    tokens = expected["tokens"].tolist()
    logits = logits_of(HuggingFaceFolder.open(folder), tokens)
    assert (logits == logits_of(GgufFile.open(path), tokens)).all()
    assert np.abs(logits - expected["logits"]).max() <= 1e-3


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_half_floats_equal_the_gguf(name: str, kind: str, activations: str, tmp_path: Path) -> None:
    """Where a converter would write vectors and routers as F32, the folder has them in the half type."""
    metadata, weights = decoded(golden_path(f"{name}-f32"))
    path = write_gguf(tmp_path / "model.gguf", metadata, weights, kind)
    folder = write_folder(tmp_path / "folder", metadata, weights, kind=kind, shards=2)
    tokens = [5, 70, 260, 31, 7]
    expected = logits_of(GgufFile.open(path), tokens, activations)
    assert (logits_of(HuggingFaceFolder.open(folder), tokens, activations) == expected).all()


@pytest.mark.parametrize("tied", [False, True])
def test_dense_llama(tied: bool, tmp_path: Path) -> None:
    metadata, weights = decoded(write_dense(tmp_path / "toy.gguf", tied=tied))
    path = write_gguf(tmp_path / "model.gguf", metadata, weights, "F32")
    folder = write_folder(tmp_path / "folder", metadata, weights, kind="F32")
    tokens = [1, 70, 100, 31, 7]
    assert (logits_of(HuggingFaceFolder.open(folder), tokens) == logits_of(GgufFile.open(path), tokens)).all()


def test_llama3_scaling_divides_frequencies(tmp_path: Path) -> None:
    metadata, weights = decoded(write_dense(tmp_path / "toy.gguf"))
    scaling = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 512,
    }
    folder = write_folder(tmp_path / "folder", metadata, weights, rope_scaling=scaling)
    expected = []
    for i in range(8):  # as llama.cpp's converter writes rope_freqs.weight
        length = 2 * math.pi * 5000.0 ** (2 * i / 16)
        smooth = (512 / length - 1.0) / 3.0
        expected.append(1.0 if length < 128 else 8.0 if length > 512 else 1 / ((1 - smooth) / 8 + smooth))
    assert 1.0 in expected and 8.0 in expected and len(set(expected)) > 2
    with HuggingFaceFolder.open(folder) as file:
        np.testing.assert_allclose(file.read("rope_freqs.weight").view(np.float32), expected, rtol=1e-6)
    weights["rope_freqs.weight"] = np.array(expected, np.float32)
    path = write_gguf(tmp_path / "model.gguf", metadata, weights, "F32")
    tokens = list(range(40))
    np.testing.assert_allclose(
        logits_of(HuggingFaceFolder.open(folder), tokens), logits_of(GgufFile.open(path), tokens), atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_a_bundle_packed_from_a_folder(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / name, *decoded(golden_path(f"{name}-f32")), kind="BF16", shards=3)
    tokens = [5, 70, 260, 31, 7]
    expected = logits_of(HuggingFaceFolder.open(folder), tokens, "int8")
    bundle = pack(folder, tmp_path / "packed.edge", progress=lambda *_: None)
    with Bundle.open(bundle) as file, HuggingFaceFolder.open(folder) as source:
        assert file.metadata.keys() == dict(source.metadata).keys()
        for key, value in source.metadata.items():
            assert np.array_equal(file.metadata[key], value), key
    assert (logits_of(Bundle.open(bundle), tokens, "int8") == expected).all()
    with open_source(folder) as source:
        assert isinstance(source, HuggingFaceFolder)


@pytest.mark.parametrize("name", MODELS)
def test_metadata_equal_the_gguf(name: str, tmp_path: Path) -> None:
    path = golden_path(f"{name}-f32")
    metadata, weights = decoded(path)
    with HuggingFaceFolder.open(write_folder(tmp_path / name, metadata, weights)) as file:
        found = dict(file.metadata)
        assert read_config(file.metadata, "") == read_config(metadata, "")
    for key in set(metadata) - {"general.name", "general.file_type", "tokenizer.ggml.padding_token_id"}:
        assert np.array_equal(found.pop(key), metadata[key]), key
    assert found.pop("general.name") == name
    found.pop("granitemoe.expert_shared_feed_forward_length", None)  # 0 where there is none
    assert found == {"tokenizer.ggml.add_eos_token": False}


def test_tensors_are_those_of_the_gguf(tmp_path: Path) -> None:
    path = golden_path("llama-f32")
    metadata, weights = decoded(path)
    for stacked in (False, True):
        folder = write_folder(tmp_path / str(stacked), metadata, weights, shards=5, stacked=stacked)
        with GgufFile.open(path) as expected, HuggingFaceFolder.open(folder) as file:
            assert file.tensors.keys() == expected.tensors.keys()
            for name, info in expected.tensors.items():
                mine = file.tensors[name]
                for field in ("name", "shape", "type", "n_bytes", "n_rows", "row_bytes"):
                    assert getattr(mine, field) == getattr(info, field)
                assert (file.read(name) == expected.read(name)).all()
                for first, n_rows in ((0, 1), (info.n_rows // 3, info.n_rows // 2), (info.n_rows - 1, 1), (1, 0)):
                    if first + n_rows <= info.n_rows:
                        rows = expected.read_rows(name, first, n_rows)
                        assert (file.read_rows(name, first, n_rows) == rows).all()
            with pytest.raises(IndexError, match="which has 1"):
                file.read_rows("output_norm.weight", 1, 1)


def test_biases_of_turned_heads_turn_with_them(tmp_path: Path) -> None:
    metadata, weights = decoded(write_dense(tmp_path / "toy.gguf"))
    random = np.random.default_rng(3)
    for layer in range(2):
        for part, width in (("q", 64), ("k", 32), ("v", 32)):
            weights[f"blk.{layer}.attn_{part}.bias"] = random.standard_normal(width).astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", metadata, weights, "F32")
    folder = write_folder(tmp_path / "folder", metadata, weights)
    tokens = [1, 70, 100, 31, 7]
    assert (logits_of(HuggingFaceFolder.open(folder), tokens) == logits_of(GgufFile.open(path), tokens)).all()


def test_what_belongs_to_the_folder(tmp_path: Path) -> None:
    """Parts are all files that were read, so that a change of one can be noticed; the hub's cache names the model."""
    metadata, weights = decoded(golden_path("olmoe-f32"))
    snapshot = tmp_path / "models--allenai--OLMoE-1B-7B" / "snapshots" / "0123abc"
    folder = write_folder(snapshot, metadata, weights, shards=2)
    write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not read")
    assert is_huggingface_folder(folder) and not is_huggingface_folder(tmp_path)
    with HuggingFaceFolder.open(folder) as file:
        assert file.metadata["general.name"] == "OLMoE-1B-7B"
        assert file.metadata["tokenizer.chat_template"] == "{{ messages }}"
        sampling = {key: value for key, value in file.metadata.items() if key.startswith("general.sampling.")}
        expected = {"temp": np.float32(0.6), "top_k": 20, "top_p": np.float32(0.95)}
        assert sampling == {f"general.sampling.{key}": value for key, value in expected.items()}
        assert {part.name for part in file.parts} == {path.name for path in folder.iterdir()} - {"README.md"}
        assert file.n_bytes == sum(part.stat().st_size for part in file.parts)


def test_a_tied_head_that_was_saved_all_the_same(tmp_path: Path) -> None:
    metadata, weights = decoded(golden_path("olmoe-f32"))
    folder = write_folder(tmp_path, metadata, weights, tie_word_embeddings=True)
    with HuggingFaceFolder.open(folder) as file:
        assert "output.weight" not in file.tensors


def test_transformers_5_writes_rope_parameters(tmp_path: Path) -> None:
    metadata, weights = decoded(golden_path("qwen3moe-f32"))
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 1024}
    folder = write_folder(tmp_path, metadata, weights, rope_parameters=rope, rope_theta=None, num_local_experts=8)
    with HuggingFaceFolder.open(folder) as file:
        found = read_config(file.metadata, "").rope
    assert (found.base, found.scaling, found.factor, found.original_context) == (5e5, "yarn", 4.0, 1024)


def test_defaults_of_the_classes(tmp_path: Path) -> None:
    """Old checkpoints leave out what their class had as default."""
    metadata, weights = decoded(golden_path("llama-f32"))
    left_out = dict.fromkeys(("rms_norm_eps", "rope_theta", "head_dim", "tie_word_embeddings"))
    with HuggingFaceFolder.open(write_folder(tmp_path, metadata, weights, **left_out)) as file:
        assert read_config(file.metadata, "") == read_config(metadata, "")  # 1e-5 and 1e6 are Mixtral's


def test_a_folder_that_was_closed(tmp_path: Path) -> None:
    metadata, weights = decoded(golden_path("olmoe-f32"))
    file = HuggingFaceFolder.open(write_folder(tmp_path, metadata, weights))
    file.close()
    file.close()
    with pytest.raises(Exception, match="closed"):
        file.read("output_norm.weight")


def test_the_test_s_own_mapping() -> None:
    """Neighbours become halves: HF turns row i with row i + d/2, GGUF's llama row 2i with row 2i + 1."""
    metadata, weights = decoded(golden_path("llama-f32"))
    rows = huggingface_tensors(metadata, weights, config_json(metadata, weights), False)
    q, ours = rows["model.layers.0.self_attn.q_proj.weight"], weights["blk.0.attn_q.weight"]
    assert (q[:8] == ours[0:16:2]).all() and (q[8:16] == ours[1:16:2]).all() and (q[16] == ours[16]).all()
    assert (rounded(ours, "F32") == ours).all()

"""The bundle: what is read from it equals what is read from its source, and what is damaged in it is found."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from models import golden_path, run

from edgert.architectures import read_config
from edgert.devices.cpu import CpuDevice
from edgert.devices.null import NullDevice
from edgert.devices.reference import ReferenceDevice
from edgert.engine import Engine, Session
from edgert.errors import EdgertError, ModelFileError, UnsupportedError
from edgert.experts.residency import AllResident
from edgert.pack import pack, pack_model
from edgert.storage import bundle_manifest
from edgert.storage.bundle import Bundle, part_of
from edgert.storage.bundle_metadata import as_gguf
from edgert.storage.gguf_file import GgufFile
from edgert.verify import verify
from edgert.weights import Weights

MODELS = [
    "granitemoe-shared-f32",
    "llama-q4_k",
    "llama-iq4_nl",
    "olmoe-q4_0",
    "qwen2moe-f32",
    "qwen3moe-mxfp4",
    "bailingmoe2-f32",
    "deepseek2-lite-f32",
    "deepseek2-v3-f32",
    "ernie4_5-moe-f32",
    "glm4moe-f32",
    "gpt-oss-f32",
    "gpt-oss-mxfp4",
    "hunyuan-moe-f32",
    "lfm2moe-f32",
    "llama4-f32",
    "phimoe-f32",
    "qwen35moe-f32",
    "qwen35moe-gateup-f32",
    "qwen3next-f32",
]
MODEL = "qwen2moe-f32"  # biases, shared experts, untied head
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def silent(stage: str, fraction: float) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(golden_path(MODEL), tmp_path_factory.mktemp("packed") / "m.edge", progress=silent)


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "m.edge"))


def weights_of(source: Any, activations: str = "int8") -> Weights:
    return Weights(source, read_config(source.metadata, str(source.path)), decode_to_f32=activations == "f32")


def logits(source: Any, activations: str = "int8", device: Any = CpuDevice) -> Any:
    """Logits of TOKENS by a model whose weights come from a file or a bundle."""
    weights = weights_of(source, activations)
    divisors = weights.rope_divisors()
    made = device(weights.config, 64, threads=1, activations=activations, rope_divisors=divisors)
    engine = Engine(weights.config, made, AllResident(made, weights.load_into(made, silent)), weights.embed)
    return run(engine, Session(made.new_cache(64, "f16")), TOKENS)


# ---- what is in it ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_answers_as_its_source(name: str, tmp_path: Path) -> None:
    path = golden_path(name)
    with Bundle.open(pack(path, tmp_path / "m.edge", progress=silent)) as bundle, GgufFile.open(path) as file:
        for activations in ("int8", "f32"):
            assert (logits(bundle, activations) == logits(file, activations)).all()
        assert (logits(bundle, device=ReferenceDevice) == logits(file, device=ReferenceDevice)).all()
        assert list(bundle.metadata) == list(file.metadata)
        for key, value in file.metadata.items():
            assert np.array_equal(bundle.metadata[key], value), key
    assert verify(tmp_path / "m.edge", silent) == []


def test_records_lie_as_promised(packed: Path) -> None:
    with Bundle.open(packed) as bundle, GgufFile.open(golden_path(MODEL)) as file:
        weights = weights_of(file)
        n_layers, n_expert = bundle.record_bytes.shape
        ends = np.cumsum(bundle.record_bytes).reshape(n_layers, n_expert)
        assert (bundle.record_offset == ends - bundle.record_bytes).all() and (bundle.record_bytes % 4096 == 0).all()
        assert bundle.experts_path.stat().st_size == ends[-1, -1] and (bundle.record_bytes > 0).all()
        for layer in range(n_layers):
            for index, expert in enumerate(weights.experts(layer)):
                record = np.empty(bundle.record_bytes[layer, index], np.uint8)
                bundle.read_record(layer, index, record)
                for matrix, part in zip((expert.gate, expert.up, expert.down), bundle.parts(layer, index), strict=True):
                    tiles = np.zeros(part.n_bytes, np.uint8)
                    matrix.pack(tiles)
                    assert part.offset % 64 == 0 and (part_of(record, part) == tiles).all()
        assert bundle.n_bytes == sum(path.stat().st_size for path in packed.iterdir())


def test_only_the_hot_weights_are_read_when_asked(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        opened.experts.close()  # whoever reads an expert would fail
        device, weights = NullDevice(weights_of(opened).config, 64), weights_of(opened)
        tables = weights.load_into(device, silent, experts=False)
        assert len(tables) == weights.config.n_layers and not any(table is None or table.any() for table in tables)
        with pytest.raises(ModelFileError, match="closed"):
            weights.load_into(NullDeviceThatReads(weights.config, 64), silent)


def test_embedding_rows(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or many, again and again, kept or not: as the source has them."""
    monkeypatch.setattr("edgert.weight_sources.KEPT_ROWS", 5)
    with Bundle.open(packed) as bundle, GgufFile.open(golden_path(MODEL)) as file:
        ours, theirs = weights_of(bundle), weights_of(file)
        for tokens in ([3], [3, 3, 4], list(range(40)), [39, 2, 39, 0], [7] * 9):
            assert (ours.embed(tokens) == theirs.embed(tokens)).all()


def test_sizes_by_name(packed: Path) -> None:
    """What the plan of memory asks."""
    with Bundle.open(packed) as bundle, GgufFile.open(golden_path(MODEL)) as file:
        ours, theirs = weights_of(bundle), weights_of(file)
        assert set(ours.shapes) == set(theirs.shapes) and ours.formats() == theirs.formats()
        for name in ours.shapes:
            if name == "token_embd.weight":
                assert ours.is_on_file(name) and theirs.is_on_file(name)
            elif len(ours.shapes[name]) == len(theirs.shapes[name]):  # else a vector that is used as a matrix
                assert ours.bytes_of(name) == theirs.bytes_of(name), name
        cold = [name for name in ours.shapes if ours.is_cold(name)]
        assert max(map(ours.packing_bytes, cold)) == bundle.record_bytes.max()


def test_the_digest_is_of_the_content(packed: Path, tmp_path: Path) -> None:
    moved = shutil.copy(golden_path(MODEL), tmp_path / "other-name.gguf")
    other = pack(golden_path("olmoe-f32"), tmp_path / "o.edge", progress=silent)
    paths = [packed, pack(Path(moved), progress=silent), other]
    digests = []
    for path in paths:
        with Bundle.open(path) as bundle:
            digests.append(bundle.manifest.content())
    assert digests[0] == digests[1] != digests[2]


def test_metadata_of_every_type(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "a.whole": 3, "a.negative": -3, "a.number": 0.1, "a.yes": True, "a.text": "naïve \U0001f600", "split.count": 2,
        "a.empty": [], "a.words": ["x", b"\xff".decode("utf-8", "surrogateescape"), ""], "a.half": "\ud800x",
        "a.nested": [np.array([1, 2], np.int16), np.array([0.5], np.float32)], "a.bits": np.array([True, False]),
        "a.list": [1, 2, 3], "a.scalar": np.float32(0.5),
    }  # fmt: skip
    path = tmp_path / "m.gguf"
    path.write_bytes(as_gguf(values))
    with GgufFile.open(path) as file:
        found = dict(file.metadata)
    assert found.pop("a.half") == "?x" and "split.count" not in found
    assert found.pop("a.empty") == [] and found.pop("a.list").tolist() == [1, 2, 3]
    for ours, theirs in zip(found.pop("a.nested"), values["a.nested"], strict=True):
        assert ours.dtype == theirs.dtype and (ours == theirs).all()
    bits = found.pop("a.bits")
    assert bits.dtype == bool and bits.tolist() == [True, False]
    assert found == {key: values[key] for key in found} and len(found) == 7


def test_what_cannot_be_exact_is_told(tmp_path: Path) -> None:
    """A tensor of a type that has no format here: zeros, in the place of one that has more bytes."""
    path, name, source = tmp_path / "m.gguf", "blk.0.ffn_gate_exps.weight", golden_path("llama-q2_k")
    with GgufFile.open(source) as file:
        info = file.tensors[name]
    raw = bytearray(source.read_bytes())
    raw[info.offset : info.offset + info.n_bytes] = bytes(info.n_bytes)
    at = raw.index(name.encode()) + len(name) + 4 + 8 * len(info.shape)  # behind the name and the dimensions
    assert raw[at] == info.type == Type.Q2_K
    raw[at] = Type.TQ1_0
    path.write_bytes(raw)
    packed = pack_model(path, progress=silent)
    assert packed.inexact == {"TQ1_0": "decoded to F16: each weight within 0.049 %, or 3e-8 where that is more"}
    with Bundle.open(packed.path) as bundle:
        assert [part.format.name for part in bundle.parts(0, 0)] == ["f16", "int2-k", "int2-k"]


# ---- damage ----------------------------------------------------------------------------------------------------------
def flip(path: Path, at: int, bit: int = 3) -> None:
    """Turn one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_flipped_bit_in_a_record(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        place, size = int(opened.record_offset[1, 2]), int(opened.record_bytes[1, 2])
        assert opened.record_bytes.shape[1] > 3
    flip(bundle / "experts.bin", place + size // 2)
    message = rf"experts\.bin: layer 1, expert 2 at byte {place:,} has checksum \w+, not \w+; .* pack the model again"
    with Bundle.open(bundle) as opened:
        weights = weights_of(opened)
        with pytest.raises(ModelFileError, match=message):
            opened.read_record(1, 2, np.empty(size, np.uint8))
        with pytest.raises(ModelFileError, match=message):
            weights.load_into(NullDeviceThatReads(weights.config, 64), silent)
        opened.read_record(1, 3, np.empty(size, np.uint8))
    assert [problem.partition(" at byte")[0] for problem in verify(bundle, silent)] == [
        f"{bundle}/experts.bin: layer 1, expert 2"
    ]


class NullDeviceThatReads(NullDevice):
    """It takes experts' bytes as the CPU does."""

    def pack_expert(self, weights: Any) -> int:
        weights.gate.pack(np.empty(weights.gate.part.n_bytes, np.uint8))
        return super().pack_expert(weights)


def test_flipped_bits_in_hot_weights(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        tensors, table = dict(opened.tensors), opened.table
    names = ["blk.0.attn_q.weight", "blk.0.attn_q.bias", "output_norm.weight", "output.weight"]
    for name in names:
        flip(bundle / "hot.bin", tensors[name].offset + tensors[name].n_bytes - 1)
    flip(bundle / "hot.bin", table.offset + 5 * table.stride)
    with Bundle.open(bundle) as opened:
        weights = weights_of(opened)
        for name in names:
            with pytest.raises(ModelFileError, match=rf"hot\.bin: tensor {name} at byte"):
                opened.read_tensor(name, np.empty(tensors[name].n_bytes, np.uint8))
        with pytest.raises(ModelFileError, match=r"row 5 of token_embd\.weight at byte"):
            weights.embed([4, 5])
        assert np.isfinite(weights.embed([4, 6])).all()
        with pytest.raises(IndexError):
            opened.read_table_rows([table.shape[0]])
    found = [problem.split(" tensor ")[1].split(" ")[0] for problem in verify(bundle, silent)]
    assert sorted(found) == sorted([*names, "token_embd.weight"])


def test_any_flipped_bit_in_the_manifest(bundle: Path) -> None:
    """Some bits of the document change nothing that it says, such as the case of a digit; then it says the same."""
    text = (bundle / "manifest.json").read_bytes()
    expected = bundle_manifest.parse(text, "m")
    for at in range(0, len(text), max(1, len(text) // 400)):
        damaged = bytearray(text)
        damaged[at] ^= 1 << at % 8
        try:
            found = bundle_manifest.parse(bytes(damaged), "m")
        except EdgertError as error:
            assert "pack the model again" in str(error)
        else:
            assert found.as_text() == expected.as_text()


def test_a_flipped_bit_in_the_metadata(bundle: Path) -> None:
    flip(bundle / "metadata.gguf", 200)
    with pytest.raises(ModelFileError, match=r"metadata\.gguf: its digest is not the one in the manifest"):
        Bundle.open(bundle)
    assert "its digest" in verify(bundle, silent)[0]


@pytest.mark.parametrize("name", ["experts.bin", "hot.bin", "metadata.gguf"])
def test_truncated_and_absent_files(bundle: Path, name: str) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    with pytest.raises(ModelFileError, match=rf"{name}: it has {size - 1:,} bytes, the manifest says {size:,}; "):
        Bundle.open(bundle)
    (bundle / name).unlink()
    with pytest.raises(ModelFileError, match=rf"{name}: no such file"):
        Bundle.open(bundle)
    os.mkfifo(bundle / name)
    with pytest.raises(ModelFileError, match=rf"{name}: not a regular file"):
        Bundle.open(bundle)


def test_a_file_that_shrinks_while_it_is_open(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        os.truncate(bundle / "experts.bin", 4096)
        with pytest.raises(ModelFileError, match=r"experts\.bin: the file has 4,096 bytes now"):
            opened.read_record(1, 2, np.empty(opened.record_bytes[1, 2], np.uint8))
        opened.close()
        opened.close()
        with pytest.raises(ModelFileError, match="closed"):
            opened.read_record(0, 0, np.empty(opened.record_bytes[0, 0], np.uint8))


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nix", "no such folder"), (tmp_path, "not a bundle, it holds no manifest.json")):
        with pytest.raises(ModelFileError, match=words):
            Bundle.open(path)
    with pytest.raises(ModelFileError, match="not a folder"):
        Bundle.open(golden_path(MODEL))
    with open(tmp_path / "manifest.json", "wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(ModelFileError, match="it has more than 268,435,456 bytes"):
        Bundle.open(tmp_path)


# ---- hostile manifests -----------------------------------------------------------------------------------------------
def test_a_newer_format_version(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"version": 1', '"version": 7'))
    with pytest.raises(UnsupportedError, match="format version 7, this edgert reads 1; upgrade edgert, or remove"):
        Bundle.open(bundle)
    assert "format version 7" in verify(bundle, silent)[0]


def _set(*path: Any) -> Callable[[Any], None]:
    *keys, last, value = path

    def change(document: Any) -> None:
        for key in keys:
            document = document[key]
        document[last] = value

    return change


HOSTILE = {
    "no version": (_set("version", None), "format version"),
    "version 0": (_set("version", 0), "format version"),
    "another format": (_set("format", "zip"), 'no "format"'),
    "no hot": (_set("hot", None), 'no "hot"'),
    "tensors of a kind": (_set("hot", "tensors", {}), "no list"),
    "tensor of four": (_set("hot", "tensors", 0, [1, 2, 3, 4]), "not a row of 6"),
    "a gap": (_set("hot", "tensors", 1, 3, 1 << 20), "does not fit"),
    "an overlap": (_set("hot", "tensors", 1, 3, 0), "does not fit"),
    "too large": (_set("hot", "tensors", 0, 4, 1 << 60), "does not fit"),
    "a huge shape": (_set("hot", "tensors", 0, 1, [1 << 31, 1 << 31]), "impossible"),
    "a negative shape": (_set("hot", "tensors", 0, 1, [-4, 64]), "not a number"),
    "a shape of floats": (_set("hot", "tensors", 0, 1, [4.0, 64]), "not a number"),
    "an empty shape": (_set("hot", "tensors", 0, 1, []), "is none"),
    "an unknown format": (_set("hot", "tensors", 0, 2, "int1"), "the format"),
    "a format of a kind": (_set("hot", "tensors", 0, 2, ["int4"]), "the format"),
    "a name of a kind": (_set("hot", "tensors", 0, 0, None), "the name"),
    "a name that prints badly": (_set("hot", "tensors", 0, 0, "\x1b[2J"), "the name"),
    "no checksum": (_set("hot", "tensors", 0, 5, "0x12"), "no checksum"),
    "table elsewhere": (_set("hot", "table", 3, 4096), "should begin"),
    "table of another type": (_set("hot", "table", 2, "Q9_Z"), "type"),
    "table of thin rows": (_set("hot", "table", 4, 64), "does not fit"),
    "hot.bin of another size": (_set("hot", "bytes", 5), r"hot\.bin should have"),
    "experts.bin of another size": (_set("experts", "bytes", -1), r"experts\.bin should have"),
    "many layers": (_set("experts", "layers", 1 << 40), "layers is"),
    "records twice": (
        lambda document: document["experts"]["records"].append(document["experts"]["records"][0]),
        "records",
    ),
    "record of no kind": (_set("experts", "records", 0, 3, 9), "its kind"),
    "record of no layer": (_set("experts", "records", 0, 0, 99), "a record's layer"),
    "another variant": (_set("experts", "records", 0, 2, 1), "does not fit"),
    "record beyond": (_set("experts", "records", 1, 4, 1 << 45), "does not fit"),
    "projections that overlap": (_set("experts", "kinds", 0, 1, 2, 0), "one after the other"),
    "metadata of no size": (_set("metadata", "bytes", None), "metadata bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(packed: Path, name: str) -> None:
    """Sound digests, unsound content."""
    document = copy.deepcopy(json.loads((packed / "manifest.json").read_bytes()))
    change, words = HOSTILE[name]
    del document["digest"]
    change(document)
    document["digest"] = bundle_manifest._digest(document)
    with pytest.raises(ModelFileError, match=words):
        bundle_manifest.parse(json.dumps(document).encode(), "manifest.json")


@pytest.mark.parametrize("what", ["layers", "per_layer"])
def test_a_manifest_of_another_model_than_the_metadata(bundle: Path, what: str) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    del document["digest"]
    document["experts"][what] += 3
    document["digest"] = bundle_manifest._digest(document)
    (bundle / "manifest.json").write_text(json.dumps(document))
    with Bundle.open(bundle) as opened, pytest.raises(ModelFileError, match=r"m\.edge: .*; remove the bundle and pack"):
        weights_of(opened)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"null", b"[]", b'"x"', b"\xff\xfe", b"9" * 5000])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(ModelFileError, match="the bundle is damaged: remove it and pack the model again"):
        bundle_manifest.parse(text, "manifest.json")

"""Loading: what is refused and when, what a failure leaves behind, and peak memory against the plan."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from models import golden_names, golden_path

import edgert
from edgert import memory
from edgert.architectures import read_config
from edgert.describing import describe
from edgert.errors import EdgertError, MemoryLimitError, ModelFileError, OptionError
from edgert.loading import load_parts
from edgert.needs import needs
from edgert.quant import packing
from edgert.storage.gguf_file import GgufFile
from edgert.weights import Weights

MIB = 1 << 20


def pool_threads() -> int:
    """Threads of edgert's pools that are alive."""
    return sum(thread.name.startswith("edgert-") for thread in threading.enumerate())


def write_model(path: Path, *, n_vocab: int, d_model: int, head: Type) -> None:
    """A dense llama of one layer, whose head and embeddings are one tensor of random blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(d_model)
    writer.add_head_count(d_model // 64)
    writer.add_context_length(512)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", *(str(digit) for digit in range(10)), *(f"t{i}" for i in range(n_vocab - 11))])
    writer.add_token_types([1] * n_vocab)
    writer.add_token_merges([f"t{str(i)[:-1]} {i % 10}" for i in range(n_vocab - 11)])
    writer.add_eos_token_id(0)
    block, block_bytes = gguf.GGML_QUANT_SIZES[head]
    blocks = np.random.default_rng(1).integers(0, 128, (n_vocab, d_model // block, block_bytes), np.uint8)
    if head == Type.IQ3_S:
        blocks[..., 1] = 0x10  # the scale of 256 weights: small
    writer.add_tensor("token_embd.weight", blocks.reshape(n_vocab, -1), raw_dtype=head)
    writer.add_tensor("output_norm.weight", np.ones(d_model, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(d_model, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        n_out = 64 if name in ("ffn_gate", "ffn_up") else d_model
        n_in = 64 if name == "ffn_down" else d_model
        writer.add_tensor(f"blk.0.{name}.weight", np.full((n_out, n_in), 0.01, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# VmHWM, and not ru_maxrss: that one starts with the memory of the process which started this one.
MEASURE = """
import json, sys
from edgert import loading
plans, plan = [], loading.plan_memory
loading.plan_memory = lambda *needs, **options: plans.append(plan(*needs, **options)) or plans[-1]
import edgert
with edgert.load(sys.argv[1], threads=1) as model:
    model.generate("t1t2", max_tokens=2)
    status = open("/proc/self/status").read()
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
process = plans[0].process + plans[0].tokenizer
print(json.dumps({"peak": peak, "total": plans[0].total, "process": process, "hot": plans[0].hot}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("head", "bytes_per_weight"), [(Type.IQ3_S, 2), (Type.F32, 4)], ids=["IQ3_S", "F32"])
def test_peak_memory_stays_below_the_plan(tmp_path: Path, head: Type, bytes_per_weight: int) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, n_vocab=60_000, d_model=1024 if head == Type.IQ3_S else 512, head=head)
    command = [sys.executable, "-c", MEASURE, str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert found["hot"] > 117 * MIB
    assert found["hot"] < found["peak"] <= found["total"], found
    assert found["total"] < found["process"] + found["hot"] + 40 * MIB, "the plan is not tight"


def test_a_budget_below_the_floor_is_refused_with_the_number_that_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "taken", lambda: 0)  # by pytest and the tests before
    edgert.load().close()  # the kernels are compiled now: the compiler's memory is no part of the floor
    needed = describe()["memory"]
    with pytest.raises(MemoryLimitError) as refused:
        edgert.load(memory=needed["floor"] - MIB)
    remedy = str(refused.value).partition("use --memory ")[2].split()[0].rstrip(";")
    assert needed["floor"] <= int(remedy[:-3]) * MIB < needed["floor"] + 2 * MIB < needed["total"]
    with edgert.load() as model:
        assert model.n_context == 4096
        said = model.generate("The capital of France", max_tokens=8)
    with edgert.load(memory=remedy) as model:  # its experts come from flash
        again = model.generate("The capital of France", max_tokens=8)
    assert again.token_ids == said.token_ids and again.usage.expert_misses > 100 and not said.usage.expert_misses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_type": "q4"}, "kv_type='q4'"),
        ({"activations": "int2"}, "activations='int2'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"policy": ["lru"]}, r"policy=\['lru'\]"),
        ({"prefetch": {}}, "prefetch={}"),
        ({"residency": 25}, "residency=25 must lie above 0"),
        ({"residency": float("nan")}, "residency=nan must"),
        ({"residency": True}, "residency=True is not a share"),
        ({"residency": "a%"}, "residency='a%' is not a share"),
        ({"residency": [0.5]}, r"residency=\[0.5\] is not a share"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 2000}, "threads=2000"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any) -> None:
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(GgufFile, "_read", read)
    before = pool_threads()
    with pytest.raises(OptionError, match=message):
        edgert.load(**options)
    assert pool_threads() == before


def test_memory_that_runs_out_is_an_error_of_edgert_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[int] = []

    def fail(*arguments: Any) -> None:
        during.append(pool_threads())
        raise MemoryError

    monkeypatch.setattr(packing, "pack_rows", fail)
    before, descriptors = pool_threads(), len(os.listdir("/dev/fd"))
    with pytest.raises(MemoryLimitError, match=r"smollm2-moe-q4_0.gguf: memory ran out .* MiB are available; close"):
        edgert.load(threads=3)
    assert during == [before + 2]
    assert ended(before) and len(os.listdir("/dev/fd")) == descriptors


def ended(n_threads: int) -> bool:
    """Whether the pools have only so many threads, or come down to it soon."""
    end = time.monotonic() + 5
    while pool_threads() > n_threads and time.monotonic() < end:
        time.sleep(0.01)
    return pool_threads() == n_threads


def test_a_model_that_nobody_closed_gives_back_its_threads_and_file() -> None:
    options: dict[str, Any] = {"context": 64, "device": "auto", "kv_type": "f16", "activations": "int8"}
    options |= {"memory": None, "residency": None, "policy": "auto", "prefetch": "auto", "trace": None}
    before, descriptors = pool_threads(), len(os.listdir("/dev/fd"))
    parts = load_parts(None, threads=3, progress=lambda stage, fraction: None, **options)
    assert pool_threads() == before + 2
    del parts
    gc.collect()
    assert ended(before) and len(os.listdir("/dev/fd")) == descriptors


# ---- hostile metadata ------------------------------------------------------------------------------------------------
def table_of(file: GgufFile, metadata: dict[str, Any], tensors: dict[str, Any] | None = None) -> Any:
    """A file with other metadata, as far as Weights and plan look at it."""
    return SimpleNamespace(path=file.path, metadata=metadata, tensors=tensors or file.tensors)


def test_more_layers_than_tensors_are_refused_at_once() -> None:
    with GgufFile.open(golden_path("llama-f32")) as file:
        metadata = {**file.metadata, "llama.block_count": 2_000_000_000}
        config = read_config(metadata, str(file.path))
        start = time.monotonic()
        with pytest.raises(ModelFileError, match=r"llama-f32.gguf: llama.block_count is 2000000000, but .* tensors"):
            Weights(table_of(file, metadata), config)
        assert time.monotonic() - start < 1


HOSTILE: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 63, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, -(1 << 63)),
    *(
        0.0,
        -0.0,
        1e-320,
        0.5,
        1e38,
        -1.0,
        float("inf"),
        float("nan"),
        True,
        False,
        "",
        "none",
        "yarn",
        "\0",
        "x" * 5000,
    ),
    *([], ["a", "b"], np.zeros(0, np.int32), np.zeros(3, np.float32), np.array([1, 2], np.uint32)),
    *(np.full(4, 1 << 30, np.int64), np.array([np.nan], np.float64), np.array([True, True])),
]


def mutated(file: GgufFile, chance: random.Random) -> Any:
    """The file with one to three values of its metadata, or dimensions of its tensors, replaced, or gone."""
    metadata, tensors = dict(file.metadata), dict(file.tensors)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.15:
            info = tensors[chance.choice(list(tensors))]
            shape = list(info.shape)
            shape[chance.randrange(len(shape))] = chance.choice((1, 3, 32, 1 << 20, 1 << 40))
            tensors[info.name] = SimpleNamespace(name=info.name, type=info.type, shape=tuple(shape), n_bytes=9)
            continue
        keys = [key for key in metadata if not key.startswith("general.") or chance.random() < 0.1]
        key = chance.choice(keys)
        if chance.random() < 0.1:
            del metadata[key]
        else:
            metadata[key] = chance.choice(HOSTILE)
    return table_of(file, metadata, tensors)


@pytest.mark.parametrize("name", [name for name in golden_names() if name.endswith("-f32")])
def test_mutated_metadata_are_read_or_refused(name: str) -> None:
    chance, refused, slowest = random.Random(name), 0, 0.0
    with GgufFile.open(golden_path(name)) as file:
        for _ in range(400):
            mutant = mutated(file, chance)
            start = time.perf_counter()
            try:
                config = read_config(mutant.metadata, str(mutant.path))
                assert needs(Weights(mutant, config), min(config.n_context, 4096), "f16").floor().total > 0
            except EdgertError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 2000, error
            slowest = max(slowest, time.perf_counter() - start)
    assert 100 < refused < 400 and slowest < 2

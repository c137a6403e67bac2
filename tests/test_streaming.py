"""One answer, bit for bit: experts from flash or in RAM, whatever is kept, guessed, read ahead or moved meanwhile."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import HERE, engine_of, golden_path
from pairs import all_pairs
from streaming_models import Faulty, Host, WrittenRecords, answer
from test_kernels import random_matrix

import edgert
from edgert.devices.base import ExpertWeights
from edgert.devices.reference import ReferenceDevice
from edgert.engine import Engine
from edgert.experts.policies import POLICIES
from edgert.experts.predictors import PREDICTORS
from edgert.experts.residency import AllResident
from edgert.experts.slots import ALIGNMENT
from edgert.loading import resolve
from edgert.pack import pack
from edgert.quant.formats import FORMATS
from edgert.storage.bundle import Bundle

N_TOKENS = 64  # that are generated
GOLDEN = ("llama-q4_0", "olmoe-q8_0", "qwen2moe-f32", "granitemoe-shared-f32", "llama-q4_k", "qwen3moe-q4_1")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the experts in RAM; 0: as few as run
GUESSES = (("off", ()), ("auto", tuple(PREDICTORS)), *(("always", (name,)) for name in PREDICTORS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Iterator[Bundle]:
    with bundle_of(folder, resolve(None)) as bundle:
        yield bundle


def bundle_of(folder: Path, source: Path) -> Bundle:
    """The bundle of a model, packed once."""
    out = folder / f"{source.stem}.edge"
    return Bundle.open(out if out.exists() else pack(source, out, progress=lambda stage, fraction: None))


def prompt_of(n_vocab: int, n_tokens: int = 70) -> list[int]:
    return [(7 * i * i + 3 * i + 11) % n_vocab for i in range(n_tokens)]


@cache
def resident(source: Path) -> tuple[Any, list[int]]:
    """What a model says with all experts in RAM, from the GGUF."""
    engine, session = engine_of(source, activations="int8", kv_type="f16")
    said = answer(engine, session, prompt_of(engine.config.n_vocab), 256, N_TOKENS)
    engine.device.close()
    return said


def check(host: Host, expected: tuple[Any, list[int]], chunk: int, **options: Any) -> Any:
    """Compare an answer with the one expected; what the experts did."""
    engine, session, experts = host.streamed(**options)
    logits, tokens = answer(engine, session, prompt_of(host.config.n_vocab), chunk, len(expected[1]))
    assert (logits == expected[0]).all() and tokens == expected[1]
    assert experts.residency.check() == []
    return experts


CASES = all_pairs(
    {
        "name": GOLDEN,
        "policy": tuple(POLICIES),
        "guesses": GUESSES,
        "share": SHARES,
        "threads": (1, 2),
        "chunk": (1, 7, 16, 17, 70),
        "lanes": (1, 4),
        "halves": (True, False),
    }
)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models_answer_as_if_all_experts_were_in_ram(name: str, folder: Path) -> None:
    expected = resident(golden_path(name))
    for threads in (1, 2):
        with bundle_of(folder, golden_path(name)) as bundle, Host(bundle, threads=threads) as host:
            for case in (case for case in CASES if case["name"] == name and case["threads"] == threads):
                mode, predictors = case["guesses"]
                options = {key: case[key] for key in ("policy", "share", "lanes", "halves")}
                check(host, expected, case["chunk"], mode=mode, predictors=predictors, **options)


# Layers without experts, biases, groups, weights on inputs, states: what the architectures above do not have.
OTHERS = (
    "bailingmoe2-f32",
    "deepseek2-lite-f32",
    "deepseek2-v3-f32",
    "dots1-f32",
    "ernie4_5-moe-f32",
    "glm4moe-f32",
    "gpt-oss-f32",
    "gpt-oss-mxfp4",
    "hunyuan-moe-f32",
    "lfm2moe-f32",
    "llama4-f32",
    "phimoe-f32",
    "qwen35moe-gateup-f32",
    "qwen3next-f32",
)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_architectures_too(name: str, folder: Path) -> None:
    expected = resident(golden_path(name))
    expected = expected[0], expected[1][:16]
    with bundle_of(folder, golden_path(name)) as bundle, Host(bundle) as host:
        check(host, expected, 48, share=0.0, policy="lru", mode="off")
        check(host, expected, 7, share=0.25, policy="edgemoe", mode="always", predictors=tuple(PREDICTORS))
        check(host, expected, 70, share=0.5, policy="lfru", mode="auto", predictors=tuple(PREDICTORS), halves=False)
        check(host, expected, 1, share=0.5, policy="cost", mode="always", predictors=("router",))


# 20: experts in ascending id, 48: whole layers read ahead as well
@pytest.mark.parametrize(
    ("policy", "mode", "share", "chunk", "threads"),
    [
        ("lru", "off", 0.0, 48, 1),
        ("edgemoe", "always", 0.25, 20, 2),
        ("lfru", "auto", 0.5, 70, 2),
        ("cost", "always", 0.5, 5, 1),
        ("pinned", "always", 0.75, 48, 2),
        ("lfu", "off", 1.0, 16, 2),
    ],
)
def test_the_embedded_model_too(
    policy: str, mode: str, share: float, chunk: int, threads: int, embedded: Bundle
) -> None:
    with Host(embedded, threads=threads) as host:
        experts = check(host, resident(resolve(None)), chunk, policy=policy, mode=mode, share=share)
    counts = experts.residency.counts
    # At the floor there are three places, and sixty experts pass until a layer comes again: finding one is an accident.
    assert (counts.expert_hits > 0 or share == 0) and (counts.expert_misses > 0 or share == 1)
    assert (counts.prefetch_useful + counts.prefetch_late > 0) == (mode != "off")


def test_the_reference_device_streams_the_same_bits(folder: Path) -> None:
    expected = resident(golden_path("olmoe-q8_0"))
    with bundle_of(folder, golden_path("olmoe-q8_0")) as bundle, Host(bundle, device=ReferenceDevice) as host:
        short = expected[0], expected[1][:8]
        for chunk, share in ((70, 0.0), (7, 0.5)):
            check(host, short, chunk, share=share, mode="always")


SAY = """
import hashlib, sys, edgert
with edgert.load(sys.argv[1], residency=0.4, policy="cost", prefetch="always") as model:
    print(model._parts.engine.device.name, type(model._parts.engine.residency).__name__)
    print(hashlib.sha256(model.logits(list(range(5, 45))).tobytes()).hexdigest())
    print(model.generate(list(range(5, 45)), max_tokens=6).token_ids)
    print(model._parts.engine.residency.check())
"""


def test_without_the_compiler_the_same_bits(folder: Path) -> None:
    bundle_of(folder, golden_path("llama-q4_0")).close()
    said = []
    for jit in ("0", "1"):
        env = {**os.environ, "NUMBA_DISABLE_JIT": jit, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SAY, str(folder / "llama-q4_0.edge")]
        said.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=HERE).stdout)
    (compiled, *answered), (slow, *slowly) = said[0].splitlines(), said[1].splitlines()
    assert (compiled, slow) == ("cpu Streamed", "reference Streamed")
    assert answered == slowly and answered[-1] == "[]"


def test_through_the_public_api(folder: Path) -> None:
    source, prompt = golden_path("granitemoe-shared-f32"), prompt_of(300)
    bundle_of(folder, source).close()
    with edgert.load(source, residency=1.0) as model:
        logits, said = model.logits(prompt), model.generate(prompt, max_tokens=N_TOKENS, logprobs=3)
    with edgert.load(folder / f"{source.stem}.edge", residency=0.4) as model:
        assert (model.logits(prompt) == logits).all()
        again = model.generate(prompt, max_tokens=N_TOKENS, logprobs=3)
        assert again.token_ids == said.token_ids and again.logprobs == said.logprobs
        assert model.chat([{"role": "user", "content": "abc"}], max_tokens=3).token_ids is not None
        assert again.usage.prefetch and not said.usage.prefetch
        assert again.usage.expert_misses > 0 and model._open().engine.residency.check() == []


# ---- records of different sizes --------------------------------------------------------------------------------------
FORMAT_OF = ("int2-g16-min", "int4", "int8", "f16", "int6-g16")  # of each expert in turn: 3 to 8 pages of 4 KiB


def mixed_experts(n_layers: int, n_expert: int, d_model: int, d_expert: int) -> list[list[ExpertWeights]]:
    """Random experts, each of another format than its neighbours."""
    shapes = (d_expert, d_model), (d_expert, d_model), (d_model, d_expert)

    def expert(number: int) -> ExpertWeights:
        format = FORMATS[FORMAT_OF[number % len(FORMAT_OF)]]
        return ExpertWeights(*(random_matrix(format, *shape, 10 * number + i) for i, shape in enumerate(shapes)))

    return [[expert(layer * n_expert + i) for i in range(n_expert)] for layer in range(n_layers)]


def test_records_of_any_sizes_share_the_buffer(folder: Path, tmp_path: Path) -> None:
    with bundle_of(folder, golden_path("llama-q4_0")) as bundle:
        shape = bundle.record_bytes.shape
        experts = mixed_experts(*shape, 64, 64)
        matrices = [[(e.gate, e.up, e.down) for e in layer] for layer in experts]
        records = WrittenRecords(tmp_path / "mixed.bin", matrices)
        sizes = records.record_bytes // ALIGNMENT
        assert len(np.unique(sizes)) >= 3, sizes
        with Host(bundle, records=(records, records.path)) as host:
            expected = in_ram(host, experts)
            n_moves = 0
            for place, policy in enumerate(POLICIES):
                for share in (0.0, 0.4, 0.65):
                    mode, predictors = GUESSES[place % len(GUESSES)]
                    options = {"policy": policy, "share": share, "mode": mode, "predictors": predictors}
                    engine, session, made = host.streamed(**options)
                    moves = count_moves(made)
                    said = answer(engine, session, prompt_of(host.config.n_vocab), (70, 16, 5)[place % 3], N_TOKENS)
                    assert (said[0] == expected[0]).all() and said[1] == expected[1], options
                    assert made.residency.check() == []
                    n_moves += len(moves)
            assert n_moves > 20  # gaps were joined: the test is not for nothing


def in_ram(host: Host, experts: list[list[ExpertWeights]]) -> tuple[Any, list[int]]:
    """What a host says with these experts, all of them in RAM."""
    tables = []
    for layer in experts:
        tables.append(host.device.new_table(len(layer)))
        for place, expert in enumerate(layer):
            tables[-1][place] = host.device.pack_expert(expert)
    engine = Engine(host.config, host.device, AllResident(host.device, tables), host.streamed(share=1)[0].embed)
    return answer(engine, host.session(), prompt_of(host.config.n_vocab), 64, N_TOKENS)


def count_moves(experts: Any) -> list[int]:
    """Note the size of each gap that is made by moving records."""
    join, sizes = experts.slots.join_gaps, list[int]()

    def noted(n_bytes: int, *rest: Any) -> bool:
        done: bool = join(n_bytes, *rest)
        if done:
            sizes.append(n_bytes)
        return done

    experts.slots.join_gaps = noted
    return sizes


# ---- the size of the buffer ------------------------------------------------------------------------------------------
def test_the_buffer_shrinks_and_grows_while_it_answers(embedded: Bundle) -> None:
    prompt, n = prompt_of(5000, 40), 24
    with Host(embedded) as host:
        engine, session, _ = host.streamed(share=1.0)
        expected = answer(engine, session, prompt, 40, n)
        engine, session, experts = host.streamed(share=0.75, policy="lfru", mode="always")
        planned, seen = experts.residency.slot_bytes, list[int]()

        def resize() -> None:
            seen.append(experts.residency.slot_bytes)
            assert experts.residency.check() == []
            experts.residency.request_bytes((planned, planned // 2, 0, planned // 3)[len(seen) % 4])

        experts.residency.watch = resize
        said = answer(engine, session, prompt, 20, n)
        assert (said[0] == expected[0]).all() and said[1] == expected[1]
        assert len(set(seen)) >= 4 and min(seen) == experts.residency.least_bytes and max(seen) <= planned
        assert experts.residency.check() == []


def test_reads_that_come_late_and_in_pieces_change_nothing(folder: Path) -> None:
    source = golden_path("qwen2moe-f32")
    expected = resident(source)
    with bundle_of(folder, source) as bundle, Host(bundle) as host:
        engine, session, experts = host.streamed(share=0.0, mode="always", chunk_bytes=4096, lanes=7)
        experts.file.fault = scrambled(experts.file)
        said = answer(engine, session, prompt_of(host.config.n_vocab), 16, N_TOKENS)
        assert (said[0] == expected[0]).all() and said[1] == expected[1]
        assert experts.residency.check() == [] and experts.residency.counts.flash_wait_s > 0


def scrambled(file: Faulty) -> Any:
    """Reads that take no time, or 0.2 ms, so that pieces arrive in any order."""
    draw = random.Random(3)

    def fault(view: memoryview, offset: int) -> None:
        if draw.random() < 0.2:
            time.sleep(2e-4)

    return fault


def test_pairs_are_all_there() -> None:
    choices = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": range(4)}
    found = all_pairs(choices)
    for one in choices:
        for other in choices:
            if one != other:
                met = {(case[one], case[other]) for case in found}
                assert len(met) == len(choices[one]) * len(choices[other])
    assert len(found) < 20

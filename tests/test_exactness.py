"""One answer, bit for bit: chunks, threads, instruction paths, prefix reuse and the NumPy reference all agree."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from models import HERE, engine_of, golden, golden_names, golden_path, run

from edgert.devices.reference import ReferenceDevice
from edgert.quant import isa

MODELS = [
    "llama-f32",
    "llama-q4_0",
    "olmoe-q8_0",
    "qwen2moe-f32",
    "qwen3moe-q4_1",
    "granitemoe-shared-f32",
    "llama-q4_k",
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
    "qwen35moe-f32",
    "qwen35moe-gateup-f32",
    "qwen3next-f32",
]
OTHER_FORMATS = [f"llama-{kind}" for kind in ("q2_k", "q3_k", "q5_0", "q5_1", "q5_k", "q6_k", "iq4_nl", "iq4_xs")]


def tokens_of(name: str) -> tuple[Path, list[int]]:
    """A model and a text of more than one block of positions."""
    path, expected = golden(name)
    return path, (expected["tokens"].tolist() * 3)[:70]


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_threads_change_nothing(name: str, activations: str) -> None:
    path, tokens = tokens_of(name)
    whole = run(*engine_of(path, activations=activations, kv_type="f16", threads=2), tokens)
    for threads, chunk in ((1, 1), (2, 7), (3, 64), (5, 256)):
        again = run(*engine_of(path, activations=activations, kv_type="f16", threads=threads), tokens, chunk=chunk)
        assert (again == whole).all(), (threads, chunk)


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_in_numpy_agrees(name: str, activations: str) -> None:
    path, tokens = tokens_of(name)
    for kv_type in ("f16", "f32"):
        compiled = run(*engine_of(path, activations=activations, kv_type=kv_type), tokens)
        slow = run(*engine_of(path, activations=activations, kv_type=kv_type, device=ReferenceDevice), tokens)
        assert (compiled == slow).all(), np.abs(compiled - slow).max()


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_equals_all_at_once(name: str) -> None:
    path, tokens = tokens_of(name)
    (together, session), (apart, other) = (engine_of(path, activations="int8", kv_type="f16") for _ in range(2))
    seen: list[int] = []
    apart.every_layer = True
    layers = apart.config.expert_layers
    apart.trace = lambda device: seen.extend(len(np.unique(device.chosen(layer)[0])) for layer in layers)
    for part in (tokens, tokens[:1], tokens[:5]):
        assert (run(together, session, part) == run(apart, other, part)).all()
    assert together.residency.counts.expert_hits == apart.residency.counts.expert_hits == sum(seen) > 0


def test_a_reused_prefix_changes_nothing() -> None:
    path, tokens = tokens_of("qwen3moe-q4_0")
    engine, session = engine_of(path, activations="int8", kv_type="f16")
    run(engine, session, tokens)
    changed = tokens[:40] + [7] * 30
    kept = session.trim(changed)
    assert kept == 40
    reused = run(engine, session, changed[kept:])
    fresh = run(*engine_of(path, activations="int8", kv_type="f16"), changed)
    assert (reused == fresh[kept:]).all()


PRINT = """
import hashlib, sys
from pathlib import Path
from models import engine_of, run
for path, activations in zip(sys.argv[1::2], sys.argv[2::2]):
    engine = engine_of(Path(path), activations=activations, kv_type="f16")
    print(Path(path).name, activations, hashlib.sha256(run(*engine, list(range(5, 90))).tobytes()).hexdigest())
"""


# Every path that this machine has; and a CPU, by LLVM's name, with neither AVX, fused multiply-add nor half floats
CPUS = {path.name: {"EDGERT_ISA": path.name} for path in isa.PATHS if set(path.needs) <= isa.cpu_features()} | {
    "nehalem": {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"}
}


def test_every_instruction_path_gives_the_same_bits(tmp_path: Path) -> None:
    """Of all these models, in one process a path; two processes at a time, for they spend theirs on compiling."""
    models, others = ([name for name in names if name in golden_names()] for names in (MODELS, OTHER_FORMATS))
    runs = [(name, "int8") for name in models + others] + [(name, "f32") for name in models]
    words = [word for name, activations in runs for word in (str(golden_path(name)), activations)]
    command = [sys.executable, "-c", PRINT, *words]

    def answer(extra: dict[str, str]) -> list[str]:
        folders = filter(None, (str(HERE), os.environ.get("PYTHONPATH")))
        env = {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(folders)}
        run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    paths = {name: extra for name, extra in CPUS.items() if name != "nehalem" or platform.machine() == "x86_64"}
    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(paths, pool.map(answer, paths.values()), strict=True))
    assert len(answers["portable"]) == len(runs)
    for path, found in answers.items():
        assert found == answers["portable"], path

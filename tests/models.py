"""Where tests find models, and how they run one without the public API's tokenizer and template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.architectures import read_config, supported
from edgert.devices.cpu import CpuDevice
from edgert.engine import Engine, Session
from edgert.experts.residency import AllResident
from edgert.storage.gguf_file import GgufFile
from edgert.types import ModelConfig
from edgert.weights import Weights

HERE = Path(__file__).resolve().parent
OWN = HERE / "golden"
SHARED = HERE.parents[1] / "shared" / "golden" / "open"
ARCHITECTURES = tuple(supported())


def golden_names() -> list[str]:
    """Names of all golden fixtures of the supported architectures: ours, and the shared ones where present."""
    found = {path.stem for folder in (OWN, SHARED) if folder.is_dir() for path in folder.glob("*.npz")}
    return sorted(name for name in found if name.startswith(tuple(f"{one}-" for one in ARCHITECTURES)))


def golden_path(name: str) -> Path:
    """The GGUF of a fixture; the test is skipped where it is absent."""
    for folder in (OWN, SHARED):
        if (folder / f"{name}.gguf").exists():
            return folder / f"{name}.gguf"
    pytest.skip(f"the fixture {name} is not in tests/golden, and the shared ones are absent")


def golden(name: str) -> tuple[Path, Any]:
    """A fixture's GGUF and what llama.cpp answered."""
    path = golden_path(name)
    return path, np.load(path.with_suffix(".npz"))


def engine_of(
    path: Path,
    *,
    activations: str = "f32",
    kv_type: str = "f32",
    threads: int = 2,
    n_context: int = 256,
    device: Any = CpuDevice,
    change: Callable[[ModelConfig], ModelConfig] = lambda config: config,
) -> tuple[Engine, Session]:
    """An engine over a model file, and an empty session."""
    with GgufFile.open(path) as file:
        config = change(read_config(file.metadata, str(path)))
        weights = Weights(file, config, decode_to_f32=activations == "f32")
        made = device(
            config, n_context, threads=threads, activations=activations, rope_divisors=weights.rope_divisors(n_context)
        )
        tables = weights.load_into(made, lambda stage, fraction: None)
        table = weights.embed(list(range(config.n_vocab)))
    engine = Engine(config, made, AllResident(made, tables), lambda ids: table[ids])
    return engine, Session(made.new_cache(n_context, kv_type))


def run(engine: Engine, session: Session, tokens: list[int], *, chunk: int = 256) -> Any:
    """Logits (n_tokens, n_vocab) of `tokens` after what the session holds."""
    return np.concatenate(
        [rows.copy() for n in engine.prefill(tokens, session, chunk=chunk) for rows in engine.logits(n)]
    )

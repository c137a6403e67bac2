"""What `edgert inspect` says of a model: architecture, sizes, experts, tokenizer, memory; no weights are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.loading import context_of, words
from edgert.memory import Needs, budget_for, plan_memory
from edgert.paper_model import PaperFile
from edgert.plan_model import PlanModel, open_tables
from edgert.proof import Proof
from edgert.quant.formats import Format
from edgert.storage.bundle import Bundle
from edgert.storage.bundle_manifest import Manifest
from edgert.tensor_views import is_unused, skipped
from edgert.types import ModelConfig
from edgert.weight_sources import PROJECTIONS
from edgert.weights import Weights


def describe(
    path_or_name: str | Path | None = None,
    *,
    context: int | None = None,
    kv_type: str = "f16",
    memory: str | int | float | None = None,
) -> dict[str, Any]:
    """What `edgert inspect` prints, without reading the weights: of a model, of what a GGUF begins with, of a preset.

    memory: the budget to plan for, "auto" the one that load takes; None: what the model needs with all experts in RAM.
    """
    model = open_tables(None if path_or_name is None else str(path_or_name))
    weights, config, file = model.weights, model.config, model.weights.file
    n_context = context_of(context, config)
    types: Counter[str] = Counter()
    for _, kind, n_bytes in _tensors(weights):
        types[kind] += n_bytes
    stored = sum(math.prod(shape) for shape in weights.shapes.values())
    cold = sum(n_bytes for name, _, n_bytes in _tensors(weights) if weights.is_cold(name))
    total = sum(types.values())
    return {
        **_source(model),
        "name": model.name,
        "architecture": config.architecture,
        "parameters": weights.n_parameters,
        "bpw": 8 * total / stored,
        "bytes": {"total": model.whole_bytes or file.n_bytes, "hot": total - cold, "cold": cold},
        "tensor_types": dict(types.most_common()),
        "layers": config.n_layers,
        **({"skipped": skipped(config)} if config.n_unused_layers else {}),
        "embedding_length": config.d_model,
        "context_length": config.n_context,
        "experts": _experts(config, cold),
        **_words(model),
        "memory": _ledger(model.needs(n_context, kv_type), memory),
        **(_measured(file) if isinstance(file, Bundle) and config.router else {}),
    }


def _source(model: PlanModel) -> dict[str, str]:
    """Where it is, and what is not there."""
    if model.path is None:
        return {"source": f"{model.source}: no weights, it cannot run"}
    found = {"path": str(model.path)}
    if model.whole_bytes:
        there, whole = model.weights.file.n_bytes, model.whole_bytes
        found["source"] = f"the first {there:,} of {whole:,} bytes: it cannot run"
    return found


def _words(model: PlanModel) -> dict[str, Any]:
    """Tokenizer and template, which no config.json has."""
    file, size = model.weights.file, model.config.n_vocab
    if isinstance(file, PaperFile):
        return {"vocabulary": {"size": size}}
    tokenizer, template = words(file)
    return {
        "vocabulary": {"model": tokenizer.model, "pre": tokenizer.pre, "size": size},
        "tokenizer": {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "stop": sorted(tokenizer.stop_ids)},
        "template": {
            "source": "ChatML default" if template.is_default else "model",
            "supports_system": template.supports_system,
            "supports_tools": template.supports_tools,
            "marks_reasoning": template.marks_reasoning,
        },
    }


def _tensors(weights: Weights) -> Iterator[tuple[str, str, int]]:
    """Name, type and stored bytes of every tensor, by type; experts of a bundle count as the tensors that they were."""
    file = weights.file
    if not isinstance(file, Bundle):
        for name, info in file.tensors.items():
            if not is_unused(weights.config, name):
                yield name, info.type.name, info.n_bytes
        return
    for name in weights.shapes:
        yield from ((name, format.name, n_bytes) for format, n_bytes in weights.sizes_of(name).items())


def _measured(bundle: Bundle) -> dict[str, Any]:
    """The bits of a bundle's experts, and its proof where it has one."""
    found: dict[str, Any] = {"bits": {**_bits(bundle.manifest), "chosen": dict(bundle.manifest.bits)}}
    if bundle.manifest.proof:
        found["proof"] = Proof.from_document(bundle.manifest.proof, f"{bundle.path}: its proof").as_document()
    return found


def _bits(manifest: Manifest) -> dict[str, Any]:
    """Bits per weight of experts, without their records' padding, and the share of weights by width and by format."""
    n_records = np.bincount(manifest.record_kind[manifest.record_kind >= 0].ravel(), minlength=len(manifest.kinds))
    weights: Counter[Format] = Counter()
    n_bytes: Counter[int] = Counter()  # by projection
    for n, parts in zip(n_records.tolist(), manifest.kinds, strict=True):
        for place, part in enumerate(parts):
            weights[part.format] += n * math.prod(part.shape)
            n_bytes[place] += n * part.n_bytes
    total = sum(weights.values())
    widths: Counter[str] = Counter()
    for format in sorted(weights, key=lambda format: (format.bits, format.name)):
        widths[f"{format.bits} bits"] += weights[format]
    return {
        "bits_per_weight": 8 * sum(n_bytes.values()) / total,
        **{name: 8 * len(PROJECTIONS) * n_bytes[place] / total for place, name in enumerate(PROJECTIONS)},
        "widths": {name: n / total for name, n in widths.items()},
        "formats": {format.name: n / total for format, n in weights.most_common()},
    }


def _ledger(needed: Needs, memory: str | int | float | None) -> dict[str, Any]:
    """The memory that a model takes under a budget, or all that it needs."""
    if memory is None:
        return replace(needed.plan(max(needed.work)), floor=needed.least_budget).as_dict()
    budget = budget_for(memory)
    plan = plan_memory(needed, budget)
    return {"budget": budget.n_bytes, **plan.as_dict(), **({"warning": plan.warning} if plan.warning else {})}


def _experts(config: ModelConfig, cold: int) -> dict[str, int] | None:
    if config.router is None:
        return None
    n_layers = len(config.expert_layers)
    count = config.router.n_expert * n_layers
    return {
        "count": config.router.n_expert,
        "used": config.router.top_k,
        "shared": int(config.d_shared > 0),
        "layers": n_layers,
        "bytes_each": cold // count,
        "working_set": cold // count * config.router.top_k * n_layers,
    }

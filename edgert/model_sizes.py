"""What a profile keeps of its model beside its experts: the configuration and the bytes that it takes to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgert.loading import Parts, name_of
from edgert.memory import WORD_BYTES
from edgert.needs import needs
from edgert.types import DeltaConfig, LatentConfig, LayerConfig, ModelConfig, RopeConfig, RouterConfig

_COUNTS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_value", "n_vocab", "n_context", "d_expert")
_PARTS = {"rope": RopeConfig, "router": RouterConfig, "latent": LatentConfig, "delta": DeltaConfig}
_MOST = 1 << 31


def model_sizes(parts: Parts) -> dict[str, Any]:
    """The sizes of a loaded model, as JSON can say them.

    hot: bytes of weights that always lie in RAM. words: entries of the tokenizer, tokens and merges.
    """
    needed = needs(parts.weights, parts.session.cache.n_context, "f16")
    return {
        "name": name_of(parts.file),
        "config": json.loads(json.dumps(asdict(parts.engine.config))),
        "hot": needed.hot,
        "words": needed.tokenizer // WORD_BYTES,
    }


def config_from(sizes: Mapping[str, Any]) -> ModelConfig | None:
    """The configuration that sizes name, whoever wrote them; None where it is none with a router."""
    try:
        values: dict[str, Any] = dict(sizes["config"])
        for name, kind in _PARTS.items():
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        values["layers"] = tuple(LayerConfig(**layer) for layer in values.get("layers", ()))
        values["temperature"] = tuple(values.get("temperature", (0.0, 1)))
        config = ModelConfig(**values)
        counts = [getattr(config, name) for name in _COUNTS] + [config.d_shared + 1, config.rope.n_rotated + 1]
    except (KeyError, TypeError, ValueError):
        return None
    is_sound = config.router is not None and all(type(count) is int and 0 < count < _MOST for count in counts)
    return config if is_sound and isinstance(config.architecture, str) else None

"""qwen3moe: Qwen3-30B-A3B and its family."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """q and k normed per head before the rotation; expert weights normalised; no shared expert."""
    common = keys.common()
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=keys.router(normalise=True),
        d_expert=keys.integer("expert_feed_forward_length"),
        qk_norm="head",
        attention_scale=common["d_head"] ** -0.5,
    )

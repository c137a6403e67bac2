"""qwen3moe: Qwen3-30B-A3B and its family."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """q and k normed per head before the rotation; expert weights normalised; no shared expert."""
    common, router = keys.common(), keys.router(normalise=True)
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=router,
        d_expert=keys.expert_width(router),
        qk_norm="head",
    )

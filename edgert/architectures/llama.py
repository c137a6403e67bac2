"""llama: Mixtral (with experts) and the dense Llama and Mistral family."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """Rotation in adjacent pairs; experts, where there are any, as wide as the dense network, weights normalised."""
    common = keys.common()
    common["attention_scale"] = keys.multiplier("attention.scale", common["attention_scale"])
    width = keys.integer("feed_forward_length")
    routed = keys.integer("expert_count", 0, least=0) > 0
    if not routed:
        keys.integer("expert_used_count", 0, least=0)
    return ModelConfig(
        **common,
        rope=keys.rope("norm", common["d_head"], whole_head=True),
        router=keys.router(normalise=True) if routed else None,
        d_expert=width if routed else 0,
        d_shared=0 if routed else width,
    )

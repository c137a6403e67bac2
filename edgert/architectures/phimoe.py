"""phimoe: Phi-3.5-MoE by Microsoft."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import ModelConfig


def config(keys: Keys) -> ModelConfig:
    """Norms and head with biases; rotation by two sets of divisors, one for contexts beyond the original.

    The norms are RMS norms times a weight plus a bias, as llama.cpp computes them, not the LayerNorm of the original.
    A sliding window is not used, nor is one there.
    """
    common = keys.common()
    keys.ignore("attention.sliding_window")
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"], longrope=True),
        router=keys.router(normalise=True),
        d_expert=keys.integer("feed_forward_length"),
        norm_bias=True,
    )

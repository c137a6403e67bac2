"""qwen3next: Qwen3-Next-80B-A3B."""

from __future__ import annotations

from edgert.architectures.keys import Keys
from edgert.types import DeltaConfig, LayerConfig, ModelConfig

NAMES = {"ffn_norm.weight": "post_attention_norm.weight"}


def config(keys: Keys, *, in_turn: bool = False) -> ModelConfig:
    """Gated delta nets, and in every fourth layer attention with a gate on what it gives; a gated shared expert.

    in_turn: whether value heads take the key heads in turn, see DeltaConfig; the one difference of qwen35moe.
    """
    common, router = keys.common(unused_layers=True), keys.router(normalise=True)
    delta = DeltaConfig(
        n_key_heads=keys.integer("ssm.group_count"),
        n_value_heads=keys.integer("ssm.time_step_rank"),
        d_state=keys.integer("ssm.state_size"),
        n_taps=keys.integer("ssm.conv_kernel", least=2),
        in_turn=in_turn,
    )
    if delta.n_value_heads % delta.n_key_heads:
        expected = f"a multiple of ssm.group_count = {delta.n_key_heads}"
        raise keys.wrong("ssm.time_step_rank", delta.n_value_heads, expected)
    if delta.d_state % 16:
        raise keys.unsupported("ssm.state_size", delta.d_state, "a multiple of 16")
    if (inner := keys.integer("ssm.inner_size")) != delta.d_values:
        raise keys.wrong("ssm.inner_size", inner, f"ssm.time_step_rank times ssm.state_size = {delta.d_values}")
    layers = [LayerConfig(mixer="delta" if one else "attention") for one in _recurrent(keys, common["n_layers"])]
    return ModelConfig(
        **common,
        rope=keys.rope("neox", common["d_head"]),
        router=router,
        d_expert=keys.expert_width(router),
        d_shared=keys.integer("expert_shared_feed_forward_length", 0, least=0) or keys.integer("feed_forward_length"),
        shared_gate=True,
        layers=tuple(layers),
        delta=delta,
        qk_norm="head",
        query_gate=True,
    )


def _recurrent(keys: Keys, n_layers: int) -> list[bool]:
    """Which layers are delta nets: newer files say it of each, others have attention in every so many-th."""
    interval = keys.integer("full_attention_interval", 4)
    layers = keys.each_layer(n_layers)
    if keys.has("attention.recurrent_layers"):
        return keys.booleans("attention.recurrent_layers", n_layers)
    return [(index + 1) % interval > 0 for index in layers]

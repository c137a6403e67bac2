"""deepseek2: DeepSeek V2, V2-Lite, V3 and R1, and others of their design, such as GLM-4.7-Flash."""

from __future__ import annotations

import math

from edgert.architectures.keys import Keys
from edgert.types import LatentConfig, ModelConfig, RopeConfig

OPTIONAL = frozenset({"exp_probs_b.bias"})
# Files of GLM-4.7-Flash do not say that they route by sigmoid: llama.cpp knows them by layers and vocabulary.
_GLM_FLASH = {(47, 154880), (48, 154880)}


def config(keys: Keys) -> ModelConfig:
    """Latent attention, in the form that keeps latent vectors in the cache, whichever form the file has.

    Scores grow with the factor and the magnitude of the rotation. Routing by softmax (V2, and where the file does not
    say) or by sigmoid with biases and groups (V3).
    """
    common, width = keys.common(unused_layers=True), keys.integer("expert_feed_forward_length")
    rank, n_rotated = keys.integer("attention.kv_lora_rank"), keys.integer("rope.dimension_count")
    d_key = keys.integer("attention.key_length_mla", common["d_head"])
    d_output = keys.integer("attention.value_length_mla", common["d_value"])
    if d_key <= n_rotated:
        raise keys.wrong("attention.key_length", d_key, f"more than rope.dimension_count = {n_rotated}")
    for key, n in (("attention.kv_lora_rank", rank), ("attention.value_length", d_output)):
        if n % 16:
            raise keys.unsupported(key, n, "a multiple of 16")
    common["n_kv_heads"], common["d_head"], common["d_value"] = 1, rank + n_rotated, rank
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)  # 0: none, as where the key is absent
    rope = keys.rope("norm", n_rotated, whole_head=True, yarn_magnitude=multiplier == 0)
    growth = _growth(rope, multiplier, keys.number("rope.scaling.attn_factor", 1.0))
    common["attention_scale"] = growth**2 * d_key**-0.5
    gating = 2 if (common["n_layers"], keys.integer("vocab_size", common["n_vocab"])) in _GLM_FLASH else 1
    return ModelConfig(
        **common,
        rope=rope,
        router=keys.router(normalise=None, gating=gating, gatings=(1, 2), scaled=True, biased=True),
        d_expert=width,
        d_shared=width * keys.integer("expert_shared_count", 0, least=0),
        d_dense=keys.integer("feed_forward_length"),
        layers=keys.dense_layers(common["n_layers"]),
        latent=LatentConfig(d_key - n_rotated, d_output, keys.integer("attention.q_lora_rank", 0, least=0)),
    )


def _growth(rope: RopeConfig, multiplier: float, attn_factor: float) -> float:
    """What a scaled rotation multiplies queries by, and keys. Formula: llama.cpp's src/models/deepseek2.cpp.

    There YaRN's own magnitude is undone and the multiplier's put in its place; without YaRN both are left.
    """
    if rope.scaling == "none":
        return attn_factor
    log = math.log(rope.factor)
    multiplied = 1.0 + 0.1 * (10.0 * multiplier) * log
    if rope.scaling == "yarn":
        return attn_factor * (multiplied if multiplier else 1.0 + 0.1 * max(log, 0.0))
    return attn_factor * (1.0 + 0.1 * log) * multiplied

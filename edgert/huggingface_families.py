"""The classes of `transformers` that edgert opens: what each is called in GGUF, and by which names its tensors go.

Adding a class is a row; what config.json says beyond the common keys is read by functions of huggingface_settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgert.huggingface_settings import deepseek_2_keys, deepseek_3_keys, gpt_oss_keys, multiplier_keys
from edgert.storage.json_file import JsonObject

_ATTENTION = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
    "self_attn.q_norm.weight": ("attn_q_norm.weight",),
    "self_attn.k_norm.weight": ("attn_k_norm.weight",),
} | {
    f"self_attn.{theirs}_proj.{kind}": (f"attn_{ours}.{kind}",)
    for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    for kind in ("weight", "bias")
}
_DENSE = {f"mlp.{part}_proj.weight": (f"ffn_{part}.weight",) for part in ("gate", "up", "down")}
_STACKED = {  # as transformers 5 has them in memory, and as some tools save them
    "mlp.gate.weight": ("ffn_gate_inp.weight",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}
_EXPERTS = _STACKED | {
    f"mlp.experts.{{e}}.{part}_proj.weight": (f"ffn_{part}_exps.weight",) for part in ("gate", "up", "down")
}
_MIXTRAL = _STACKED | {
    "block_sparse_moe.gate.weight": ("ffn_gate_inp.weight",),
    "block_sparse_moe.experts.{e}.w1.weight": ("ffn_gate_exps.weight",),
    "block_sparse_moe.experts.{e}.w3.weight": ("ffn_up_exps.weight",),
    "block_sparse_moe.experts.{e}.w2.weight": ("ffn_down_exps.weight",),
}
_SHARED = {
    f"mlp.shared_expert.{part}_proj.weight": (f"ffn_{part}_shexp.weight",) for part in ("gate", "up", "down")
} | {"mlp.shared_expert_gate.weight": ("ffn_gate_inp_shexp.weight",)}
_GRANITE = {
    "block_sparse_moe.router.layer.weight": ("ffn_gate_inp.weight",),
    "block_sparse_moe.input_linear.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "block_sparse_moe.output_linear.weight": ("ffn_down_exps.weight",),
    "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),  # this and the next two: as transformers 5 has them
    "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "block_sparse_moe.experts.down_proj": ("ffn_down_exps.weight",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "shared_mlp.output_linear.weight": ("ffn_down_shexp.weight",),
}
_GPT_OSS = {
    **{name: ours for name, ours in _ATTENTION.items() if "norm" not in name},
    "input_layernorm.weight": ("attn_norm.weight",),
    "post_attention_layernorm.weight": ("post_attention_norm.weight",),
    "self_attn.sinks": ("attn_sinks.weight",),
    "mlp.router.weight": ("ffn_gate_inp.weight",),
    "mlp.router.bias": ("ffn_gate_inp.bias",),
}
_DEEPSEEK = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "post_attention_layernorm.weight": ("ffn_norm.weight",),
    "self_attn.q_proj.weight": ("attn_q.weight",),
    "self_attn.q_a_proj.weight": ("attn_q_a.weight",),
    "self_attn.q_a_layernorm.weight": ("attn_q_a_norm.weight",),
    "self_attn.q_b_proj.weight": ("attn_q_b.weight",),
    "self_attn.kv_a_proj_with_mqa.weight": ("attn_kv_a_mqa.weight",),
    "self_attn.kv_a_layernorm.weight": ("attn_kv_a_norm.weight",),
    "self_attn.kv_b_proj.weight": ("attn_kv_b.weight",),  # rows of each head: keys, then values
    "self_attn.o_proj.weight": ("attn_output.weight",),
    "mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",),
    **{f"mlp.shared_experts.{part}_proj.weight": (f"ffn_{part}_shexp.weight",) for part in ("gate", "up", "down")},
    **_DENSE,
    **_EXPERTS,
}


@dataclass(frozen=True)
class Family:
    """What one class of `transformers` is in GGUF.

    names: a layer's tensors; two names on the right are the first and second half of the rows (of each expert); {e} is
    an expert's number. interleaves: GGUF turns neighbouring rows of q and k where `transformers` turns halves of a
    head. eps, base: the class's defaults. normalises: what `norm_topk_prob` must be, None where there is no such key.
    window: "asked": `sliding_window` counts with `use_sliding_window`, "counts": without too, "run": edgert has it.
    widths: of experts, GGUF's key, the class's and its default, None where it must be there. biases: of attention that
    all its models have. yarn: "scores": multiplies scores too, "unrounded": its ramp's ends need not be whole.
    has_unused_layers: further ones, that predict tokens beyond the next. quantised: how its weights may be, besides
    floats. deals_experts: stacked, with gate and up in turns, see huggingface_oss. keys: GGUF's metadata for what only
    this class has in config.json.
    """

    architecture: str
    names: Mapping[str, tuple[str, ...]] = field(repr=False)
    interleaves: bool = False
    eps: float = 1e-6
    base: float = 10_000.0
    normalises: bool | None = None
    window: Literal["asked", "counts", "run"] = "asked"
    routed: bool = True
    widths: tuple[tuple[str, str, int | None], ...] = ()
    biases: tuple[str, ...] = ()
    yarn: Literal["usual", "scores", "unrounded"] = "usual"
    has_unused_layers: bool = False
    quantised: str = ""
    deals_experts: bool = False
    keys: Callable[[JsonObject], dict[str, Any]] | None = None


_WIDTH = ("expert_feed_forward_length", "moe_intermediate_size", None)
_SHARED_WIDTH = "expert_shared_feed_forward_length"
_QKV = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_LLAMA = Family("llama", _ATTENTION | _DENSE, interleaves=True, routed=False)
_GRANITE_MOE = Family("granitemoe", _ATTENTION | _GRANITE, interleaves=True, keys=multiplier_keys)
_DEEPSEEK_2 = Family("deepseek2", _DEEPSEEK, yarn="scores", has_unused_layers=True, keys=deepseek_2_keys)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, window="counts"),
    "MixtralForCausalLM": Family("llama", _ATTENTION | _MIXTRAL, interleaves=True, eps=1e-5, base=1e6, window="counts"),
    "OlmoeForCausalLM": Family("olmoe", _ATTENTION | _EXPERTS, eps=1e-5, normalises=False),
    "Qwen2MoeForCausalLM": Family(
        "qwen2moe",
        _ATTENTION | _EXPERTS | _SHARED,
        normalises=False,
        widths=(_WIDTH, (_SHARED_WIDTH, "shared_expert_intermediate_size", None)),
        biases=_QKV,
    ),
    "Qwen3MoeForCausalLM": Family("qwen3moe", _ATTENTION | _EXPERTS, normalises=True, widths=(_WIDTH,)),
    "GraniteMoeForCausalLM": _GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": replace(_GRANITE_MOE, widths=((_SHARED_WIDTH, "shared_intermediate_size", 1024),)),
    "GptOssForCausalLM": Family(
        "gpt-oss",
        _GPT_OSS,
        eps=1e-5,
        base=150_000.0,
        window="run",
        biases=(*_QKV, "attn_output.bias"),
        yarn="unrounded",
        quantised="mxfp4",
        deals_experts=True,
        keys=gpt_oss_keys,
    ),
    "DeepseekV2ForCausalLM": _DEEPSEEK_2,
    "DeepseekV3ForCausalLM": replace(_DEEPSEEK_2, keys=deepseek_3_keys),
}

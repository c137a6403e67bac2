"""Which tensors a model has, by the names and shapes that edgert gives them: what files hold is brought to this.

Names follow GGUF. Matrices are (n_out, n_in); those of heads and those of experts stand one below the other, or are
stacked (n_expert, n_out, n_in). Everything else is a vector, also what files keep as small matrices.
"""

from __future__ import annotations

from edgert.types import ModelConfig

Shapes = dict[str, tuple[int, ...]]
EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
DIVISORS = "rope_freqs.weight"
SHORT_DIVISORS, LONG_DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight"


def model_tensors(c: ModelConfig) -> Shapes:
    """Tensors that belong to no layer, and must be there."""
    shapes: Shapes = {EMBEDDING: (c.n_vocab, c.d_model), FINAL_NORM: (c.d_model,)}
    if c.norm_bias:
        shapes |= {"output_norm.bias": (c.d_model,), "output.bias": (c.n_vocab,)}
    return shapes


def optional_model_tensors(c: ModelConfig) -> Shapes:
    """Those that may be there: a head of its own, and divisors of the rotation."""
    half = (c.rope.n_rotated // 2,)
    divisors = (SHORT_DIVISORS, LONG_DIVISORS) if c.rope.two_ranges else (DIVISORS,)
    return {HEAD: (c.n_vocab, c.d_model), **dict.fromkeys(divisors, half)}


def layer_tensors(c: ModelConfig, index: int) -> Shapes:
    """Tensors of a layer, without its prefix."""
    layer = c.layer(index)
    shapes: Shapes = {"attn_norm.weight": (c.d_model,), "ffn_norm.weight": (c.d_model,)}
    if c.norm_bias:
        shapes |= {"attn_norm.bias": (c.d_model,), "ffn_norm.bias": (c.d_model,)}
    if layer.mixer == "convolution":
        shapes |= _convolution(c)
    elif layer.mixer == "delta":
        shapes |= _delta(c)
    else:
        shapes |= _latent(c) if c.latent else _attention(c, index)
    if c.has_experts(index):
        shapes |= _experts(c)
    if width := c.d_always(index):
        suffix = "_shexp" if c.has_experts(index) else ""
        shapes |= {
            f"ffn_gate{suffix}.weight": (width, c.d_model),
            f"ffn_up{suffix}.weight": (width, c.d_model),
            f"ffn_down{suffix}.weight": (c.d_model, width),
        }
        if c.shared_gate and suffix:
            shapes["ffn_gate_inp_shexp.weight"] = (c.d_model,)
    return shapes


def optional_layer_tensors(c: ModelConfig, index: int) -> Shapes:
    """Those that may be there in any architecture: biases of attention's matrices."""
    if c.layer(index).mixer != "attention" or c.latent:
        return {}
    return {
        "attn_output.bias": (c.d_model,),
        "attn_q.bias": (c.n_heads * c.d_head,),
        "attn_k.bias": (c.n_kv_heads * c.d_head,),
        "attn_v.bias": (c.n_kv_heads * c.d_value,),
    }


def _attention(c: ModelConfig, index: int) -> Shapes:
    q, k, v = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value
    shapes: Shapes = {
        "attn_q.weight": (q, c.d_model),
        "attn_k.weight": (k, c.d_model),
        "attn_v.weight": (v, c.d_model),
        "attn_output.weight": (c.d_model, c.d_attended),
    }
    if c.query_gate:
        shapes["attn_q_gate.weight"] = (c.d_attended, c.d_model)
    if c.sinks:
        shapes["attn_sinks.weight"] = (c.n_heads,)
    if c.layer(index).normed and c.qk_norm in ("head", "vector"):
        widths = (c.d_head, c.d_head) if c.qk_norm == "head" else (q, k)
        shapes |= {f"attn_{name}_norm.weight": (width,) for name, width in zip("qk", widths, strict=True)}
    return shapes


def _latent(c: ModelConfig) -> Shapes:
    assert c.latent is not None
    latent, n_rotated = c.latent, c.rope.n_rotated
    queries = c.n_heads * (latent.d_plain + n_rotated)
    shapes: Shapes = {
        "attn_kv_a_mqa.weight": (c.d_value + n_rotated, c.d_model),  # the latent vector, then the rotated part
        "attn_kv_a_norm.weight": (c.d_value,),
        "attn_k_b.weight": (c.n_heads * c.d_value, latent.d_plain),
        "attn_v_b.weight": (c.n_heads * latent.d_output, c.d_value),
        "attn_output.weight": (c.d_model, c.d_attended),
    }
    if not latent.query_rank:
        return shapes | {"attn_q.weight": (queries, c.d_model)}  # of each head the plain part, then the rotated one
    return shapes | {
        "attn_q_a.weight": (latent.query_rank, c.d_model),
        "attn_q_a_norm.weight": (latent.query_rank,),
        "attn_q_b.weight": (queries, latent.query_rank),
    }


def _convolution(c: ModelConfig) -> Shapes:
    return {
        "shortconv.in_proj.weight": (3 * c.d_model, c.d_model),
        "shortconv.conv.weight": (c.d_model * c.n_taps,),  # of each channel its taps
        "shortconv.out_proj.weight": (c.d_model, c.d_model),
    }


def _delta(c: ModelConfig) -> Shapes:
    assert c.delta is not None
    d = c.delta
    return {
        "attn_qkv.weight": (d.d_channels, c.d_model),
        "attn_gate.weight": (d.d_values, c.d_model),
        "ssm_beta.weight": (d.n_value_heads, c.d_model),
        "ssm_alpha.weight": (d.n_value_heads, c.d_model),
        "ssm_conv1d.weight": (d.d_channels * d.n_taps,),  # of each channel its taps
        "ssm_dt.bias": (d.n_value_heads,),
        "ssm_a": (d.n_value_heads,),
        "ssm_norm.weight": (d.d_state,),
        "ssm_out.weight": (c.d_model, d.d_values),
    }


def _experts(c: ModelConfig) -> Shapes:
    assert c.router is not None
    e, f = c.router.n_expert, c.d_expert
    shapes: Shapes = {
        "ffn_gate_inp.weight": (e, c.d_model),
        "ffn_gate_exps.weight": (e, f, c.d_model),
        "ffn_up_exps.weight": (e, f, c.d_model),
        "ffn_down_exps.weight": (e, c.d_model, f),
    }
    if c.router.biased:
        shapes["exp_probs_b.bias"] = (e,)
    if c.expert_bias:
        shapes |= {
            "ffn_gate_inp.bias": (e,),
            "ffn_gate_exps.bias": (e * f,),  # one expert's after the other's
            "ffn_up_exps.bias": (e * f,),
            "ffn_down_exps.bias": (e * c.d_model,),
        }
    return shapes

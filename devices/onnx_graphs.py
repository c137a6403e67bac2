"""The graphs of a model: attention with routing, an expert, the weighted sum of experts, and the head.

Shapes are those of the Device seam: n tokens, t positions; each is a number, or a name where it changes with each run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.base import AttentionWeights, ExpertWeights, LayerWeights, Linear, Norm
from edgert.devices.onnx_builder import Graph, Size
from edgert.devices.onnx_quantised import Rounding
from edgert.devices.onnx_runtime import Model
from edgert.devices.onnx_weights import half_split
from edgert.devices.routing import SMALLEST_SUM
from edgert.types import Floats, ModelConfig


# ---- a layer's first half --------------------------------------------------------------------------------------------
def residual(g: Graph, c: ModelConfig, before: LayerWeights | None, n: Size) -> str:
    """The residual stream (n, d_model) after the layer before, whose feed-forward half is added here.

    Inputs: x; total, the weighted sum of its experts, and shared, the shared expert's or dense network's output.
    """
    x = g.input("x", np.float32, n, c.d_model)
    parts = []
    if before is not None and before.router is not None:
        parts.append(g.input("total", np.float32, n, c.d_model))
    if before is not None and before.shared is not None:
        parts.append(g.input("shared", np.float32, n, c.d_model))
    if not parts:
        return x
    added = parts[0] if len(parts) == 1 else g.op("Add", *parts)
    return g.op("Add", x, g.scaled(added, c.residual_scale))


def attention_graph(
    c: ModelConfig,
    weights: LayerWeights,
    before: LayerWeights | None,
    kv_dtype: Any,
    *,
    exact: bool,
    n: Size = "n",
    t: Size = "t",
    rounding: Rounding | None = None,
) -> Model:
    """A layer up to its experts: what the layer before left, norm, attention, residual, norm, shared expert, routes.

    Inputs: those of `residual`; cosines, sines (n, n_rotated / 2); positions int64 (n, 1); mask (n, t), added to the
    scores; keys (t, n_kv_heads, d_head) and values (t, n_kv_heads, d_value) of all positions up to the last, of which
    this graph makes the last n. Outputs: new_keys, new_values, the same memory; new_x and normed (n, d_model);
    new_shared (n, d_model); ids int64 and weights (n, top_k), best first.
    """
    g = Graph(exact=exact, rounding=rounding)
    x = residual(g, c, before, n)
    mixer = weights.mixer
    assert isinstance(mixer, AttentionWeights), "a device of ONNX Runtime is refused for other models"
    normed = g.norm(x, weights.mixer_norm.weight, c.eps)
    out = _attention(g, c, mixer, normed, kv_dtype, (n, t))
    new_x = g.op("Add", x, _scaled_product(g, out, mixer.output, c.residual_scale), name="new_x")
    g.output(new_x, np.float32, n, c.d_model)
    normed = g.op("Identity", g.norm(new_x, weights.feed_forward_norm.weight, c.eps), name="normed")
    g.output(normed, np.float32, n, c.d_model)
    if weights.shared is not None:
        _, shared = g.network(normed, weights.shared, c.activation)
        if weights.shared_gate is not None:
            shared = g.op("Mul", shared, g.op("Sigmoid", g.exact_product(normed, weights.shared_gate)))
        g.output(g.op("Identity", shared, name="new_shared"), np.float32, n, c.d_model)
    if weights.router is not None:
        _routes(g, c, g.exact_product(normed, weights.router.matrix), n)
    return g.model()


def _attention(
    g: Graph, c: ModelConfig, weights: AttentionWeights, normed: str, kv_dtype: Any, sizes: tuple[Size, Size]
) -> str:
    """Attention of the chunk, (n, n_heads d_value); keys and values are written into the cache."""
    tokens, t = sizes
    rotated, kv, group = c.rope.n_rotated, c.n_kv_heads, c.n_heads // c.n_kv_heads
    cosines, sines = (g.input(name, np.float32, tokens, rotated // 2) for name in ("cosines", "sines"))
    angles = [g.op("Unsqueeze", one, g.constant(np.array([1], np.int64))) for one in (cosines, sines)]
    positions, mask = g.input("positions", np.int64, tokens, 1), g.input("mask", np.float32, tokens, t)
    query = _heads(g, c, normed, weights.query, weights.query_norm, c.n_heads, angles)
    key = _heads(g, c, normed, weights.key, weights.key_norm, kv, angles)
    value = g.shape(g.linear(normed, weights.value), -1, kv, c.d_value)
    whole = []
    for name, rows, width in (("keys", key, c.d_head), ("values", value, c.d_value)):
        cache = g.input(name, kv_dtype, t, kv, width)
        rows = rows if kv_dtype == np.float32 else g.cast(rows, kv_dtype)
        written = g.op("ScatterND", cache, positions, rows, name=f"new_{name}")
        g.output(written, kv_dtype, t, kv, width)
        whole.append(written if kv_dtype == np.float32 else g.cast(written, np.float32))
    # (n, kv, group, d) -> (kv, group, n, d), the heads that share keys side by side
    by_key = g.op("Transpose", g.shape(query, -1, kv, group, c.d_head), perm=[1, 2, 0, 3])
    rows = g.shape(by_key, kv, -1, c.d_head)
    scores = g.op("MatMul", rows, g.op("Transpose", whole[0], perm=[1, 2, 0]))  # (kv, group n, t)
    n_and_t = g.op("Shape", mask)
    heads = g.constant(np.array([kv, group], np.int64))
    apart = g.op("Reshape", g.scaled(scores, c.attention_scale), g.op("Concat", heads, n_and_t, axis=0))
    shares = g.op("Softmax", g.op("Add", apart, mask), axis=-1)
    together = g.op("Reshape", shares, g.op("Shape", scores))
    out = g.op("MatMul", together, g.op("Transpose", whole[1], perm=[1, 0, 2]))  # (kv, group n, d_value)
    n = g.op("Shape", mask, start=0, end=1)
    shape = g.op("Concat", heads, n, g.constant(np.array([c.d_value], np.int64)), axis=0)
    by_token = g.op("Transpose", g.op("Reshape", out, shape), perm=[2, 0, 1, 3])
    return g.shape(by_token, -1, c.n_heads * c.d_value)


def _heads(
    g: Graph, c: ModelConfig, normed: str, linear: Linear, norm: Floats | None, n_heads: int, angles: list[str]
) -> str:
    """Queries or keys: projected, normed and rotated, (n, n_heads, d_head); pairs of a rotation half of it apart."""
    order = half_split(n_heads, c.d_head, c.rope.n_rotated) if c.rope.kind == "norm" else None
    rows = g.linear(normed, linear, order)
    if norm is not None and order is not None:
        norm = norm[order[: len(norm)]]
    if c.qk_norm == "vector" and norm is not None:
        rows = g.norm(rows, norm, c.eps)
    heads = g.shape(rows, -1, n_heads, c.d_head)
    if c.qk_norm == "head" and norm is not None:
        heads = g.norm(heads, norm, c.eps)
    half = c.rope.n_rotated // 2
    sizes = [half, half] + ([c.d_head - 2 * half] if c.d_head > 2 * half else [])
    parts = g.split(heads, sizes)
    first, second, (cos, sin) = parts[0], parts[1], angles
    turned = (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", first, sin), g.op("Mul", second, cos)),
    )
    return g.op("Concat", *turned, *parts[2:], axis=-1)


def _scaled_product(g: Graph, x: str, linear: Linear, scale: float) -> str:
    """A product times a constant, by which the input is multiplied: of one behind 4-bit weights OpenVINO 1.24 makes
    nonsense, off by twice the size of the result."""
    bias = None if linear.bias is None else linear.bias * np.float32(scale)
    return g.product(g.scaled(x, scale), linear.matrix, bias)


def _routes(g: Graph, c: ModelConfig, scores: str, n: Size) -> None:
    """From scores (n, n_expert) to the outputs ids and weights (n, top_k)."""
    r = c.router
    assert r is not None
    shares = g.op("Softmax", scores, axis=-1) if r.gating == "softmax" else g.op("Sigmoid", scores)
    top_k = g.constant(np.array([r.top_k], np.int64))
    chosen, ids = g.ops("TopK", shares, top_k, names=("chosen", "ids"), axis=-1)  # ties: the lower id first
    if r.normalise:
        total = g.op("ReduceSum", chosen, g.constant(np.array([-1], np.int64)), keepdims=1)
        chosen = g.op("Div", chosen, g.op("Max", total, g.scalar(float(SMALLEST_SUM))))
    chosen = g.op("Mul", chosen, g.scalar(r.scale), name="weights")
    g.output(ids, np.int64, n, r.top_k)
    g.output(chosen, np.float32, n, r.top_k)


# ---- experts and head ------------------------------------------------------------------------------------------------
def expert_graph(
    c: ModelConfig,
    weights: ExpertWeights,
    *,
    exact: bool,
    open_weights: bool = False,
    n: Size = "n",
    rows: Size = "rows",
    rounding: Rounding | None = None,
) -> Model:
    """One expert. Inputs: normed (n, d_model), tokens int64 (rows,); with open_weights, all its weights, by name.

    Outputs: hidden (rows, d_expert), out (rows, d_model).
    """
    g = Graph(exact=exact, open_weights=open_weights, rounding=rounding)
    x = g.op("Gather", g.input("normed", np.float32, n, c.d_model), g.input("tokens", np.int64, rows))
    hidden, out = g.network(x, weights, c.activation)
    g.output(g.op("Identity", hidden, name="hidden"), np.float32, rows, c.d_expert)
    g.output(g.op("Identity", out, name="out"), np.float32, rows, c.d_model)
    return g.model()


def sum_graph(c: ModelConfig, n: Size = "n", pairs: Size = "pairs") -> Model:
    """Experts' outputs added up, weighted.

    Inputs: outputs (pairs, d_model), places int64 (n, top_k) of a token's outputs among them, weights (n, top_k).
    Output: total (n, d_model).
    """
    assert c.router is not None
    g, top_k = Graph(exact=True), c.router.top_k
    outputs, places = g.input("outputs", np.float32, pairs, c.d_model), g.input("places", np.int64, n, top_k)
    axis = g.constant(np.array([1], np.int64))
    weights = g.op("Unsqueeze", g.input("weights", np.float32, n, top_k), axis)  # (n, 1, top_k)
    total = g.op("MatMul", weights, g.op("Gather", outputs, places))
    g.output(g.op("Squeeze", total, axis, name="total"), np.float32, n, c.d_model)
    return g.model()


def head_graph(
    c: ModelConfig,
    norm: Norm,
    output: Linear,
    last: LayerWeights | None,
    *,
    exact: bool,
    n: Size = "n",
    rounding: Rounding | None = None,
) -> Model:
    """Inputs: those of `residual`, of the last layer. Output: logits (n, n_vocab)."""
    g = Graph(exact=exact, rounding=rounding)
    x = g.norm(residual(g, c, last, n), norm.weight, c.eps)
    g.output(g.op("Identity", _scaled_product(g, x, output, c.logit_scale), name="logits"), np.float32, n, c.n_vocab)
    return g.model()


def copy_graph(d_model: int) -> Model:
    """y = x, a row (1, d_model)."""
    g = Graph(exact=True)
    g.output(g.op("Identity", g.input("x", np.float32, 1, d_model), name="y"), np.float32, 1, d_model)
    return g.model()

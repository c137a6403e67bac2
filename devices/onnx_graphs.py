"""The graphs of a model: attention with routing, an expert, the weighted sum of experts, and the head.

Built with the `onnx` package, as operators that every ONNX Runtime since 1.17 has; only products with low-bit weights
are one of ONNX Runtime's own, MatMulNBits. Shapes are those of the Device seam: n tokens, t positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.base import ExpertWeights, LayerWeights, Linear
from edgert.devices.onnx_runtime import Array, Model
from edgert.devices.onnx_weights import blocks, floats, half_split
from edgert.devices.routing import SMALLEST_SUM
from edgert.quant.formats import MatrixSource
from edgert.quant.reference import GELU_CUBE, GELU_SCALE, OSS_ALPHA, OSS_LIMIT
from edgert.types import Floats, Ids, ModelConfig

_OPSET, _IR_VERSION = 18, 8  # what ONNX Runtime 1.14 and newer read
_INLINE_BYTES = 1024  # smaller constants stand in the graph
_INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level: inputs may be rounded to 8 bits; 1: products of float32


class Graph:
    """A graph under construction; values are known by their names."""

    def __init__(self, *, exact: bool, open_weights: bool = False) -> None:
        """exact: inputs are not rounded to 8 bits. open_weights: those of products are inputs, not constants."""
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._constants: list[Any] = []
        self._weights: dict[str, Array] = {}
        self._sums: dict[tuple[str, int], str] = {}  # of each block of an input, by its name and the block's size
        self._exact, self._open_weights, self._n_names = exact, open_weights, 0

    def _name(self) -> str:
        self._n_names += 1
        return f"v{self._n_names}"

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """A node with one output; its name."""
        return self.ops(kind, *inputs, names=(name or self._name(),), domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, names: tuple[str, ...], domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """A node with several outputs; their names."""
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def input(self, name: str, dtype: Any, *shape: int | str) -> str:
        """An input; names in the shape are sizes that change."""
        self._inputs.append(_described(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, *shape: int | str) -> None:
        """Makes a value that there is an output."""
        self._outputs.append(_described(name, dtype, shape))

    def constant(self, array: Array) -> str:
        """A constant or weight; large ones are handed to the session beside the graph."""
        from onnx import TensorProto, helper, numpy_helper

        name, array = self._name(), np.ascontiguousarray(array)
        if array.nbytes <= _INLINE_BYTES:
            self._constants.append(numpy_helper.from_array(array, name))
            return name
        self._weights[name] = array
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
        self._constants.append(tensor)
        return name

    def weight(self, array: Array) -> str:
        """Weights of a product."""
        if not self._open_weights:
            return self.constant(array)
        name = self.input(f"weights{len(self._weights)}", array.dtype, *array.shape)
        self._weights[name] = np.ascontiguousarray(array)
        return name

    def model(self) -> Model:
        """The whole, ready for a session."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, "edgert", self._inputs, self._outputs, self._constants)
        sets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        made = helper.make_model(graph, opset_imports=sets, ir_version=_IR_VERSION)
        return Model(made.SerializeToString(), self._weights)

    # ---- parts of several nodes --------------------------------------------------------------------------------------
    def cast(self, value: str, dtype: Any) -> str:
        """A value in another type."""
        from onnx import helper

        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def split(self, value: str, sizes: list[int]) -> tuple[str, ...]:
        """A value cut into parts of these sizes along its last axis."""
        parts = tuple(self._name() for _ in sizes)
        return self.ops("Split", value, self.constant(np.array(sizes, np.int64)), names=parts, axis=-1)

    def scalar(self, value: float) -> str:
        """A float32 constant."""
        return self.constant(np.array(value, np.float32))

    def shape(self, value: str, *sizes: int) -> str:
        """A value in another shape; one size may be -1, and 0 keeps a size."""
        return self.op("Reshape", value, self.constant(np.array(sizes, np.int64)))

    def scaled(self, value: str, scale: float) -> str:
        """A value times a constant."""
        return value if scale == 1.0 else self.op("Mul", value, self.scalar(scale))

    def norm(self, x: str, weight: Floats, eps: float) -> str:
        """RMS norm over the last axis, in the form that ONNX Runtime knows and fuses."""
        square = self.op("Pow", x, self.scalar(2.0))
        mean = self.op("ReduceMean", square, self.constant(np.array([-1], np.int64)), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.scalar(eps)))
        return self.op("Mul", self.op("Div", x, root), self.constant(weight))

    def product(self, x: str, matrix: MatrixSource, bias: Floats | None = None, rows: Ids | None = None) -> str:
        """x (n, n_in) times a matrix (n_out, n_in), plus a bias: (n, n_out). rows: of the matrix, in that order."""
        bias = bias if bias is None or rows is None else bias[rows]
        added = () if bias is None else (self.constant(bias),)
        if not matrix.format.is_integer:
            return self.op("Gemm", x, self.weight(floats(matrix, rows)), *added, transB=1)
        w = blocks(matrix, rows)
        n_out, n_in = matrix.shape
        y = self.op(
            "MatMulNBits",
            x,
            self.weight(w.integers),
            self.weight(w.scales),
            domain="com.microsoft",
            K=n_in,
            N=n_out,
            bits=w.bits,
            block_size=w.block,
            accuracy_level=1 if self._exact else _INT8_PRODUCTS,
        )
        if w.minima is not None:
            sums = self._block_sums(x, w.block)
            y = self.op("Add", y, self.op("Gemm", sums, self.weight(w.minima), transB=1))
        return y if bias is None else self.op("Add", y, *added)

    def _block_sums(self, x: str, block: int) -> str:
        """Sums of each block of the last axis: (n, n_in / block)."""
        if (x, block) not in self._sums:
            parts = self.op("Reshape", x, self.constant(np.array([0, -1, block], np.int64)))
            self._sums[x, block] = self.op("ReduceSum", parts, self.constant(np.array([-1], np.int64)), keepdims=0)
        return self._sums[x, block]

    def linear(self, x: str, linear: Linear, rows: Ids | None = None) -> str:
        """The same of a Linear."""
        return self.product(x, linear.matrix, linear.bias, rows)

    def activated(self, gate: str, up: str, activation: str) -> str:
        """A gated unit; formulas as in quant.reference.activate."""
        if activation == "swiglu-oss":
            high, low = self.scalar(OSS_LIMIT), self.scalar(-OSS_LIMIT)
            gate, up = self.op("Min", gate, high), self.op("Clip", up, low, high)
            up = self.op("Add", up, self.scalar(1.0))
            inner = self.scaled(gate, float(OSS_ALPHA))
        elif activation == "gelu":
            cube = self.op("Mul", self.op("Mul", gate, gate), gate)
            inner = self.scaled(self.op("Add", gate, self.scaled(cube, float(GELU_CUBE))), float(GELU_SCALE))
        else:
            inner = gate
        return self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", inner)), up)

    def network(self, x: str, weights: ExpertWeights, activation: str) -> tuple[str, str]:
        """What gate and up make of x, (n, d_ff), and what down makes of that, (n, d_model)."""
        gate, up = self.product(x, weights.gate), self.product(x, weights.up)
        hidden = self.activated(gate, up, activation)
        return hidden, self.product(hidden, weights.down)


def _described(name: str, dtype: Any, shape: tuple[int | str, ...]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


# ---- a layer's first half --------------------------------------------------------------------------------------------
def residual(g: Graph, c: ModelConfig, before: LayerWeights | None) -> str:
    """The residual stream (n, d_model) after the layer before, whose feed-forward half is added here.

    Inputs: x; total, the weighted sum of its experts, and shared, the shared expert's or dense network's output.
    """
    x = g.input("x", np.float32, "n", c.d_model)
    parts = []
    if before is not None and before.router is not None:
        parts.append(g.input("total", np.float32, "n", c.d_model))
    if before is not None and before.shared is not None:
        parts.append(g.input("shared", np.float32, "n", c.d_model))
    if not parts:
        return x
    added = parts[0] if len(parts) == 1 else g.op("Add", *parts)
    return g.op("Add", x, g.scaled(added, c.residual_scale))


def attention_graph(
    c: ModelConfig, weights: LayerWeights, before: LayerWeights | None, kv_dtype: Any, *, exact: bool
) -> Model:
    """A layer up to its experts: what the layer before left, norm, attention, residual, norm, shared expert, routes.

    Inputs: those of `residual`; cosines, sines (n, n_rotated / 2); positions int64 (n, 1); mask (n, t), added to the
    scores; keys (t, n_kv_heads, d_head) and values (t, n_kv_heads, d_value) of all positions up to the last, of which
    this graph makes the last n. Outputs: new_keys, new_values, the same memory; new_x and normed (n, d_model);
    new_shared (n, d_model); ids int64 and weights (n, top_k), best first.
    """
    g = Graph(exact=exact)
    x = residual(g, c, before)
    normed = g.norm(x, weights.attention_norm, c.eps)
    out = _attention(g, c, weights, normed, kv_dtype)
    attended = g.scaled(g.linear(out, weights.output), c.residual_scale)
    new_x = g.op("Add", x, attended, name="new_x")
    g.output(new_x, np.float32, "n", c.d_model)
    normed = g.op("Identity", g.norm(new_x, weights.feed_forward_norm, c.eps), name="normed")
    g.output(normed, np.float32, "n", c.d_model)
    if weights.shared is not None:
        _, shared = g.network(normed, weights.shared, c.activation)
        if weights.shared_gate is not None:
            shared = g.op("Mul", shared, g.op("Sigmoid", g.product(normed, weights.shared_gate)))
        g.output(g.op("Identity", shared, name="new_shared"), np.float32, "n", c.d_model)
    if weights.router is not None:
        _routes(g, c, g.product(normed, weights.router))
    return g.model()


def _attention(g: Graph, c: ModelConfig, weights: LayerWeights, normed: str, kv_dtype: Any) -> str:
    """Attention of the chunk, (n, n_heads d_value); keys and values are written into the cache."""
    rotated, kv, group = c.rope.n_rotated, c.n_kv_heads, c.n_heads // c.n_kv_heads
    cosines, sines = (g.input(name, np.float32, "n", rotated // 2) for name in ("cosines", "sines"))
    angles = [g.op("Unsqueeze", one, g.constant(np.array([1], np.int64))) for one in (cosines, sines)]
    positions, mask = g.input("positions", np.int64, "n", 1), g.input("mask", np.float32, "n", "t")
    query = _heads(g, c, normed, weights.query, weights.query_norm, c.n_heads, angles)
    key = _heads(g, c, normed, weights.key, weights.key_norm, kv, angles)
    value = g.shape(g.linear(normed, weights.value), -1, kv, c.d_value)
    whole = []
    for name, rows, width in (("keys", key, c.d_head), ("values", value, c.d_value)):
        cache = g.input(name, kv_dtype, "t", kv, width)
        rows = rows if kv_dtype == np.float32 else g.cast(rows, kv_dtype)
        written = g.op("ScatterND", cache, positions, rows, name=f"new_{name}")
        g.output(written, kv_dtype, "t", kv, width)
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
    sizes = g.op("Concat", heads, n, g.constant(np.array([c.d_value], np.int64)), axis=0)
    by_token = g.op("Transpose", g.op("Reshape", out, sizes), perm=[2, 0, 1, 3])
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


def _routes(g: Graph, c: ModelConfig, scores: str) -> None:
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
    g.output(ids, np.int64, "n", r.top_k)
    g.output(chosen, np.float32, "n", r.top_k)


# ---- experts and head ------------------------------------------------------------------------------------------------
def expert_graph(c: ModelConfig, weights: ExpertWeights, *, exact: bool, open_weights: bool = False) -> Model:
    """One expert. Inputs: normed (n, d_model), tokens int64 (rows,); with open_weights, all its weights, by name.

    Outputs: hidden (rows, d_expert), out (rows, d_model).
    """
    g = Graph(exact=exact, open_weights=open_weights)
    x = g.op("Gather", g.input("normed", np.float32, "n", c.d_model), g.input("tokens", np.int64, "rows"))
    hidden, out = g.network(x, weights, c.activation)
    g.output(g.op("Identity", hidden, name="hidden"), np.float32, "rows", c.d_expert)
    g.output(g.op("Identity", out, name="out"), np.float32, "rows", c.d_model)
    return g.model()


def sum_graph(c: ModelConfig) -> Model:
    """Experts' outputs added up, weighted.

    Inputs: outputs (pairs, d_model), places int64 (n, top_k) of a token's outputs among them, weights (n, top_k).
    Output: total (n, d_model).
    """
    assert c.router is not None
    g, top_k = Graph(exact=True), c.router.top_k
    outputs, places = g.input("outputs", np.float32, "pairs", c.d_model), g.input("places", np.int64, "n", top_k)
    axis = g.constant(np.array([1], np.int64))
    weights = g.op("Unsqueeze", g.input("weights", np.float32, "n", top_k), axis)  # (n, 1, top_k)
    total = g.op("MatMul", weights, g.op("Gather", outputs, places))
    g.output(g.op("Squeeze", total, axis, name="total"), np.float32, "n", c.d_model)
    return g.model()


def head_graph(c: ModelConfig, norm: Floats, output: Linear, last: LayerWeights, *, exact: bool) -> Model:
    """Inputs: those of `residual`, of the last layer. Output: logits (n, n_vocab)."""
    g = Graph(exact=exact)
    logits = g.linear(g.norm(residual(g, c, last), norm, c.eps), output)
    g.output(g.op("Mul", logits, g.scalar(c.logit_scale), name="logits"), np.float32, "n", c.n_vocab)
    return g.model()

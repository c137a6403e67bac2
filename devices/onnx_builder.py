"""A graph under construction: nodes, constants and weights, and the parts that several graphs share.

Built with the `onnx` package, as operators that every ONNX Runtime since 1.17 has; only products with low-bit weights
are one of ONNX Runtime's own, MatMulNBits. Knows of matrices and activations, and nothing of layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.base import ExpertWeights, Linear
from edgert.devices.onnx_quantised import Rounding, int8_rows
from edgert.devices.onnx_runtime import Array, Model
from edgert.devices.onnx_weights import blocks, floats
from edgert.quant.formats import MatrixSource
from edgert.quant.reference import GELU_CUBE, GELU_SCALE, OSS_ALPHA, OSS_LIMIT
from edgert.types import Floats, Ids

Size = int | str  # of a dimension; a name is a size that changes

_OPSET, _IR_VERSION = 18, 8  # what ONNX Runtime 1.14 and newer read
_INLINE_BYTES = 1024  # smaller constants stand in the graph
_INT8_PRODUCTS = 4  # MatMulNBits' accuracy_level: inputs may be rounded to 8 bits; 1: products of float32


class Graph:
    """A graph under construction; values are known by their names."""

    def __init__(self, *, exact: bool, open_weights: bool = False, rounding: Rounding | None = None) -> None:
        """exact: inputs are not rounded to 8 bits. open_weights: those of products are inputs, not constants.
        rounding: where values are rounded, or only watched; None: nowhere."""
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._constants: list[Any] = []
        self._weights: dict[str, Array] = {}
        self._sums: dict[tuple[str, int], str] = {}  # of each block of an input, by its name and the block's size
        self._exact, self._open_weights, self._rounding, self._n_names = exact, open_weights, rounding, 0

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

    def constant(self, array: Array, *, beside: bool = False) -> str:
        """A constant or weight; large ones are handed to the session beside the graph, and others if that is asked."""
        from onnx import TensorProto, helper, numpy_helper

        name, array = self._name(), np.ascontiguousarray(array)
        if array.nbytes <= _INLINE_BYTES and not beside:
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

        if self._rounding is not None and self._rounding.watching:
            self._show_ranges(self._rounding.watched)
        graph = helper.make_graph(self._nodes, "edgert", self._inputs, self._outputs, self._constants)
        sets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        made = helper.make_model(graph, opset_imports=sets, ir_version=_IR_VERSION)
        return Model(made.SerializeToString(), self._weights)

    def _show_ranges(self, watched: list[str]) -> None:
        """Add the output `ranges` (n_places, 2): the least and the largest of each of these values."""
        ends = [self.op(kind, value, keepdims=0) for value in watched for kind in ("ReduceMin", "ReduceMax")]
        ends = [self.shape(end, 1) for end in ends]
        shape = self.constant(np.array([-1, 2], np.int64))
        shown = self.op("Reshape", self.op("Concat", *ends, axis=0), shape, name="ranges")
        self.output(shown, np.float32, len(watched), 2)

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
        """x (n, n_in) times a matrix (n_out, n_in), plus a bias: (n, n_out). rows: of the matrix, in that order.

        Where there is rounding, x and what comes of it are rounded.
        """
        bias = bias if bias is None or rows is None else bias[rows]
        if self._rounding is None:
            return self.exact_product(x, matrix, bias, rows)
        if self._rounding.watching:
            y = self.exact_product(x, matrix, bias, rows)
            self._rounding.watched += (x, y)
            return y
        return self._int8_product(self._rounding, x, floats(matrix, rows), bias)

    def _int8_product(self, rounding: Rounding, x: str, weights: Floats, bias: Floats | None) -> str:
        """With 8-bit weights that have a scale a row, of inputs that are rounded to what was seen of them."""
        integers, scales = int8_rows(weights)
        zeros = np.zeros(len(scales), np.int8)
        parts = (self.constant(array, beside=True) for array in (integers, scales, zeros))
        weight = self.op("DequantizeLinear", *parts, axis=0)
        into, out = rounding.next(), rounding.next()
        x = self._rounded(x, *into)
        y = self.op("Gemm", x, weight, *(() if bias is None else (self.constant(bias),)), transB=1)
        return self._rounded(y, *out) if rounding.outputs else y

    def _rounded(self, value: str, scale: float, zero: Any) -> str:
        """A value as integers stand for it."""
        domain = "" if zero.dtype.itemsize == 1 else "com.microsoft"  # 16 bits are there since operator set 21 only
        how = (self.scalar(scale), self.constant(np.array(zero)))
        integers = self.op("QuantizeLinear", value, *how, domain=domain)
        return self.op("DequantizeLinear", integers, *how, domain=domain)

    def exact_product(self, x: str, matrix: MatrixSource, bias: Floats | None = None, rows: Ids | None = None) -> str:
        """The same with the weights as they are, and a bias in the order of `rows`; nothing is rounded on purpose."""
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

"""What a provider does beside what it was told: where it runs a graph's nodes, and in which precision it multiplies.

A provider takes the nodes that it can, and ONNX Runtime gives the others to the CPU without a word: its profiler, in a
run on zeros, says which. Some compute in bf16 or TF32 where a processor has it: a product of floats says so.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.devices.onnx_builder import Graph
from edgert.devices.onnx_runtime import Model, Settings, session

_SIZES = {"n": 3, "t": 5, "rows": 2, "pairs": 4}  # of a run, by the names that sizes have in graphs
_COPIES = ("MemcpyToHost", "MemcpyFromHost")


def fallen(graphs: Iterable[bytes], settings: Settings) -> Counter[str]:
    """Operators of these graphs that another provider ran, as "Gemm on CPUExecutionProvider", and how many.

    Arithmetic with shapes does not count: providers with a memory of their own leave it to the CPU on purpose.
    DeviceError: a graph is not taken at all.
    """
    found: Counter[str] = Counter()
    for graph in graphs:
        for operator, provider, types in _nodes(graph, settings):
            about_shapes = all(kind == "int64" for kind in types) and operator not in _COPIES
            if provider != settings.provider.full_name and not about_shapes:
                found[f"{operator} on {provider}"] += 1
    return found


def product_error(settings: Settings) -> float:
    """What a product of float32 matrices is off by, root mean squares as a share of what it should be."""
    random = np.random.default_rng(3)
    x, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 256), (256, 256)))
    g = Graph(exact=True)
    y = g.op("Gemm", g.input("x", np.float32, *x.shape), g.constant(weights), name="y", transB=1)
    g.output(y, np.float32, len(x), len(weights))
    (found,) = session(g.model(), replace(settings, graphs=set())).run(None, {"x": x})
    right = x.astype(np.float64) @ weights.T.astype(np.float64)
    return float(np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)))


def _nodes(graph: bytes, settings: Settings) -> list[tuple[str, str, list[str]]]:
    """(operator, provider, types of outputs) of each node that ran."""
    with tempfile.TemporaryDirectory() as folder:
        made = session(Model(graph, _zero_weights(graph)), settings, profile=Path(folder) / "run")
        made.run(None, {one.name: _zeros(one) for one in made.get_inputs()})
        events = json.loads(Path(made.end_profiling()).read_text())
    nodes = []
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in facts:
            types = [kind for output in facts.get("output_type_shape", []) for kind in output]
            nodes.append((facts["op_name"], facts["provider"], types))
    return nodes


def _zero_weights(graph: bytes) -> dict[str, Any]:
    """Weights that are handed over beside a graph, all zero: where nodes run goes by shapes."""
    import onnx

    constants = onnx.load_model_from_string(graph).graph.initializer
    outside = (one for one in constants if one.data_location == onnx.TensorProto.EXTERNAL)
    return {one.name: np.zeros(tuple(one.dims), onnx.helper.tensor_dtype_to_np_dtype(one.data_type)) for one in outside}


def _zeros(described: Any) -> Any:
    """An input of zeros."""
    shape = [_SIZES[size] if isinstance(size, str) else size for size in described.shape]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    assert math.prod(shape) > 0, described
    return np.zeros(shape, types[described.type])

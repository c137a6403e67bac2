"""Rates of the product kernels: what a step multiplies is timed, in every format, with usual numbers."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.devices.product_rates import Products, fill
from edgert.devices.threads import ThreadPool
from edgert.plan_model import open_plan_model
from edgert.plan_parts import Numbers, products, step_parts
from edgert.quant.formats import FORMATS, PackedPart
from edgert.quant.jit import JIT_ENABLED


@pytest.mark.skipif(not JIT_ENABLED, reason="nothing is compiled")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_rows", [1, 70])
def test_products_of_every_format_are_usual_numbers(name: str, n_rows: int) -> None:
    part = PackedPart(FORMATS[name], (72, 256), 0)
    memory = np.zeros(3 * (part.n_bytes + 64), np.uint8)
    fill(memory)
    before, pool = memory.copy(), ThreadPool(2)
    try:
        made = Products(part, n_rows, memory, pool.n_threads)
        assert made.n_matrices == 3
        made.run(pool, 7)
        outputs = made.outputs()
    finally:
        pool.close()
    assert (memory == before).all()
    assert np.isfinite(outputs).all() and (np.abs(outputs) > 1e-30).all()


@pytest.mark.parametrize("name", [None, "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"])
@pytest.mark.parametrize("n_tokens", [1, 512])
def test_products_are_those_of_the_parts_of_a_step(name: str | None, n_tokens: int) -> None:
    weights = open_plan_model(name).weights
    parts = step_parts(weights, n_tokens, n_tokens, Numbers(), n_logits=0)
    matrices = [part for part in parts if part.weights]
    expected = sum(part.count * part.operations for part in matrices)
    made = products(weights, n_tokens)
    assert sum(count * one.operations for one, count in made.items()) == pytest.approx(expected, rel=0.02)
    expected = sum(part.count * part.weights for part in matrices)
    assert sum(count * one.matrix.n_bytes for one, count in made.items()) == pytest.approx(expected, rel=0.02)

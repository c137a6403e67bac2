"""All layers in one compiled call, for a model whose experts are all in RAM.

The same kernels in the same order as layer by layer, so the same bits; but Python, and with it the interpreter lock
that other threads of the program may hold, is asked once a step instead of three times a layer.
"""

from __future__ import annotations

from typing import Any

from edgert.devices.attention import attend
from edgert.devices.feed_forward import combine, run_experts
from edgert.devices.routing import choose_row, sort_pairs
from edgert.devices.threads import meet
from edgert.quant.jit import kernel


@kernel
def run_layers(
    thread: int,
    n_threads: int,
    barrier: int,
    layers: Any,
    matrices: Any,
    works: Any,
    attention_rows: Any,
    x: int,
    x_stride: int,
    n_tokens: int,
    start: int,
    angles: int,
    keys: Any,
    values: Any,
    tables: Any,
    expert_rows: Any,
    outputs: int,
    outputs_stride: int,
    shared: Any,
    shared_gates: Any,
    all_tokens: Any,
    scores: Any,
    softmax: bool,
    normalise: bool,
    scale: float,
    probabilities: Any,
    ids: Any,
    weights: Any,
    order: Any,
    first: Any,
    tokens: Any,
    slots: Any,
    n_used: Any,
) -> None:
    """Run the tokens of a chunk through every layer; arguments as those of attend, run_experts and combine.

    layers: LAYER (n_layers,); matrices: MATRIX (n_layers, 5); keys and values: as for attend, with n_layers before;
    tables: MATRIX (n_layers, n_expert, 3); shared: (n_layers, 0 or 1, 3); shared_gates: (n_layers, 0 or 1);
    probabilities: (n_threads, n_expert); ids, weights, order: (n_tokens, top_k); first: (n_expert + 1,); tokens, slots:
    (n_tokens * top_k,); all_tokens: 0, 1, 2, ... up to all rows of `outputs`; n_used (1,) counts experts used, layer
    by layer. A model without experts has n_expert = top_k = 0.
    """
    top_k, n_expert = ids.shape[1], len(first) - 1
    n_shared = n_tokens * shared.shape[1]
    shared_first = all_tokens[:2] * n_tokens  # [0, n_tokens]
    for layer in range(len(layers)):
        attend(
            thread, n_threads, barrier, layers[layer : layer + 1], matrices[layer], works, attention_rows, x, x_stride,
            n_tokens, start, angles, keys[layer], values[layer],
        )  # fmt: skip
        if n_expert:
            for t in range(thread, n_tokens, n_threads):
                choose_row(scores[t], softmax, normalise, scale, probabilities[thread], ids[t], weights[t], order[t])
            meet(barrier, n_threads)
            if thread == 0:
                sort_pairs(ids, first, tokens, slots)
                for expert in range(n_expert):
                    n_used[0] += first[expert] < first[expert + 1]
            meet(barrier, n_threads)
        run_experts(
            thread, n_threads, barrier, expert_rows, tables[layer], first, tokens, slots, shared[layer],
            shared_first, all_tokens[:n_shared], all_tokens[n_tokens * top_k : n_tokens * top_k + n_shared], outputs,
            outputs_stride,
        )  # fmt: skip
        combine(
            thread, n_threads, x, x_stride, n_tokens, layers[layer].d_model, layers[layer].residual_scale, outputs,
            outputs_stride, order, weights, n_tokens * top_k if n_shared else -1, shared_gates[layer], expert_rows,
        )  # fmt: skip
    meet(barrier, n_threads)

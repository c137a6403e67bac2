"""The compiled feed-forward half of a layer: experts, shared expert or dense network, their weighted sum; the head.

Each expert computes all tokens routed to it, so within a chunk its weights are read once. Outputs are kept apart per
(token, expert) and summed in ascending expert id, whatever the order in which experts arrive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.threads import meet
from edgert.quant.functions import quantise_row, rms_norm, sigmoid, silu
from edgert.quant.jit import kernel
from edgert.quant.matmul import multiply, multiply_tile
from edgert.quant.simd import first_lane, fma, load_f32, splat, store_f32

GATE, UP, DOWN = range(3)  # columns of a table of expert matrices


@kernel
def _gate_and_up(experts: Any, first: Any, tokens: Any, x: Any, hidden: Any, thread: int, n_threads: int) -> None:
    """hidden[pair] = silu(gate x) * (up x) for every (token, expert) pair of a group, tiles dealt out to threads."""
    item = 0
    for expert in range(len(experts)):
        if first[expert] == first[expert + 1]:
            continue
        gate, up = experts[expert, 0], experts[expert, 1]
        for tile in range((gate.n_out + 15) // 16):
            mine = item % n_threads == thread
            item += 1
            if not mine:
                continue
            for pair in range(first[expert], first[expert + 1]):
                left = silu(multiply_tile(gate, tile, x, tokens[pair]))
                right = multiply_tile(up, tile, x, tokens[pair])
                store_f32(hidden.floats + 4 * (pair * hidden.stride + 16 * tile), left * right)


@kernel
def _quantise_hidden(hidden: Any, n_pairs: int, d_ff: int, thread: int, n_threads: int) -> None:
    if hidden.quantised:
        for pair in range(thread, n_pairs, n_threads):
            at = pair * hidden.stride
            quantise_row(
                hidden.floats + 4 * at, d_ff, hidden.integers + at, hidden.scales + at // 8, hidden.sums + at // 8
            )


@kernel
def _down(
    experts: Any, first: Any, slots: Any, hidden: Any, out: int, out_stride: int, thread: int, n_threads: int
) -> None:
    """out[slot] = down hidden[pair], tiles dealt out to threads."""
    item = 0
    for expert in range(len(experts)):
        if first[expert] == first[expert + 1]:
            continue
        down = experts[expert, 2]
        for tile in range((down.n_out + 15) // 16):
            mine = item % n_threads == thread
            item += 1
            if not mine:
                continue
            for pair in range(first[expert], first[expert + 1]):
                store_f32(out + 4 * (slots[pair] * out_stride + 16 * tile), multiply_tile(down, tile, hidden, pair))


@kernel
def run_experts(
    thread: int,
    n_threads: int,
    barrier: int,
    activations: Any,
    experts: Any,
    first: Any,
    tokens: Any,
    slots: Any,
    shared: Any,
    shared_first: Any,
    shared_tokens: Any,
    shared_slots: Any,
    out: int,
    out_stride: int,
) -> None:
    """Outputs of a group of experts, and of the shared one.

    activations: ACTIVATIONS (3,): normed input, hidden of routed pairs, hidden of shared pairs. experts: MATRIX
    (n_experts, 3); pairs first[e] to first[e + 1] belong to expert e, pair p takes row tokens[p] and gives row slots[p]
    of `out` (address of floats, rows out_stride apart). The four `shared` arguments likewise; any group may be empty.
    """
    x, hidden, shared_hidden = activations[0], activations[1], activations[2]
    _gate_and_up(experts, first, tokens, x, hidden, thread, n_threads)
    _gate_and_up(shared, shared_first, shared_tokens, x, shared_hidden, thread, n_threads)
    meet(barrier, n_threads)
    if len(experts):
        _quantise_hidden(hidden, len(tokens), experts[0, 0].n_out, thread, n_threads)
    if len(shared):
        _quantise_hidden(shared_hidden, len(shared_tokens), shared[0, 0].n_out, thread, n_threads)
    meet(barrier, n_threads)
    _down(experts, first, slots, hidden, out, out_stride, thread, n_threads)
    _down(shared, shared_first, shared_slots, shared_hidden, out, out_stride, thread, n_threads)
    meet(barrier, n_threads)


@kernel
def combine(
    thread: int,
    n_threads: int,
    x: int,
    x_stride: int,
    n_tokens: int,
    d_model: int,
    residual_scale: float,
    outputs: int,
    stride: int,
    order: Any,
    weights: Any,
    shared_slot: int,
    shared_gate: Any,
    activations: Any,
) -> None:
    """x += residual_scale * (sum of weights * expert outputs + shared output), experts in ascending id.

    order, weights: (n_tokens, top_k) of Routes; the output of choice k of token t is row t * top_k + k. shared_slot:
    row of token 0's shared output, or -1. shared_gate: MATRIX (0 or 1,), whose one row times the normed input gates the
    shared output through a sigmoid. Tokens are dealt out to threads.
    """
    top_k = order.shape[1]
    for t in range(thread, n_tokens, n_threads):
        share = splat(np.float32(1))
        if len(shared_gate):
            share = splat(first_lane(sigmoid(multiply_tile(shared_gate[0], 0, activations[0], t))))
        for i in range(0, 4 * d_model, 64):
            total = splat(np.float32(0))
            for place in range(top_k):
                k = order[t, place]
                output = load_f32(outputs + 4 * (t * top_k + k) * stride + i)
                total = fma(splat(weights[t, k]), output, total)
            if shared_slot >= 0:
                total = fma(share, load_f32(outputs + 4 * (shared_slot + t) * stride + i), total)
            at = x + 4 * t * x_stride + i
            store_f32(at, fma(total, splat(np.float32(residual_scale)), load_f32(at)))


@kernel
def head(
    thread: int,
    n_threads: int,
    barrier: int,
    x: int,
    x_stride: int,
    n_tokens: int,
    norm: int,
    eps: float,
    activations: Any,
    matrices: Any,
    scale: float,
    logits: int,
    logits_stride: int,
) -> None:
    """logits = scale * (output matrix times normed rows of x); activations: ACTIVATIONS (1,), matrices: MATRIX (1,)."""
    normed, matrix = activations[0], matrices[0]
    for t in range(thread, n_tokens, n_threads):
        at = t * normed.stride
        rms_norm(x + 4 * t * x_stride, norm, normed.floats + 4 * at, matrix.n_in, eps)
        if normed.quantised:
            quantise_row(
                normed.floats + 4 * at,
                matrix.n_in,
                normed.integers + at,
                normed.scales + at // 8,
                normed.sums + at // 8,
            )
    meet(barrier, n_threads)
    multiply(matrix, normed, n_tokens, logits, logits_stride, thread, n_threads)
    meet(barrier, n_threads)
    for t in range(thread, n_tokens, n_threads):
        for i in range(0, 4 * matrix.n_out, 64):
            at = logits + 4 * t * logits_stride + i
            store_f32(at, load_f32(at) * splat(np.float32(scale)))
    meet(barrier, n_threads)

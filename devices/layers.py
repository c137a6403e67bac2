"""The compiled jobs of a step: layers in one call up to the first whose experts are away, and the rest of such a layer.

Every thread of a pool runs them together. With several tokens, rows are dealt out where work goes row by row, and
columns where it goes through a matrix; with one token each thread makes the rows that it needs for itself, in row
number `thread` of the buffers: doing little work twice costs less than waiting for each other.

The larger parts are called by their addresses in STEP: each is compiled once, not again in whoever calls it.
"""

from __future__ import annotations

import numpy as np

from edgert.devices.base import APART, READY
from edgert.devices.feed_forward import (
    GROUP,
    PARTS_BYTES,
    add_columns,
    share_of,
    zero_columns,
)
from edgert.devices.routing import choose_row, sort_pairs
from edgert.devices.threads import meet
from edgert.quant.functions import add_row, quantise_row, rms_norm
from edgert.quant.jit import inner
from edgert.quant.matmul import MATRIX, ROWS
from edgert.quant.records import at, call, record, view
from edgert.quant.simd import fma, splat
from edgert.quant.simd_memory import load_f32, load_float, load_long, store_f32, store_float

# A matrix that the normed rows go through: address of MATRIX, and of its products' floats, `stride` of them a row.
PROJECTION = record("matrix out stride")
# One layer. What sees other tokens, its mixer: PROJECTIONs of its input, the address of a function like a job of a pool
# that is given `mix_job` and leaves rows of `attended_width` floats in STEP's `attended`, and `output`, the MATRIX that
# these go through. Addresses of MATRIX (router, shared_gate: or 0), of three MATRIX (shared: or 0), of those of its
# experts, of the weights of norms and their biases (or 0), of what counts for the choice of experts alone (or 0), and
# of the experts' biases, see GROUP.
LAYER = record(
    "projections n_projections mix mix_job attended_width output router choice_bias experts shared shared_gate"
    " mixer_norm mixer_norm_bias feed_forward_norm feed_forward_norm_bias gate_biases up_biases down_biases"
)

# A step. `rows` are addresses of ROWS; other buffers are float rows with their strides in floats. `routings` holds
# ROUTING, first that of several tokens, then one for each thread; `groups` two GROUP a thread. Layers run from
# `first_layer` on, up to one that needs an expert which is not READY in `states` (uint8, n_expert a layer; 0: all
# are) or, where `every_layer`, has any; its number is left in `stopped`. `all_experts` are the ids of all experts of
# a layer. Routes of all layers stay in `kept_ids` (int64) and `kept_weights` (float32). `n_ahead` routers of layers
# to come score the last token's state of each layer, into `ahead_scores`. The last fields are of the layer that was
# stopped at: the group of experts, which `phases` of it to run (1: gate and up, 2: down), and whether it is the
# layer's first.
STEP = record(
    "layers n_layers n_tokens d_model x x_stride normed attended output output_stride scores scores_stride"
    " outputs outputs_stride shared_slot routings groups n_expert top_k router activation on_inputs"
    " hidden shared_hidden"
    " mixer_half multiply gate_and_up down"
    " n_used scratch scratch_bytes head_norm head_norm_bias head logits logits_stride first_row n_rows"
    " first_layer stopped states all_experts every_layer kept_ids kept_weights kept_stride"
    " n_ahead ahead ahead_scores ahead_scores_stride"
    " layer group_ids group_size phases is_first",
    floats="eps residual_scale logit_scale",
)
# Routes of some tokens: addresses of ids, order, slots, tokens (int64, top_k a token), first (int64, n_expert + 1),
# weights (float32, top_k a token), shares of the shared expert (float32, one a token), work (float32, 3 n_expert).
ROUTING = record("ids weights order first tokens slots shares work all_tokens")
_GROUP, _LAYER, _ROUTING, _PROJECTION = GROUP.itemsize, LAYER.itemsize, ROUTING.itemsize, PROJECTION.itemsize


@inner
def tiles(matrix: int) -> int:
    return (at(matrix, MATRIX).n_out + 15) // 16


@inner
def project(
    thread: int, n_threads: int, step: int, matrix: int, rows: int, first: int, count: int, out: int, stride: int
) -> None:
    """This thread's columns of rows times a matrix."""
    s, n_tiles = at(step, STEP), tiles(matrix)
    tile, last = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    scratch = s.scratch + thread * s.scratch_bytes + PARTS_BYTES
    call(s.multiply, (matrix, rows, first, count, tile, last - tile, out, stride, scratch))


@inner
def _norm(
    thread: int, n_threads: int, barrier: int, step: int, weight: int, bias: int, first_row: int, count: int
) -> None:
    """RMS-norm rows of the residual stream into `normed`, as floats and as int8."""
    s = at(step, STEP)
    r = at(s.normed, ROWS)
    single = count == 1
    for i in range(0 if single else thread, count, 1 if single else n_threads):
        row = thread if single else i
        out = r.floats + 4 * row * r.stride
        rms_norm(s.x + 4 * (first_row + i) * s.x_stride, weight, out, s.d_model, s.eps)
        if bias:
            add_row(out, bias, s.d_model)
        if r.group_stride:
            quantise_row(out, s.d_model, r.groups + row * r.group_stride)
    if not single:
        meet(barrier, n_threads)


@inner
def _quantise_attended(thread: int, n_threads: int, barrier: int, step: int, width: int) -> None:
    s = at(step, STEP)
    r = at(s.attended, ROWS)
    single = s.n_tokens == 1
    for i in range(0 if single else thread, s.n_tokens, 1 if single else n_threads):
        row = thread if single else i
        floats = r.floats + 4 * row * r.stride
        if row != i:
            for k in range(0, 4 * width, 64):
                store_f32(floats + k, load_f32(r.floats + k))
        if r.group_stride:
            quantise_row(floats, width, r.groups + row * r.group_stride)
    if not single:
        meet(barrier, n_threads)


@inner
def mixer_half(thread: int, n_threads: int, barrier: int, step: int, index: int) -> None:
    """Norm, what sees other tokens, output, residual, norm, router scores of one layer."""
    s = at(step, STEP)
    layer = at(s.layers + index * _LAYER, LAYER)
    n, own = s.n_tokens, thread if s.n_tokens == 1 else 0
    _norm(thread, n_threads, barrier, step, layer.mixer_norm, layer.mixer_norm_bias, 0, n)
    for number in range(layer.n_projections):
        p = at(layer.projections + number * _PROJECTION, PROJECTION)
        project(thread, n_threads, step, p.matrix, s.normed, own, n, p.out, p.stride)
    meet(barrier, n_threads)
    call(layer.mix, (thread, n_threads, barrier, layer.mix_job))
    meet(barrier, n_threads)
    _quantise_attended(thread, n_threads, barrier, step, layer.attended_width)
    project(thread, n_threads, step, layer.output, s.attended, own, n, s.output, s.output_stride)
    add_columns(thread, n_threads, s.x, s.x_stride, s.output, s.output_stride, n, tiles(layer.output), s.residual_scale)
    meet(barrier, n_threads)
    _norm(thread, n_threads, barrier, step, layer.feed_forward_norm, layer.feed_forward_norm_bias, 0, n)
    if layer.router:
        project(thread, n_threads, step, layer.router, s.normed, own, n, s.scores, s.scores_stride)
        meet(barrier, n_threads)


@inner
def _route(thread: int, n_threads: int, barrier: int, step: int, index: int) -> int:
    """Choose the experts of all tokens in a layer and sort the pairs; the address of the ROUTING to use."""
    s = at(step, STEP)
    n = s.n_tokens
    routing = s.routings + (thread + 1 if n == 1 else 0) * _ROUTING
    r, mine = at(routing, ROUTING), at(s.routings + (thread + 1) * _ROUTING, ROUTING)
    ids = view(r.ids, n * s.top_k, np.int64(0))
    weights = view(r.weights, n * s.top_k, np.float32(0))
    order = view(r.order, n * s.top_k, np.int64(0))
    work = view(mine.work, 3 * s.n_expert, np.float32(0))
    bias = at(s.layers + index * _LAYER, LAYER).choice_bias
    kept = index * s.kept_stride
    kept_ids = view(s.kept_ids + 8 * kept, n * s.top_k, np.int64(0))
    kept_weights = view(s.kept_weights + 4 * kept, n * s.top_k, np.float32(0))
    for t in range(0 if n == 1 else thread, n, 1 if n == 1 else n_threads):
        own = slice(t * s.top_k, (t + 1) * s.top_k)
        scores = view(s.scores + 4 * t * s.scores_stride, s.n_expert, np.float32(0))
        choose_row(scores, s.router, bias, work, ids[own], weights[own], order[own])
        if n > 1 or thread == 0:
            for i in range(t * s.top_k, (t + 1) * s.top_k):
                kept_ids[i], kept_weights[i] = ids[i], weights[i]
    if n > 1:
        meet(barrier, n_threads)
    if n == 1 or thread == 0:
        first = view(r.first, s.n_expert + 1, np.int64(0))
        pairs = n * s.top_k
        sort_pairs(
            ids.reshape((n, s.top_k)), first, view(r.tokens, pairs, np.int64(0)), view(r.slots, pairs, np.int64(0))
        )
        if thread == 0:
            for expert in range(s.n_expert):
                s.n_used += first[expert] < first[expert + 1]
    if n > 1:
        meet(barrier, n_threads)
    return routing


@inner
def _set_group(thread: int, step: int, index: int, routing: int, ids: int, n: int) -> None:
    """Make the thread's GROUP n experts of a layer, by their ids, with the routes of a ROUTING."""
    s = at(step, STEP)
    group, layer, r = (
        at(s.groups + 2 * thread * _GROUP, GROUP),
        at(s.layers + index * _LAYER, LAYER),
        at(routing, ROUTING),
    )
    group.matrices, group.ids, group.n_experts = layer.experts, ids, n
    group.first, group.tokens, group.slots, group.weights = r.first, r.tokens, r.slots, r.weights
    group.gate_biases, group.up_biases, group.down_biases = layer.gate_biases, layer.up_biases, layer.down_biases


@inner
def _shared_group(thread: int, n_threads: int, step: int, index: int, routing: int, apart: bool) -> int:
    """The GROUP of a layer's shared expert, its shares computed (complete at the next barrier)."""
    s = at(step, STEP)
    layer = at(s.layers + index * _LAYER, LAYER)
    address = s.groups + (2 * thread + 1) * _GROUP
    group, r, n = at(address, GROUP), at(routing, ROUTING), s.n_tokens
    group.matrices, group.n_experts = layer.shared, 1 if layer.shared else 0
    first = view(group.first, 2, np.int64(0))
    first[0], first[1] = 0, n
    group.tokens, group.weights = r.all_tokens, r.shares
    group.slots = r.all_tokens + (8 * s.shared_slot if apart else 0)
    part = s.scratch + thread * s.scratch_bytes
    if layer.shared:
        for t in range(0 if n == 1 else thread, n, 1 if n == 1 else n_threads):
            row = thread if n == 1 else t
            store_float(r.shares + 4 * t, share_of(layer.shared_gate, s.normed, row, part))
    return address


@inner
def _run_groups(
    thread: int, n_threads: int, barrier: int, step: int, phases: int, shared: int, out: int, stride: int, add: int
) -> None:
    """Phases of the thread's group of experts, and all of the shared one (address of a GROUP), a barrier between."""
    s = at(step, STEP)
    own, parts = thread if s.n_tokens == 1 else 0, s.scratch + thread * s.scratch_bytes
    group = s.groups + 2 * thread * _GROUP
    if phases & 1:
        call(s.gate_and_up, (thread, n_threads, group, s.normed, own, parts, parts + PARTS_BYTES))
    call(s.gate_and_up, (thread, n_threads, shared, s.normed, own, parts, parts + PARTS_BYTES))
    meet(barrier, n_threads)
    if phases & 2:
        call(s.down, (thread, n_threads, group, out, stride, add, parts, parts + PARTS_BYTES))
    call(s.down, (thread, n_threads, shared, out, stride, add, parts, parts + PARTS_BYTES))


@inner
def _look_ahead(thread: int, n_threads: int, step: int, index: int) -> None:
    """Router scores of the next layers on the last token's state: what they may choose, roughly and early."""
    s = at(step, STEP)
    r, last = at(s.ahead, ROWS), s.x + 4 * (s.n_tokens - 1) * s.x_stride
    for distance in range(s.n_ahead):
        if index + 1 + distance >= s.n_layers:
            return
        layer = at(s.layers + (index + 1 + distance) * _LAYER, LAYER)
        if layer.router:
            normed = r.floats + 4 * thread * r.stride
            rms_norm(last, layer.feed_forward_norm, normed, s.d_model, s.eps)
            if layer.feed_forward_norm_bias:
                add_row(normed, layer.feed_forward_norm_bias, s.d_model)
            if r.group_stride:
                quantise_row(normed, s.d_model, r.groups + thread * r.group_stride)
            out = s.ahead_scores + 4 * (index * s.n_ahead + distance) * s.ahead_scores_stride
            project(thread, n_threads, step, layer.router, s.ahead, thread, 1, out, s.ahead_scores_stride)


@inner
def _must_stop(step: int, index: int, routing: int) -> bool:
    """Whether an expert that is used in a layer is not at hand."""
    s, first = at(step, STEP), at(routing, ROUTING).first
    if s.every_layer or s.states == 0:
        return s.every_layer != 0
    states = view(s.states + index * s.n_expert, s.n_expert, np.uint8(0))
    for expert in range(s.n_expert):
        if load_long(first + 8 * expert) < load_long(first + 8 * expert + 8) and states[expert] != READY:
            return True
    return False


@inner
def run_layers(thread: int, n_threads: int, barrier: int, step: int) -> None:
    """Layers from the first on, up to one that must be stopped at; its routes are chosen. step: address of STEP."""
    s = at(step, STEP)
    n, group = s.n_tokens, at(s.groups + 2 * thread * _GROUP, GROUP)
    n_tiles = (s.d_model + 15) // 16
    stopped = s.n_layers
    for index in range(s.first_layer, s.n_layers):
        call(s.mixer_half, (thread, n_threads, barrier, step, index))
        layer = at(s.layers + index * _LAYER, LAYER)
        routing = s.routings + (thread + 1 if n == 1 else 0) * _ROUTING
        group.n_experts = 0
        if layer.router:
            routing = _route(thread, n_threads, barrier, step, index)
            _set_group(thread, step, index, routing, s.all_experts, s.n_expert)
            if s.n_ahead:
                _look_ahead(thread, n_threads, step, index)
            if _must_stop(step, index, routing):
                stopped = index
                break
        shared = _shared_group(thread, n_threads, step, index, routing, False)
        zero_columns(thread, n_threads, s.output, s.output_stride, n, n_tiles)
        _run_groups(thread, n_threads, barrier, step, 3, shared, s.output, s.output_stride, 1)
        add_columns(thread, n_threads, s.x, s.x_stride, s.output, s.output_stride, n, n_tiles, s.residual_scale)
        meet(barrier, n_threads)
    if thread == 0:
        s.stopped = stopped


@inner
def run_experts(thread: int, n_threads: int, barrier: int, step: int) -> None:
    """A group of experts of step.layer, and with the first group of a layer the shared one.

    Outputs of a few tokens (APART at most) are kept apart, for `run_combine`, so groups may come in any order. Those of
    more are added up at once: groups come in ascending expert id, the shared one runs after all of them.
    """
    s = at(step, STEP)
    n = s.n_tokens
    routing = s.routings + (thread + 1 if n == 1 else 0) * _ROUTING
    shared = s.groups + (2 * thread + 1) * _GROUP
    _set_group(thread, step, s.layer, routing, s.group_ids, s.group_size)
    at(shared, GROUP).n_experts = 0
    if n <= APART:
        if s.is_first:
            shared = _shared_group(thread, n_threads, step, s.layer, routing, True)
        _run_groups(thread, n_threads, barrier, step, s.phases, shared, s.outputs, s.outputs_stride, 0)
    else:
        if s.is_first:
            zero_columns(thread, n_threads, s.output, s.output_stride, n, (s.d_model + 15) // 16)
        _run_groups(thread, n_threads, barrier, step, s.phases, shared, s.output, s.output_stride, 1)
    meet(barrier, n_threads)


@inner
def run_combine(thread: int, n_threads: int, barrier: int, step: int) -> None:
    """x += residual_scale * (sum of weights * expert outputs + shared output), experts in ascending id."""
    s = at(step, STEP)
    n, layer = s.n_tokens, at(s.layers + s.layer * _LAYER, LAYER)
    routing = s.routings + (thread + 1 if n == 1 else 0) * _ROUTING
    if n > APART:
        at(s.groups + 2 * thread * _GROUP, GROUP).n_experts = 0
        shared = _shared_group(thread, n_threads, step, s.layer, routing, False)
        _run_groups(thread, n_threads, barrier, step, 3, shared, s.output, s.output_stride, 1)
        n_tiles = (s.d_model + 15) // 16
        add_columns(thread, n_threads, s.x, s.x_stride, s.output, s.output_stride, n, n_tiles, s.residual_scale)
        meet(barrier, n_threads)
        return
    r = at(routing, ROUTING)
    order = view(r.order, n * s.top_k, np.int64(0))
    for t in range(thread, n, n_threads):
        for i in range(0, 4 * s.d_model, 64):
            total = splat(np.float32(0))
            for place in range(s.top_k):
                slot = t * s.top_k + order[t * s.top_k + place]
                weight = splat(np.float32(1) if s.on_inputs else load_float(r.weights + 4 * slot))
                total = fma(weight, load_f32(s.outputs + 4 * slot * s.outputs_stride + i), total)
            if layer.shared:
                output = load_f32(s.outputs + 4 * (s.shared_slot + t) * s.outputs_stride + i)
                total = fma(splat(load_float(r.shares + 4 * t)), output, total)
            to = s.x + 4 * t * s.x_stride + i
            store_f32(to, fma(total, splat(np.float32(s.residual_scale)), load_f32(to)))
    meet(barrier, n_threads)


@inner
def run_head(thread: int, n_threads: int, barrier: int, step: int) -> None:
    """Logits of rows first_row and behind of the residual stream."""
    s = at(step, STEP)
    n = s.n_rows
    _norm(thread, n_threads, barrier, step, s.head_norm, s.head_norm_bias, s.first_row, n)
    project(thread, n_threads, step, s.head, s.normed, thread if n == 1 else 0, n, s.logits, s.logits_stride)
    n_tiles = tiles(s.head)
    scale = splat(np.float32(s.logit_scale))
    for row in range(n):
        for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            to = s.logits + 4 * row * s.logits_stride + 64 * tile
            store_f32(to, load_f32(to) * scale)
    meet(barrier, n_threads)

"""What lets a token see those before it, in NumPy: attention, latent attention, short convolution, gated delta net.

Each takes the normed rows of a chunk and gives what the layer's output matrix is applied to. The sums follow the order
of the kernels: over taps, positions and dimensions ascending, one fused multiply-add each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgert.devices.base import AttentionWeights, ConvolutionWeights, DeltaWeights, LatentWeights, Linear
from edgert.devices.reference_attention import ReferenceCache, attention
from edgert.quant import reference
from edgert.quant.formats import Matrix, MatrixSource
from edgert.quant.reference import fma
from edgert.types import Floats, LayerConfig, ModelConfig

Project = Callable[[Linear, Floats], Floats]  # (linear, (n_tokens, n_in)) -> (n_tokens, n_out)


def attend(
    c: ModelConfig,
    kind: LayerConfig,
    weights: AttentionWeights,
    x: Floats,
    project: Project,
    angles: Floats,
    cache: ReferenceCache,
    layer: int,
    start: int,
) -> Floats:
    """Attention: (n_tokens, n_heads d_value)."""
    query, key, value = (project(part, x) for part in (weights.query, weights.key, weights.value))
    norms = weights.query_norm, weights.key_norm
    out = attention(c, query, key, value, norms, kind, angles, cache, layer, start, weights.sinks)
    return out if weights.gate is None else out * reference.sigmoid(project(weights.gate, x))


def attend_latent(
    c: ModelConfig,
    kind: LayerConfig,
    weights: LatentWeights,
    x: Floats,
    project: Project,
    angles: Floats,
    cache: ReferenceCache,
    layer: int,
    start: int,
) -> Floats:
    """Latent attention: (n_tokens, n_heads d_output). Rotated parts come first in queries and keys."""
    assert c.latent is not None
    n, rank, plain = len(x), c.d_value, c.latent.d_plain
    latent = project(weights.latent, x)  # (n, rank + n_rotated)
    value = reference.rms_norm(latent[:, :rank], weights.latent_norm, c.eps)
    key = np.concatenate((latent[:, rank:], value), axis=1)
    if weights.query_down is not None:
        assert weights.query_norm is not None
        x = reference.rms_norm(project(weights.query_down, x), weights.query_norm, c.eps)
    heads = project(weights.query, x).reshape(n, c.n_heads, plain + c.rope.n_rotated)
    query = np.empty((n, c.n_heads, c.d_head), np.float32)
    query[..., : c.rope.n_rotated] = heads[..., plain:]
    for head, matrix in enumerate(_by_head(weights.key_up, c.n_heads)):
        query[:, head, c.rope.n_rotated :] = project(Linear(matrix), np.ascontiguousarray(heads[:, head, :plain]))
    rows = query.reshape(n, -1)
    seen = attention(c, rows, key, value, (None, None), kind, angles, cache, layer, start)
    seen = seen.reshape(n, c.n_heads, rank)
    parts = [
        project(Linear(matrix), np.ascontiguousarray(seen[:, head]))
        for head, matrix in enumerate(_by_head(weights.value_up, c.n_heads))
    ]
    return np.concatenate(parts, axis=1)


def _by_head(stacked: MatrixSource, n_heads: int) -> list[Matrix]:
    """The matrices of heads that stand one below the other."""
    whole = stacked.whole()
    n_rows = whole.shape[0] // n_heads
    return [whole.some_rows(head * n_rows, n_rows) for head in range(n_heads)]


def convolve(history: Floats, inputs: Floats, taps: Floats) -> Floats:
    """Causal convolution of each channel: inputs (n, channels) after those of history, which takes in the last.

    history: (n_taps - 1, channels), changed. taps: (n_taps, channels), the last that of the present token.
    """
    n, n_taps = len(inputs), len(taps)
    whole = np.concatenate((history, inputs))
    out = np.zeros_like(inputs)
    for tap in range(n_taps):
        out = fma(whole[tap : tap + n], taps[tap], out)
    history[:] = whole[n:]
    return out


def convolve_short(
    weights: ConvolutionWeights, x: Floats, project: Project, cache: ReferenceCache, layer: int
) -> Floats:
    """A short convolution, with a gate before and one behind it: (n_tokens, d_model)."""
    before, behind, inputs = np.split(project(weights.input, x), 3, axis=1)
    d_model = inputs.shape[1]
    return behind * convolve(cache.states.inputs(layer)[:, :d_model], before * inputs, weights.taps)


def run_delta(
    c: ModelConfig, weights: DeltaWeights, x: Floats, project: Project, cache: ReferenceCache, layer: int
) -> Floats:
    """A gated delta net: (n_tokens, d_values).

    memory of a value head: (d_state of keys, d_state of values). A token multiplies it with exp(softplus(alpha +
    step_bias) decay), adds k (beta (v - k memory)), and gets q memory.
    """
    d = c.delta
    assert d is not None
    n, s, several = len(x), d.d_state, d.n_value_heads // d.n_key_heads
    mixed = convolve(cache.states.inputs(layer)[:, : d.d_channels], project(weights.input, x), weights.taps)
    query, key, value = np.split(reference.silu(mixed), (d.d_keys, 2 * d.d_keys), axis=1)
    scale = np.float32(s**-0.5)
    query = (reference.unit_norm(query.reshape(-1, s), c.eps) * scale).reshape(n, -1, s)
    key = reference.unit_norm(key.reshape(-1, s), c.eps).reshape(n, -1, s)
    value = value.reshape(n, -1, s)
    beta = reference.sigmoid(project(weights.beta, x))  # (n_tokens, n_value_heads)
    decay = reference.exp(reference.softplus(project(weights.alpha, x) + weights.step_bias) * weights.decay)
    heads = np.arange(d.n_value_heads)
    heads = heads % d.n_key_heads if d.in_turn else heads // several  # the key head of each
    memory = cache.states.memory(layer).reshape(d.n_value_heads, s, s)
    out = np.empty((n, d.n_value_heads, s), np.float32)
    for token in range(n):
        k, q = key[token, heads], query[token, heads]  # (n_value_heads, d_state)
        memory *= decay[token, :, None, None]
        seen, got = np.zeros_like(out[token]), np.zeros_like(out[token])
        for i in range(s):
            seen = fma(memory[:, i], k[:, i, None], seen)
        change = (value[token] - seen) * beta[token, :, None]
        for i in range(s):
            memory[:, i] = fma(change, k[:, i, None], memory[:, i])
            got = fma(memory[:, i], q[:, i, None], got)
        out[token] = got
    normed = reference.rms_norm(out.reshape(-1, s), weights.norm, c.eps).reshape(n, -1)
    return normed * reference.silu(project(weights.gate, x))

"""The CPU device's work space: which buffers a step needs, of what size, and how many bytes that is in all."""

from __future__ import annotations

from edgert.devices import attention
from edgert.devices.base import AHEAD, APART, CHUNK
from edgert.devices.buffers import round_up
from edgert.devices.feed_forward import PARTS_BYTES
from edgert.quant import matmul
from edgert.quant.tile_kernels import GROUP_BYTES
from edgert.types import ModelConfig

HEAD_ROWS = 32  # rows of logits that are computed at a time


def float_buffers(config: ModelConfig, n_threads: int, chunk: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the buffers of floats; with one token, each thread has a row of its own."""
    c, n_rows = config, max(chunk, n_threads)
    top_k, n_expert = (c.router.top_k, c.router.n_expert) if c.router else (0, 0)
    widths = {"x": c.d_model, "output": c.d_model, "scores": n_expert, **_mixer_widths(c)}
    return {
        **{name: (n_rows, width) for name, width in widths.items()},
        "outputs": (min(chunk, APART) * (top_k + 1), c.d_model),
        "logits": (min(chunk, HEAD_ROWS), c.n_vocab),
        "ahead_scores": (c.n_layers * AHEAD, n_expert),
    }


def _mixer_widths(c: ModelConfig) -> dict[str, int]:
    """Columns of what the mixers' matrices fill."""
    found: dict[str, int] = {}
    if "attention" in c.mixers():
        found |= {"query": c.n_heads * c.d_head, "key": c.n_kv_heads * c.d_head, "value": c.n_kv_heads * c.d_value}
    if c.latent:
        found |= {"latent": c.d_value + c.rope.n_rotated, "query_down": c.latent.query_rank}
    if "convolution" in c.mixers():
        found["mixed"] = 3 * c.d_model
    if c.delta:
        heads = dict.fromkeys(("beta", "alpha"), c.delta.n_value_heads)
        found |= {"mixed": max(found.get("mixed", 0), c.delta.d_channels), **heads}
    if c.delta or c.query_gate:
        found["gate"] = max(c.delta.d_values if c.delta else 0, c.d_attended if c.query_gate else 0)
    return found


def attended_width(config: ModelConfig) -> int:
    """Columns of what mixers leave, the widest of them."""
    kinds = config.mixers()
    widths = [config.d_attended if "attention" in kinds else 0, config.d_model if "convolution" in kinds else 0]
    return max(*widths, config.delta.d_values if config.delta else 0)


def input_buffers(config: ModelConfig, n_threads: int, chunk: int) -> dict[str, tuple[int, int]]:
    """Likewise of those that are multiplied with matrices, and so quantised."""
    c, n_rows = config, max(chunk, n_threads)
    found = {
        "normed": (n_rows, c.d_model),
        "attended": (n_rows, attended_width(c)),
        "hidden": (chunk * (c.router.top_k if c.router else 0), c.d_expert),
        "shared_hidden": (chunk, max(c.d_shared, c.d_dense)),
        "ahead": (n_threads, c.d_model),
    }
    if c.latent:
        found["query_rank"] = (n_rows, c.latent.query_rank)
        found["plain"] = (n_rows, c.n_heads * (c.latent.d_plain + c.rope.n_rotated))
        found["seen"] = (n_rows, c.n_heads * c.d_value)
    return found


def scratch_bytes(config: ModelConfig) -> int:
    """Bytes of one thread's work space."""
    c = config
    latent = max(c.d_value, c.latent.query_rank, c.latent.d_plain) if c.latent else 0
    widest = max(c.d_model, attended_width(c), c.d_expert, c.d_shared, c.d_dense, latent)
    return round_up(PARTS_BYTES + 2 * matmul.scratch_bytes(widest), 64)


def work_bytes(config: ModelConfig, n_context: int, n_threads: int, *, float_hidden: bool, chunk: int = CHUNK) -> int:
    """Bytes that a device takes beside weights and key/value cache.

    float_hidden: whether a down projection takes rows of floats.
    """
    floats = sum(4 * n_rows * width for n_rows, width in float_buffers(config, n_threads, chunk).values())
    inputs = input_buffers(config, n_threads, chunk)
    quantised = sum(n_rows * width * GROUP_BYTES // 32 for n_rows, width in inputs.values())
    floats += sum(
        4 * n_rows * width for name, (n_rows, width) in inputs.items() if float_hidden or "hidden" not in name
    )
    tempered = any(layer.tempered for layer in config.layers)
    angles = 4 * (config.rope.n_rotated + tempered) * n_context
    scratch = n_threads * scratch_bytes(config) + attention.scratch_bytes(config, n_threads, n_context, chunk)
    routes = chunk * (config.router.top_k if config.router else 0) * (12 * config.n_layers + 48)
    return floats + quantised + angles + scratch + routes

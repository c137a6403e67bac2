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
    return {
        "x": (n_rows, c.d_model),
        "query": (n_rows, c.n_heads * c.d_head),
        "key": (n_rows, c.n_kv_heads * c.d_head),
        "value": (n_rows, c.n_kv_heads * c.d_value),
        "output": (n_rows, c.d_model),
        "scores": (n_rows, n_expert),
        "outputs": (min(chunk, APART) * (top_k + 1), c.d_model),
        "logits": (min(chunk, HEAD_ROWS), c.n_vocab),
        "ahead_scores": (c.n_layers * AHEAD, n_expert),
    }


def input_buffers(config: ModelConfig, n_threads: int, chunk: int) -> dict[str, tuple[int, int]]:
    """Likewise of those that are multiplied with matrices, and so quantised."""
    c, n_rows = config, max(chunk, n_threads)
    return {
        "normed": (n_rows, c.d_model),
        "attended": (n_rows, c.n_heads * c.d_value),
        "hidden": (chunk * (c.router.top_k if c.router else 0), c.d_expert),
        "shared_hidden": (chunk, c.d_shared),
        "ahead": (n_threads, c.d_model),
    }


def scratch_bytes(config: ModelConfig) -> int:
    """Bytes of one thread's work space."""
    widest = max(config.d_model, config.n_heads * config.d_value, config.d_expert, config.d_shared)
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
    angles = 4 * config.rope.n_rotated * n_context
    scratch = n_threads * scratch_bytes(config) + attention.scratch_bytes(config, n_threads, n_context, chunk)
    routes = chunk * (config.router.top_k if config.router else 0) * (12 * config.n_layers + 48)
    return floats + quantised + angles + scratch + routes

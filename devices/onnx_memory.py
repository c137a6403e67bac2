"""What ONNX Runtime takes, in bytes, counted from a configuration and formats before anything is made.

Figures were measured on the CPU's provider, which copies weights into an order of its own; others are taken for alike.
"""

from __future__ import annotations

from edgert.devices.onnx_attention import HEAD_ROWS
from edgert.devices.onnx_weights import stored_bits
from edgert.quant.formats import TILE_ROWS, Format
from edgert.types import ModelConfig

CHUNK = 128  # most tokens of a step: the scores of all heads are there at once
LIBRARY_BYTES = 40 << 20  # onnx, onnxruntime and what they load
VERIFIED = 40  # tokens that a device is held against the CPU with, on first use
SESSION_BYTES = 384 << 10  # of each session, beside its weights


def form_bytes(format: Format, packed: int, form: str = "") -> int:
    """Bytes within sessions of weights that take `packed` bytes as tiles; their scales are there three times.

    form: of the graphs, see onnx_runtime.FORMS.
    """
    weights = packed // format.block_bytes * format.block * TILE_ROWS
    if form == "qdq":
        return weights
    n_scales = weights // format.group if format.is_integer else 0
    return weights * stored_bits(format) // 8 + n_scales * (16 if format.has_minimum else 12)


def work_bytes(config: ModelConfig, n_context: int, chunk: int, kv_type: str) -> int:
    """Work space of attention and experts for steps of so many tokens."""
    c = config
    top_k, n_expert = (c.router.top_k, c.router.n_expert) if c.router else (0, 0)
    scores = 3 * c.n_heads * chunk * n_context + chunk * n_context
    cached = c.n_kv_heads * (c.d_head + c.d_value) * n_context * (1 if kv_type == "f32" else 2)  # turned, and widened
    rows = chunk * (10 * c.d_model + 4 * c.n_heads * c.d_head + 4 * c.d_shared)
    pairs = chunk * top_k * (3 * c.d_model + 5 * c.d_expert)
    routers = c.n_layers * n_expert * c.d_model
    return 4 * (scores + cached + rows + pairs + routers + HEAD_ROWS * c.n_vocab + c.rope.n_rotated * n_context)


def verifying_bytes(config: ModelConfig, layer: int, head: int, expert: int) -> int:
    """What the first use takes besides: one layer, the head and an expert as the CPU has them, read and packed, and
    what was noted of each layer; of logits the device's and the CPU's, and logarithms of both in float64.

    layer, head, expert: bytes of the largest once packed.
    """
    noted = 5 * config.n_layers * config.d_model * 4
    return layer + head + 2 * expert + VERIFIED * (noted + config.n_vocab * (2 * 4 + 4 * 8))

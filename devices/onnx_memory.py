"""What ONNX Runtime takes, in bytes, counted from a configuration and formats before anything is made.

Figures were measured on the CPU's provider, which copies weights into an order of its own; others are taken for alike.
"""

from __future__ import annotations

from dataclasses import replace

from edgert.devices import work_space
from edgert.devices.onnx_attention import HEAD_ROWS
from edgert.devices.onnx_weights import stored_bits
from edgert.devices.verification import LOGIT_ROWS, NOTED_TOKENS, PROMPT_TOKENS, RANDOM_ROWS
from edgert.quant.formats import TILE_ROWS, Format
from edgert.types import ModelConfig

CHUNK = 128  # most tokens of a step: the scores of all heads are there at once
LIBRARY_BYTES = 40 << 20  # onnx, onnxruntime and what they load
ROWS = NOTED_TOKENS + RANDOM_ROWS + PROMPT_TOKENS  # that the CPU runs to verify a device
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


def verifying_bytes(config: ModelConfig, layer: int, head: int, expert: int, n_threads: int) -> int:
    """What the first use takes besides: one layer, the head and an expert as the CPU has them, read and packed, the
    CPU's work space, and what was noted of each layer; the device's logits, of some the CPU's and logarithms of both.

    layer, head, expert: bytes of the largest once packed.
    """
    c, noted = config, NOTED_TOKENS + RANDOM_ROWS
    work = work_space.work_bytes(replace(c, n_layers=1), PROMPT_TOKENS, n_threads, float_hidden=True, chunk=ROWS)
    caches = 3 * PROMPT_TOKENS * c.n_kv_heads * (c.d_head + c.d_value) * 4
    logits = c.n_vocab * (ROWS * 4 + LOGIT_ROWS * 6 * 8)
    return layer + head + 2 * expert + work + caches + noted * 5 * c.n_layers * c.d_model * 4 + logits

"""The key/value cache: what lies where, in each type, and how many bytes that takes.

Of each layer and key/value head there is a row of blocks, each of 64 positions and contiguous: keys (d_head, 64), so
that a score needs no sum across lanes; values (64, d_value rounded up to 16); and, for int8, scales of the keys
(ceil(d_head / 32), 64) and of the values, half floats. Reading a head is reading one stretch of memory.

Of latent attention, whose values are the last dimensions of its keys, there are keys alone: with int8 if these
dimensions begin with a scale of their own, for else the integers would not be the same.

f16 and f32 hold numbers as such. int8 is lossy, at 8.5 bits a number: 32 dimensions of one position and head share a
scale, the largest magnitude over 127 rounded to a half float. It is asked for by name, never chosen by default.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.states import States, WithStates, states_bytes
from edgert.errors import OptionError
from edgert.types import ModelConfig

BLOCK = 64  # positions; attention_blocks.BLOCK is the same number
GROUP = 32  # dimensions that share a scale; attention_blocks.GROUP is the same number
KV_TYPES = {"f16": 2, "f32": 4, "int8": 1}  # bytes of one number


def check_kv_type(kv_type: str) -> None:
    """Refuse what is not a type of the cache."""
    if kv_type not in KV_TYPES:
        *others, last = KV_TYPES
        raise OptionError(f"kv_type={kv_type!r} is not known; use {', '.join(others)} or {last}")


def is_once(config: ModelConfig, kv_type: str) -> bool:
    """Whether values are kept as part of the keys."""
    return config.latent is not None and (kv_type != "int8" or config.rope.n_rotated % GROUP == 0)


def functions(config: ModelConfig | None, kv_type: str) -> tuple[Any, Any]:
    """The compiled functions that read and write a cache of this type."""
    from edgert.devices import attention_blocks, attention_heads  # planning must not load the compiler

    once = config is not None and is_once(config, kv_type)
    attend = attention_blocks.ATTEND_ONCE if once else attention_blocks.ATTEND_BLOCKS
    return attend[kv_type], attention_heads.WRITE[kv_type]


def _block_offsets(config: ModelConfig, kv_type: str) -> tuple[int, int, int, int]:
    """Where, in a block, values, scales of keys and scales of values begin, and where the block ends; bytes."""
    width, item = 0 if is_once(config, kv_type) else -(-config.d_value // 16) * 16, KV_TYPES[kv_type]
    sizes = [BLOCK * config.d_head * item, BLOCK * width * item]
    sizes += [2 * BLOCK * -(-n // GROUP) if kv_type == "int8" else 0 for n in (config.d_head, width)]
    ends = np.cumsum(sizes).tolist()
    return ends[0], ends[1], ends[2], ends[3]


def cache_bytes(config: ModelConfig, n_context: int, kv_type: str) -> int:
    """Bytes of the keys and values of n_context positions in layers that attend, and of the states of the others."""
    check_kv_type(kv_type)
    return len(config.attending_layers) * _layer_bytes(config, n_context, kv_type) + states_bytes(config)


def _layer_bytes(config: ModelConfig, n_context: int, kv_type: str) -> int:
    return config.n_kv_heads * -(-n_context // BLOCK) * _block_offsets(config, kv_type)[3]


class KvCache(WithStates):
    """Keys and values of one sequence, all layers.

    records: CACHE (n_layers,), what the compiled code must know of each layer; the functions that read and write this
    type, and no others, are compiled when it is made.
    """

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str) -> None:
        from edgert.devices import attention  # see functions()
        from edgert.quant.records import address_of

        self.n_context, self.kv_type, self.states = n_context, kv_type, States(config)
        self.n_bytes = cache_bytes(config, n_context, kv_type)
        attending, layer_bytes = config.attending_layers, _layer_bytes(config, n_context, kv_type)
        self._memory = np.zeros(len(attending) * layer_bytes + 64, np.uint8)
        values, key_scales, value_scales, block = _block_offsets(config, kv_type)
        n_blocks = -(-n_context // BLOCK)
        self.records = np.zeros(config.n_layers, attention.CACHE)
        attend, write = functions(config, kv_type)
        first = -self._memory.ctypes.data % 64 + self._memory.ctypes.data
        self.records["address"][attending] = first + np.arange(len(attending)) * layer_bytes
        for name, value in (
            ("head_bytes", n_blocks * block),
            ("block_bytes", block),
            ("values", 0 if is_once(config, kv_type) else values),
            ("key_scales", key_scales),
            ("value_scales", value_scales),
            ("attend_blocks", address_of(attend, 1)),
            ("write", address_of(write, 1)),
        ):
            self.records[name] = value

"""The key/value cache: what lies where, in each type, and how many bytes that takes.

Of each layer and key/value head there is a row of blocks, each of 64 positions and contiguous: keys (d_head, 64), so
that a score needs no sum across lanes; values (64, d_value rounded up to 16); and, for int8, scales of the keys
(ceil(d_head / 32), 64) and of the values, half floats. Reading a head is reading one stretch of memory.

Of latent attention, whose values are the last dimensions of its keys, there are keys alone: with int8 if these
dimensions begin with a scale of their own, for else the integers would not be the same.

Of a layer that sees only the last positions there is a ring of blocks, if that takes less: see rings.py.

f16 and f32 hold numbers as such. int8 is lossy, at 8.5 bits a number: 32 dimensions of one position and head share a
scale, the largest magnitude over 127 rounded to a half float. It is asked for by name, never chosen by default.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices.rings import BLOCK, KEPT, Length, Ring, Rings, length_of, reach_of
from edgert.devices.states import States, WithStates, states_bytes
from edgert.errors import OptionError
from edgert.types import ModelConfig

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


def cache_bytes(config: ModelConfig, n_context: int, kv_type: str, chunk: int | None = None) -> int:
    """Bytes of the keys and values of n_context positions in layers that attend, and of the states of the others.

    chunk: most tokens of a step, where layers that see only the last positions keep rings; None: they keep all.
    """
    check_kv_type(kv_type)
    lengths = _lengths(config, n_context, chunk).values()
    n_blocks = sum(length.n_blocks + KEPT * length.n_kept for length in lengths)
    return n_blocks * config.n_kv_heads * _block_offsets(config, kv_type)[3] + states_bytes(config)


def _lengths(config: ModelConfig, n_context: int, chunk: int | None) -> dict[int, Length]:
    """How many blocks each layer has that attends."""
    return {index: length_of(config.layer(index), n_context, chunk) for index in config.attending_layers}


class KvCache(WithStates):
    """Keys and values of one sequence, all layers.

    records: CACHE (n_layers,), what the compiled code must know of each layer; the functions that read and write this
    type, and no others, are compiled when it is made. chunk: as for cache_bytes; no step may have more tokens.
    """

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str, chunk: int | None = None) -> None:
        from edgert.devices import attention  # see functions()
        from edgert.quant.records import address_of

        self.n_context, self.kv_type, self.chunk = n_context, kv_type, chunk
        self.n_bytes = cache_bytes(config, n_context, kv_type, chunk)
        values, key_scales, value_scales, block = _block_offsets(config, kv_type)
        self.records = np.zeros(config.n_layers, attention.CACHE)
        attend, write = functions(config, kv_type)
        for name, value in (
            ("block_bytes", block),
            ("values", 0 if is_once(config, kv_type) else values),
            ("key_scales", key_scales),
            ("value_scales", value_scales),
            ("attend_blocks", address_of(attend, 1)),
            ("write", address_of(write, 1)),
        ):
            self.records[name] = value
        self.states = States(config, Rings(self._allocate(config, _lengths(config, n_context, chunk), block)))

    def _allocate(self, config: ModelConfig, lengths: dict[int, Length], block: int) -> list[Ring]:
        """Make room for all layers, and tell the records; the rings among them."""
        heads, rings = config.n_kv_heads, []
        self._memory = np.zeros(sum(length.n_blocks for length in lengths.values()) * heads * block + 64, np.uint8)
        end = -self._memory.ctypes.data % 64
        for index, (n_blocks, n_kept) in lengths.items():
            first, end = end, end + heads * n_blocks * block
            record = self.records[index]
            record["address"], record["n_blocks"] = self._memory.ctypes.data + first, n_blocks
            record["head_bytes"] = n_blocks * block
            if n_kept:
                blocks = self._memory[first:end].reshape(heads, n_blocks, block)
                kept = np.zeros((KEPT, heads, n_kept, block), np.uint8)
                rings.append(Ring(reach_of(config.layer(index)), blocks, kept))
        return rings

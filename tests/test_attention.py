"""Attention against its NumPy reference, bit for bit: shapes, types, windows, threads, chunks; and bounds."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.devices import attention, attention_blocks, attention_products, kv_cache
from edgert.devices import reference_attention as reference
from edgert.devices.attention_heads import HEAD_NORM, NO_NORM, VECTOR_NORM
from edgert.devices.base import query_factors, rope_angles
from edgert.devices.kv_cache import KvCache
from edgert.devices.threads import ThreadPool
from edgert.errors import OptionError
from edgert.quant.records import address_of
from edgert.types import Floats, LatentConfig, LayerConfig, ModelConfig, RopeConfig

THREADS = (1, 2, 3, 5)
_NORMS = {"none": NO_NORM, "head": HEAD_NORM, "unit": HEAD_NORM, "vector": VECTOR_NORM}
_LIBC = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Buffers that end where memory ends: reading or writing behind one kills the process."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def bytes(self, n_bytes: int, multiple: int = 1) -> Any:
        """n_bytes of 0xFF (floats: not a number), rounded up to a multiple, in front of a page without access."""
        n_bytes = -(-n_bytes // multiple) * multiple
        whole = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        pages = np.frombuffer(memory, np.uint8)
        assert _LIBC.mprotect(ctypes.c_void_p(pages.ctypes.data + whole), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        pages[:whole] = 255
        self._kept.append(memory)
        return pages[whole - n_bytes : whole]

    def floats(self, values: Any, multiple: int = 1) -> Any:
        """A copy of float32 values; those up to the multiple are no numbers."""
        values = np.ascontiguousarray(values, np.float32)
        copy = self.bytes(values.nbytes, 4 * multiple).view(np.float32)
        copy[: values.size] = values.reshape(-1)
        return copy


def config_of(
    heads: int = 2, group: int = 1, d_head: int = 32, d_value: int = 32, n_rotated: int = 32, **other: Any
) -> ModelConfig:
    """A model of one layer; attention sees no more of it than this."""
    rope = RopeConfig(other.pop("rope", "neox"), n_rotated)
    sizes = dict(n_layers=1, d_model=16, n_heads=heads * group, n_kv_heads=heads, n_vocab=8, n_context=512, eps=1e-5)
    return ModelConfig(
        "x", **sizes, d_head=d_head, d_value=d_value, rope=rope, router=None, attention_scale=d_head**-0.5, **other
    )


class Layer:
    """One layer's attention, compiled, all its buffers guarded; and the same in the reference."""

    def __init__(
        self,
        config: ModelConfig,
        n_context: int,
        kv_type: str,
        kind: LayerConfig | int,
        threads: int,
        seed: int = 0,
        chunk: int | None = None,
    ) -> None:
        self.kind = kind if isinstance(kind, LayerConfig) else LayerConfig(window=kind)
        self.c, self.threads, self.memory = config, threads, Guarded()
        random = np.random.default_rng(seed)
        sizes = (config.d_head,) * 2
        if config.qk_norm == "vector":
            sizes = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.norms = [random.standard_normal(n).astype(np.float32) for n in sizes]
        if config.qk_norm == "unit":
            self.norms = [np.ones(n, np.float32) for n in sizes]
        self.sinks = random.standard_normal(config.n_heads).astype(np.float32) if config.sinks else None
        norms = [self.memory.floats(norm, 16).ctypes.data for norm in self.norms]
        self.angles = rope_angles(config, n_context, None)
        laid = replace(config, layers=(self.kind,))
        self.cache = KvCache(laid, n_context, kv_type, chunk)
        self.oracle = reference.ReferenceCache(config, n_context, kv_type)
        assert self.cache.n_bytes == kv_cache.cache_bytes(laid, n_context, kv_type, chunk)
        assert self.oracle.n_bytes == kv_cache.cache_bytes(config, n_context, kv_type)
        n_bytes = config.n_kv_heads * int(self.cache.records["head_bytes"][0])
        assert chunk is not None or n_bytes == self.cache.n_bytes
        moved = self.memory.bytes(n_bytes)  # the cache too ends where memory ends
        moved[:] = random.choice([0, 0x7E], moved.size) if kv_type == "int8" else 0x7C  # what was there before
        self.cache.records["address"] += moved.ctypes.data - self.cache.records["address"][0]
        self.layer = np.zeros(1, attention.ATTENTION)
        for name in ("n_heads", "n_kv_heads", "d_head", "d_value", "eps", "attention_scale"):
            self.layer[name] = getattr(config, name)
        self.layer["n_rotated"], self.layer["neox"] = config.rope.n_rotated, config.rope.kind == "neox"
        self.layer["qk_norm"], self.layer["window"] = _NORMS[config.qk_norm], self.kind.window
        self.layer["norm_late"], self.layer["span"] = config.norm_late, self.kind.span
        if self.sinks is not None:
            self.layer["sinks"] = self.memory.floats(self.sinks).ctypes.data
        self.layer["query_norm"], self.layer["key_norm"] = norms
        self.n_context = n_context

    def run(self, query: Floats, key: Floats, value: Floats, start: int) -> Floats:
        """Attention of a chunk on all threads."""
        n, c = len(query), self.c
        scratch = attention.new_scratch(c, self.threads, self.n_context, n)
        scratch["address"] = self.memory.bytes(
            attention.scratch_bytes(c, self.threads, self.n_context, n), 64
        ).ctypes.data
        out = self.memory.bytes(4 * n * c.n_heads * c.d_value).view(np.float32)
        rows = [self.memory.floats(part) for part in (query, key, value)]
        angles = self.memory.floats(self.angles[start : start + n])
        job = np.zeros(1, attention.ATTEND_JOB)
        for name, buffer in zip(("query", "key", "value", "out"), (*rows, out), strict=True):
            job[name], job[f"{name}_stride"] = buffer.ctypes.data, buffer.size // n
        job["angles"], job["n_tokens"], job["start"] = angles.ctypes.data, n, start
        if self.kind.tempered:
            job["query_factors"] = self.memory.floats(query_factors(c, start, n)).ctypes.data
        for name, record in (("scratch", scratch), ("attention", self.layer), ("cache", self.cache.records)):
            job[name] = record.ctypes.data
        before = [buffer.tobytes() for buffer in rows]
        pool(self.threads).run(address_of(attention.attend, 4), job.ctypes.data)
        assert all(was == buffer.tobytes() for was, buffer in zip(before, rows, strict=True))
        return out.reshape(n, -1)

    def reference(self, query: Floats, key: Floats, value: Floats, start: int) -> Floats:
        """The same in NumPy."""
        angles = self.angles[start : start + len(query)]
        norms = self.norms[0], self.norms[1]
        return reference.attention(
            self.c, query, key, value, norms, self.kind, angles, self.oracle, 0, start, self.sinks
        )


@functools.cache
def pool(n_threads: int) -> ThreadPool:
    """Threads for all tests."""
    return ThreadPool(n_threads)


def rows_of(c: ModelConfig, n: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Random queries, keys and values of n tokens."""
    random = np.random.default_rng(seed)
    widths = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value
    query, key, value = (random.standard_normal((n, width)).astype(np.float32) for width in widths)
    return query * 3, key, value


def chunks(n: int, sizes: list[int]) -> list[slice]:
    """0 to n in parts of these sizes, again and again."""
    ends = [0]
    while ends[-1] < n:
        ends.append(min(n, ends[-1] + sizes[(len(ends) - 1) % len(sizes)]))
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


shapes = st.builds(
    config_of,
    heads=st.integers(1, 4),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9]),
    d_head=st.sampled_from([4, 16, 24, 32, 46, 64, 72]),
    d_value=st.sampled_from([3, 16, 32, 40, 64, 80, 144]),
    n_rotated=st.just(0),
    rope=st.sampled_from(["neox", "norm"]),
    qk_norm=st.sampled_from(["none", "head", "vector", "unit"]),
    norm_late=st.booleans(),
    sinks=st.booleans(),
    temperature=st.just((0.1, 9)),
)
kinds = st.builds(
    LayerConfig,
    window=st.sampled_from([0, 0, 1, 5, 64, 70]),
    span=st.sampled_from([0, 0, 7, 64, 100]),
    tempered=st.booleans(),
)


@pytest.mark.parametrize("kv_type", kv_cache.KV_TYPES)
@settings(max_examples=60)
@given(
    shapes,
    st.integers(1, 140),
    st.lists(st.sampled_from([1, 2, 3, 7, 30, 64, 140]), min_size=1, max_size=3),
    st.sampled_from(THREADS),
    kinds,
    st.integers(0, 36),
    st.integers(0, 2**20),
)
def test_equals_the_reference(
    kv_type: str, c: ModelConfig, n: int, sizes: list[int], threads: int, kind: LayerConfig, pairs: int, seed: int
) -> None:
    c = replace(c, rope=replace(c.rope, n_rotated=min(2 * pairs, c.d_head // 2 * 2)))
    layer = Layer(c, n + seed % 3, kv_type, kind, threads, seed)
    rows = rows_of(c, n, seed)
    whole = layer.reference(*rows, 0)
    for part in chunks(n, sizes):
        out = layer.run(*(each[part] for each in rows), part.start)
        assert (out == whole[part]).all(), part


@pytest.mark.parametrize("kv_type", kv_cache.KV_TYPES)
@pytest.mark.parametrize("group, heads, window", [(1, 3, 0), (3, 3, 0), (8, 1, 530), (20, 1, 0), (50, 1, 200)])
def test_one_token_far_into_a_text(kv_type: str, group: int, heads: int, window: int) -> None:
    c = config_of(heads, group, 8, 24, 8)
    n = 700
    rows = rows_of(c, n, 1)
    answers = []
    for threads in (*THREADS, 16):
        layer = Layer(c, n + 3, kv_type, window, threads)
        layer.run(*(each[: n - 2] for each in rows), 0)
        answers.append([layer.run(*(each[t : t + 1] for each in rows), t) for t in (n - 2, n - 1)])
    layer.oracle.write(0, 0, *(each[: n - 2].reshape(n - 2, heads, -1) for each in rows[1:]))
    angles = layer.angles[: n - 2]
    layer.oracle.write(
        0,
        0,
        reference._heads(c, LayerConfig(), rows[1][: n - 2], heads, None, angles),
        rows[2][: n - 2].reshape(n - 2, heads, -1),
    )
    expected = [layer.reference(*(each[t : t + 1] for each in rows), t) for t in (n - 2, n - 1)]
    for answer in answers:
        assert (np.array(answer) == np.array(expected)).all()


@pytest.mark.parametrize("kv_type", kv_cache.KV_TYPES)
@settings(max_examples=15)
@given(
    shapes,
    st.integers(1, 150),
    st.booleans(),
    st.lists(st.integers(1, 100), min_size=1, max_size=3),
    st.sampled_from(THREADS),
    st.integers(0, 2**20),
)
def test_a_ring_gives_what_all_positions_give(
    kv_type: str, c: ModelConfig, reach: int, spans: bool, sizes: list[int], threads: int, seed: int
) -> None:
    """Round it more than once, whatever is seen of it and however much is added at a time."""
    n, chunk = 900 + seed % 60, max(*sizes, 16)
    kind = LayerConfig(span=reach, window=seed % 2 * 2 * reach) if spans else LayerConfig(window=reach)
    ring, whole = (Layer(c, n + seed % 3, kv_type, kind, threads, seed, most) for most in (chunk, None))
    assert 2 * ring.cache.records["n_blocks"][0] < whole.cache.records["n_blocks"][0] == -(-ring.n_context // 64)
    rows = rows_of(c, n, seed)
    for part in chunks(n, [*sizes, chunk]):
        chunk_rows = tuple(each[part] for each in rows)
        assert (ring.run(*chunk_rows, part.start) == whole.run(*chunk_rows, part.start)).all(), part


@pytest.mark.parametrize("kv_type", kv_cache.KV_TYPES)
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_number_stays_with_those_who_see_it(kv_type: str, part: int, bad: float) -> None:
    c = config_of(2, 3, 32, 32, 0)
    n, at = 100, 70
    rows = rows_of(c, n, 3)
    rows[part][at, 5] = bad
    with np.errstate(all="ignore"):
        layer = Layer(c, n, kv_type, 20, 2)
        expected = layer.reference(*rows, 0)
    assert np.isfinite(expected[:at]).all() and np.isfinite(expected[at + 20 :]).all()
    assert bad == 3e38 or not np.isfinite(expected[at]).all()
    for sizes in ([n], [1], [33, 1, 2]):
        layer = Layer(c, n, kv_type, 20, 2)
        out = np.concatenate([layer.run(*(each[piece] for each in rows), piece.start) for piece in chunks(n, sizes)])
        assert np.array_equal(out, expected, equal_nan=True)


def test_int8_is_close() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 2, 100)).astype(np.float32)
    cached = reference.quantise_cached(rows)
    assert 0.003 < np.sqrt(((cached - rows) ** 2).mean()) < 0.008
    c = config_of(2, 2, 64, 64, 64)
    exact, close = (Layer(c, 200, kv_type, 0, 1) for kv_type in ("f32", "int8"))
    chunk = rows_of(c, 200, 0)
    difference = exact.run(*chunk, 0) - close.run(*chunk, 0)
    assert 0 < np.sqrt((difference**2).mean()) < 0.01


def latent_of(rank: int, n_rotated: int, n_heads: int) -> ModelConfig:
    """Latent attention: one key for all heads, whose last dimensions are the value."""
    c = config_of(1, n_heads, rank + n_rotated, rank, n_rotated, rope="norm")
    return replace(c, latent=LatentConfig(16, 16))


def latent_rows(c: ModelConfig, n: int, seed: int) -> tuple[Floats, Floats, Floats]:
    query, key, _ = rows_of(c, n, seed)
    return query, key, np.ascontiguousarray(key[:, c.rope.n_rotated :])


@pytest.mark.parametrize("kv_type", kv_cache.KV_TYPES)
@settings(max_examples=20)
@given(
    st.builds(
        latent_of, st.sampled_from([16, 32, 48, 80]), st.sampled_from([2, 8, 32, 64]), st.sampled_from([1, 2, 6, 9, 17])
    ),
    st.integers(1, 140),
    st.sampled_from(THREADS),
    st.integers(0, 2**20),
)
def test_values_that_are_part_of_keys(kv_type: str, c: ModelConfig, n: int, threads: int, seed: int) -> None:
    """They are kept once, and no bit of an answer tells."""
    once, twice = Layer(c, n, kv_type, 0, threads), Layer(replace(c, latent=None), n, kv_type, 0, threads)
    smaller = kv_type != "int8" or c.rope.n_rotated % 32 == 0
    assert (once.cache.n_bytes < twice.cache.n_bytes) == smaller
    rows = latent_rows(c, n, seed)
    for part in chunks(n, [1 + seed % 70, 1]):
        chunk = tuple(one[part] for one in rows)
        found = once.run(*chunk, part.start)
        assert (found == twice.run(*chunk, part.start)).all()
        assert (found == once.reference(*chunk, part.start)).all()


@pytest.mark.parametrize("kv_type, bytes_each", [("f16", 2), ("f32", 4), ("int8", 1 + 2 / 32)])
def test_deepseek_keeps_576_numbers_a_token_and_layer(kv_type: str, bytes_each: float) -> None:
    """DeepSeek V2-Lite's and V3's shape: a latent vector of 512 and 64 rotated numbers, whatever the heads."""
    c = latent_of(512, 64, 16)
    assert kv_cache.cache_bytes(c, 6400, kv_type) == 6400 * 576 * bytes_each
    cache = KvCache(c, 6400, kv_type)
    assert cache.n_bytes == 6400 * 576 * bytes_each and cache.records["values"][0] == 0


@pytest.mark.parametrize("kv_type, bytes_each", [("f16", 2), ("f32", 4), ("int8", 1 + 2 / 32)])
def test_the_cache_says_its_size(kv_type: str, bytes_each: float) -> None:
    c = replace(config_of(4, 1, 128, 64), n_layers=3)
    assert kv_cache.cache_bytes(c, 100, kv_type) == 3 * 4 * 128 * (128 + 64) * bytes_each
    cache = KvCache(c, 100, kv_type)
    assert cache.n_bytes == kv_cache.cache_bytes(c, 100, kv_type) and len(cache.records) == 3
    assert (np.diff(cache.records["address"]) == cache.n_bytes // 3).all()
    assert cache.records["address"][0] % 64 == 0


def test_an_unknown_type_is_refused() -> None:
    for make in (KvCache, reference.ReferenceCache):
        with pytest.raises(OptionError, match="kv_type='int4' is not known; use f16, f32 or int8"):
            make(config_of(), 10, "int4")


def test_names_of_sizes_agree() -> None:
    assert kv_cache.BLOCK == attention_products.BLOCK == reference.BLOCK
    assert kv_cache.GROUP == attention_products.GROUP
    assert set(kv_cache.KV_TYPES) == set(attention_blocks.ATTEND_BLOCKS) == set(attention_blocks.ATTEND_ONCE)
    assert attention_blocks.PANEL % attention_blocks.MANY == attention_blocks.PANEL % 16 == 0

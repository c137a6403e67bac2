"""Attention of one layer, run by all threads of a pool: heads prepared, keys and values written, scores, outputs.

Blocks of 64 positions, at absolute multiples of 64, each with its own maximum, are combined in ascending order: no
order depends on threads, on chunks, or on how many queries are taken together. Knows no matrices and no residual
stream: it starts from rows of queries, keys and values, and leaves rows of outputs.

How threads share the work: one token goes by key/value heads, with no barrier; where these leave threads without work
for long enough, by blocks of positions, with one barrier. Several tokens go by panels, rows (queries) that share a
key/value head, after a barrier behind the writing of keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.attention_blocks import (
    AT_ONCE,
    MANY,
    PANEL,
    RANGE,
    ROWS,
    add_part,
    clear,
    lanes_bytes,
    part_bytes,
    rows_in_registers,
    span_start,
)
from edgert.devices.attention_heads import POSITION, VECTOR_NORM, copy_row, norm_factor, prepare_head
from edgert.devices.attention_products import BLOCK, wide_floats
from edgert.devices.threads import meet
from edgert.quant.assembler import Code, Value, operation
from edgert.quant.jit import kernel
from edgert.quant.records import record
from edgert.quant.simd_memory import load_f32, load_float, store_f32, store_float
from edgert.types import ModelConfig

# One layer. Norms are addresses of float32 weights, readable up to a multiple of 16 floats. qk_norm: NO_NORM, HEAD_NORM
# or VECTOR_NORM of attention_heads. norm_late: a HEAD_NORM comes after the rotation. window: position p attends
# to p - window + 1 ... p; 0: to all up to p. span: to those of its stretch of so many positions; 0: all. sinks: address
# of a float for each head, or 0.
ATTENTION = record(
    "n_heads n_kv_heads d_head d_value n_rotated neox qk_norm norm_late query_norm key_norm window span sinks",
    floats="eps attention_scale",
)
# One layer's keys and values (see kv_cache): bytes from head to head and block to block, the number of blocks (number b
# lies at b modulo that), offsets in a block (values: 0 where they are part of the keys), and the addresses of the
# functions of its type, see kv_cache.functions.
CACHE = record("address head_bytes block_bytes n_blocks values key_scales value_scales attend_blocks write")
# Work space: bytes from thread to thread, and offsets in a thread's share; `factors` is an offset from the address.
SCRATCH = record("address stride queries ranges scores state block wide key value spare work own_factors parts factors")
# One call. Rows are float32, strides in floats; angles: (cos, sin) pairs from position `start` on; query_factors: a
# float for each position from there on, or 0; others: records.
ATTEND_JOB = record(
    "query query_stride key key_stride value value_stride out out_stride angles query_factors n_tokens start scratch"
    " attention cache"
)

# Blocks' worth of waiting threads from which one token's work is split by blocks. An estimate: on two idle cores the
# split took 8 to 14 % less time at 3 and 6 blocks, but where other processes want the cores its barrier cost more than
# it saved.
_SPLIT_BLOCKS = 8


# ---- work space ------------------------------------------------------------------------------------------------------
def new_scratch(config: ModelConfig, n_threads: int, n_context: int, chunk: int) -> npt.NDArray[Any]:
    """SCRATCH (1,) without an address: for a key/value cache of n_context positions and chunk tokens a call."""
    width, d_head = -(-config.d_value // 16) * 16, -(-config.d_head // 32) * 32
    group = config.n_heads // config.n_kv_heads
    n_blocks = -(-n_context // BLOCK)
    n_parts = min(n_blocks, -(-config.n_kv_heads * n_blocks // n_threads)) if config.n_kv_heads % n_threads else 0
    part = 12 * PANEL + 4 * PANEL * width
    sizes = {
        "queries": 4 * PANEL * d_head,
        "ranges": RANGE.itemsize * PANEL,
        "scores": 4 * PANEL * BLOCK,
        "state": part,
        "block": part,
        "wide": 4 * wide_floats(config.d_head, width),
        "key": 4 * d_head,
        "value": 4 * (width + 16),
        "spare": 4 * max(d_head, 16),
        "work": max(ROWS.itemsize, POSITION.itemsize),
        "own_factors": 8,
        "parts": n_parts * (12 * -(-group // 16) * 16 + 4 * (group + MANY) * width) if group <= PANEL else 0,
    }
    scratch = np.zeros(1, SCRATCH)
    end = 0
    for name, size in sizes.items():
        scratch[name] = end
        end += -(-size // 64) * 64
    scratch["stride"] = end
    scratch["factors"] = n_threads * end
    scratch["address"] = 0
    return scratch


def scratch_bytes(config: ModelConfig, n_threads: int, n_context: int, chunk: int) -> int:
    """Bytes of work space that the address of new_scratch(...) must have, aligned to 64."""
    return int(new_scratch(config, n_threads, n_context, chunk)["factors"][0]) + 8 * chunk


# ---- parts of the job ------------------------------------------------------------------------------------------------
class _Job:
    """A job as one thread sees it: its records, and how the work is shared."""

    def __init__(self, code: Code, thread: Value, n_threads: Value, job: Value) -> None:
        self.code, self.thread, self.n_threads = code, thread, n_threads
        self.job = j = code.record(job, ATTEND_JOB)
        self.layer = a = code.record(j.attention, ATTENTION)
        self.cache = code.record(j.cache, CACHE)
        self.scratch = code.record(j.scratch, SCRATCH)
        self.own = self.scratch.address + thread * self.scratch.stride  # this thread's share of the work space
        self.eps = a.location + ATTENTION.fields["eps"][1]  # type: ignore[index]   # a record has fields
        self.group = a.n_heads // a.n_kv_heads
        self.width = (a.d_value + 15) // 16 * 16
        self.n_rows = j.n_tokens * self.group  # of one key/value head
        # One token, and all rows of a head at once: who attends to a head can write its key, with no barrier between.
        self.alone = j.n_tokens.equals(1) & (self.n_rows <= PANEL)
        self.first_block = self.lowest_block(j.start)
        self.n_blocks = j.start // BLOCK + 1 - self.first_block  # of one token
        without_work = n_threads - 1 - (a.n_kv_heads - 1) % n_threads  # threads, in the last round of heads
        self.split = self.alone & (without_work * self.n_blocks >= _SPLIT_BLOCKS)
        self.n_items = a.n_kv_heads * self.n_blocks  # if split
        self.factors = code.choose(
            self.alone, self.own + self.scratch.own_factors, self.scratch.address + self.scratch.factors
        )

    def lowest_block(self, position: Value) -> Value:
        """The first block that a position attends to."""
        code, window = self.code, self.layer.window
        first = code.choose(window > 0, code.larger(0, position + 1 - window), 0)
        return code.larger(first, span_start(code, self.layer.span, position)) // BLOCK

    def share(self, n: Value, thread: Value) -> Value:
        """Where a thread's even share of n begins."""
        return n * thread // self.n_threads

    def find_factors(self, first_token: Value, end_token: Value) -> None:
        """Norm factors of queries and keys of some tokens, if the whole vectors are normed: (n_tokens, 2)."""
        code, j, a = self.code, self.job, self.layer
        eps, spare = code.do(load_float, self.eps), self.own + self.scratch.spare
        with code.when(a.qk_norm.equals(VECTOR_NORM)), code.loop(first_token, end_token) as t:
            query, key = j.query + t * j.query_stride * 4, j.key + t * j.key_stride * 4
            to = self.factors + t * 8
            code.do(store_float, to, norm_factor(code, query, a.n_heads * a.d_head, eps, spare))
            code.do(store_float, to + 4, norm_factor(code, key, a.n_kv_heads * a.d_head, eps, spare))

    def prepare(self, row: Value, head: Value, weight: Value, factor: Value, token: Value, to: Value) -> None:
        """Norm and rotate one head of a row of queries or keys."""
        code, a = self.code, self.layer
        offset = head * a.d_head * 4
        prepare_head(
            code,
            source=row + offset,
            n=a.d_head,
            norm=a.qk_norm,
            norm_late=a.norm_late,
            weight=weight + code.choose(a.qk_norm.equals(VECTOR_NORM), offset, 0),
            factor=factor,
            eps=self.eps,
            to=to,
            angles=self.job.angles + token * a.n_rotated * 4,
            n_rotated=a.n_rotated,
            neox=a.neox,
        )

    def write_tokens(self, kv_head: Value, first_token: Value, end_token: Value) -> None:
        """Prepare the keys of one key/value head, and write them and its values to the cache."""
        code, j, a, cache, s = self.code, self.job, self.layer, self.cache, self.scratch
        w = code.record(self.own + s.work, POSITION)
        w.key, w.value, w.spare = self.own + s.key, self.own + s.value, self.own + s.spare
        w.d_head, w.d_value = a.d_head, code.choose(cache.values.equals(0), 0, a.d_value)
        w.values, w.key_scales, w.value_scales = cache.values, cache.key_scales, cache.value_scales
        w.row_bytes = (cache.key_scales - cache.values) // BLOCK
        first = j.start + first_token
        place, lane = code.variable(first // BLOCK % cache.n_blocks), code.variable(first % BLOCK)
        with code.loop(first_token, end_token) as t:
            row = j.key + t * j.key_stride * 4
            w.block = cache.address + kv_head * cache.head_bytes + place.value * cache.block_bytes
            w.lane = lane.value
            self.prepare(row, kv_head, a.key_norm, self.factors + t * 8 + 4, t, w.key)
            value = j.value + (t * j.value_stride + kv_head * a.d_value) * 4
            copy_row(code, value, a.d_value, (a.d_value + 31) // 32 * 32, w.value)
            code.call_address(cache.write, w.location)
            after = place.value + (lane.value + 1) // BLOCK
            place.value = code.choose(after.equals(cache.n_blocks), 0, after)
            lane.value = (lane.value + 1) % BLOCK

    def prepare_queries(self, kv_head: Value, first_row: Value, n_rows: Value) -> None:
        """Queries of some rows of a key/value head, row = token * heads per key/value head + head among them."""
        code, j, a = self.code, self.job, self.layer
        with code.loop(0, n_rows) as i:
            t = (first_row + i) // self.group
            head = kv_head * self.group + (first_row + i) % self.group
            to = self.own + self.scratch.queries + i * _query_bytes(a.d_head)
            self.prepare(j.query + t * j.query_stride * 4, head, a.query_norm, self.factors + t * 8, t, to)
            with code.when(j.query_factors.differs(0)):
                factor = code.splat(code.do(load_float, j.query_factors + t * 4))
                with code.loop(0, _query_bytes(a.d_head), 64) as k:
                    code.do(store_f32, to + k, code.do(load_f32, to + k) * factor)

    def attend(
        self, kv_head: Value, first_row: Value, n_rows: Value, first_block: Value, end_block: Value, parts: Value
    ) -> None:
        """Attention of prepared rows over some blocks: in the state, or each block's by itself in `parts` if not 0."""
        code, a, cache, s = self.code, self.layer, self.cache, self.scratch
        w = code.record(self.own + s.work, ROWS)
        w.queries, w.query_stride = self.own + s.queries, _query_bytes(a.d_head)
        w.d_head, w.width, w.n_rows, w.group, w.window = a.d_head, self.width, n_rows, self.group, a.window
        w.span = a.span
        w.position, w.in_group = self.job.start + first_row // self.group, first_row % self.group
        w.first_block, w.end_block = first_block, end_block
        w.head, w.block_bytes = cache.address + kv_head * cache.head_bytes, cache.block_bytes
        w.n_blocks = cache.n_blocks
        w.key_scales, w.values, w.value_scales = cache.key_scales, cache.values, cache.value_scales
        w.ranges, w.scores, w.wide = self.own + s.ranges, self.own + s.scores, self.own + s.wide
        w.part, w.state, w.keep_apart = self.own + s.block, self.own + s.state, parts
        w.scale = a.attention_scale
        with code.either(parts.equals(0)) as (then, otherwise):
            with then:
                clear(code, w.state, n_rows, self.width)
                self.add_sinks(kv_head, first_row, n_rows)
            with otherwise:
                w.part = parts
        code.call_address(cache.attend_blocks, w.location)

    def add_sinks(self, kv_head: Value, first_row: Value, n_rows: Value) -> None:
        """Let the state begin with the heads' sinks: scores that have a weight, but no value."""
        code, sinks = self.code, self.layer.sinks
        state, lanes = self.own + self.scratch.state, lanes_bytes(n_rows)
        with code.when(sinks.differs(0)), code.loop(0, n_rows) as row:
            head = kv_head * self.group + (first_row + row) % self.group
            code.do(store_float, state + row * 4, code.do(load_float, sinks + head * 4))
            code.do(store_float, state + lanes + row * 4, 1.0)

    def finish(self, kv_head: Value, first_row: Value, n_rows: Value) -> None:
        """Divide the state's outputs by the sums of weights, and write them to their rows."""
        code, j, a = self.code, self.job, self.layer
        state, lanes = self.own + self.scratch.state, lanes_bytes(n_rows)
        whole = a.d_value // 16 * 64
        with code.loop(0, n_rows) as row:
            t = (first_row + row) // self.group
            head = kv_head * self.group + (first_row + row) % self.group
            source = state + lanes * 3 + row * self.width * 4
            out = j.out + (t * j.out_stride + head * a.d_value) * 4
            total = code.do(load_float, state + lanes + row * 4)
            with code.loop(0, whole, 64) as i:
                code.do(store_f32, out + i, code.do(load_f32, source + i) / code.splat(total))
            with code.loop(whole, a.d_value * 4, 4) as i:
                code.do(store_float, out + i, code.do(load_float, source + i) / total)

    def add_parts(self, end_item: Value) -> None:
        """Add the parts that the threads behind this one left of items up to end_item to this one's state."""
        code, s = self.code, self.scratch
        begin = self.share(self.n_items, self.thread + 1)
        with code.loop(self.thread + 1, self.n_threads) as other:
            parts = s.address + other * s.stride + s.parts
            first = code.larger(begin, self.share(self.n_items, other))
            last = code.smaller(end_item, self.share(self.n_items, other + 1))
            with code.loop(first, last) as item:
                part = parts + (item - first) * part_bytes(code, self.n_rows, self.width)
                add_part(code, self.own + s.state, part, self.n_rows, self.width)


def _query_bytes(d_head: Value) -> Value:
    return (d_head + 31) // 32 * 128


# ---- the job ---------------------------------------------------------------------------------------------------------
@operation(3)
def _write_keys(code: Code, thread: Value, n_threads: Value, job: Value) -> Value:
    """Write keys and values; whether all threads must have done so before any goes on."""
    job_ = _Job(code, thread, n_threads, job)
    a, j = job_.layer, job_.job
    first, last = job_.share(j.n_tokens, thread), job_.share(j.n_tokens, thread + 1)
    first, last = code.choose(job_.alone, 0, first), code.choose(job_.alone, 1, last)
    begin, end = job_.share(job_.n_items, thread), job_.share(job_.n_items, thread + 1)
    job_.find_factors(first, last)
    with code.loop(0, a.n_kv_heads) as head:
        last_item = (head + 1) * job_.n_blocks  # of this head; who reads the new position writes it
        mine = code.choose(job_.split, (begin < last_item) & (last_item <= end), (head % n_threads).equals(thread))
        with code.when(mine | job_.alone.equals(0)):
            job_.write_tokens(head, first, last)
    return code.choose(job_.alone, 0, 1)


@operation(3)
def _attend(code: Code, thread: Value, n_threads: Value, job: Value) -> Value:
    """Attention; whether threads left parts for each other."""
    job_ = _Job(code, thread, n_threads, job)
    a, j, n_rows, n_blocks = job_.layer, job_.job, job_.n_rows, job_.n_blocks
    share = (n_rows * a.n_kv_heads + n_threads - 1) // n_threads  # a panel leaves work for all threads
    most = code.smaller(PANEL, rows_in_registers(code, code.larger(share, AT_ONCE[-1])))
    panel = code.choose(job_.alone, n_rows, most)
    n_panels = (n_rows + panel - 1) // panel
    item = code.variable(code.choose(job_.split, job_.share(job_.n_items, thread), thread))
    end = code.choose(job_.split, job_.share(job_.n_items, thread + 1), n_panels * a.n_kv_heads)
    with code.repeat(lambda: item.value < end):
        now = item.value
        head = code.choose(job_.split, now // n_blocks, now % a.n_kv_heads)
        first_row = code.choose(job_.split, 0, now // a.n_kv_heads * panel)
        rows = code.smaller(panel, n_rows - first_row)
        first = job_.lowest_block(j.start + first_row // job_.group)
        last = (j.start + (first_row + rows - 1) // job_.group) // BLOCK + 1
        behind = code.choose(job_.split, now - head * n_blocks, 0)  # blocks that another thread attends to
        here = code.choose(job_.split, code.smaller(n_blocks - behind, end - now), last - first)
        parts = code.choose(behind > 0, job_.own + job_.scratch.parts, 0)
        job_.prepare_queries(head, first_row, rows)
        job_.attend(head, first_row, rows, first + behind, first + behind + here, parts)
        with code.when(here.equals(last - first)):
            job_.finish(head, first_row, rows)
        item.value = now + code.choose(job_.split, here, n_threads)
    return code.choose(job_.split, 1, 0)


@operation(3)
def _add_others(code: Code, thread: Value, n_threads: Value, job: Value) -> None:
    """End the head that this thread began and others ended, if there is one."""
    job_ = _Job(code, thread, n_threads, job)
    begin, end = job_.share(job_.n_items, thread), job_.share(job_.n_items, thread + 1)
    head = end // job_.n_blocks
    with code.when((begin <= head * job_.n_blocks) & (head * job_.n_blocks < end)):
        job_.add_parts((head + 1) * job_.n_blocks)
        job_.finish(head, code.value(0), job_.n_rows)


@kernel
def attend(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """Attention of the tokens of an ATTEND_JOB.

    All threads call it after a barrier behind the rows of queries, keys and values; none may use the outputs, nor
    change those rows, the work space or the cache, before they have met again.
    """
    if _write_keys(thread, n_threads, job):
        meet(barrier, n_threads)
    if _attend(thread, n_threads, job):
        meet(barrier, n_threads)
        _add_others(thread, n_threads, job)

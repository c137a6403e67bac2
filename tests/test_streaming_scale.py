"""Scheduling of experts on the null device: models of any size, any mix of chunks, sizes and faults, no arithmetic."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from interrupts import Interrupt
from streaming_models import Experts

from edgert.devices.base import READING, READY, ExpertGroup, Table
from edgert.devices.null import NullDevice
from edgert.engine import Engine, Session
from edgert.errors import ModelFileError
from edgert.experts.buffer import NEEDED
from edgert.experts.policies import POLICIES
from edgert.experts.predictors import PREDICTORS
from edgert.experts.slots import ALIGNMENT
from edgert.quant.formats import FORMATS, PackedPart
from edgert.types import Floats, Ids, ModelConfig, RopeConfig, RouterConfig

MIB = 1 << 20
STRIDE = 3 * 7168 * 2048 * 9 // 16 // ALIGNMENT * ALIGNMENT  # between records: what they take in DeepSeek-V3 at 4 bits


class SparseRecords:
    """Records of one to three times `n_bytes`, `stride` apart; down begins after two thirds. Nothing is checked."""

    def __init__(self, n_layers: int, n_expert: int, n_bytes: int, stride: int) -> None:
        keys = np.arange(n_layers * n_expert).reshape(n_layers, n_expert)
        self.record_bytes: Ids = (1 + keys % 3) * n_bytes
        self.record_offset: Ids = keys * stride
        self.n_bytes = keys.size * stride

    def parts(self, layer: int, expert: int) -> tuple[PackedPart, PackedPart, PackedPart]:
        """Of no format that matters."""
        at = int(self.record_bytes[layer, expert]) // 3 // 64 * 64
        first, second, third = (PackedPart(FORMATS["int4"], (1, 32), offset) for offset in (0, at, 2 * at))
        return first, second, third

    def check_record(self, layer: int, expert: int, record: npt.NDArray[np.uint8]) -> None:
        """All is well."""


class Watched(NullDevice):
    """A null device that looks at the buffer with each group; `repeat` makes each token's routes those of the first."""

    experts_at: Experts
    repeat = False
    most_bytes = 0  # of the buffer, in use

    def begin(self, embeddings: Floats) -> None:
        super().begin(embeddings)
        if self.repeat:
            self._random = np.random.default_rng(7)

    def experts(self, layer: int, group: ExpertGroup) -> None:
        buffer = self.experts_at.buffer
        here = buffer.state[layer * buffer.n_expert + group.ids]
        assert (here == (READING if group.phases == 1 else READY)).all(), "an expert that is away"
        used = int((buffer.sizes * (buffer.state > 0)).sum())
        assert used <= buffer.n_bytes
        self.most_bytes = max(self.most_bytes, used)
        done = buffer.pins[: layer * buffer.n_expert]
        assert not (done == NEEDED).any(), "a layer that is done holds experts"
        super().experts(layer, group)


def model(
    path: Path, records: SparseRecords, router: RouterConfig, device: type[Watched] = Watched, **options: Any
) -> tuple[Engine, Session, Any, Experts]:
    """An engine on the null device over a file of records."""
    n_layers, rope = len(records.record_bytes), RopeConfig("norm", 64)
    config = ModelConfig("llama", n_layers, 7168, 128, 128, 192, 128, 129280, 4096, 1e-6, rope, router, d_expert=2048)
    made = device(config, 4096)
    experts = Experts(made, records, path, router.top_k, checked=False, **options)
    made.experts_at = experts

    def embed(ids: list[int]) -> Floats:
        return np.zeros((len(ids), 7168), np.float32)

    return Engine(config, made, experts.residency, embed), Session(made.new_cache(4096, "f16")), made, experts


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SparseRecords]:
    """60 layers of 256 experts over 380 GB of holes; of each record only the beginning is read, for time's sake."""
    path, records = tmp_path_factory.mktemp("sparse") / "experts.bin", SparseRecords(60, 256, 4 * ALIGNMENT, STRIDE)
    try:
        with path.open("wb") as file:
            file.truncate(records.n_bytes)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of {records.n_bytes:,} bytes: {error.strerror}")
    return path, records


V3 = RouterConfig(256, 8, "sigmoid", True, 2.5)


def used_bytes(records: SparseRecords, engine: Engine) -> list[int]:
    """The bytes of the experts that each step uses from now on."""
    found: list[int] = []

    def note(device: Any) -> None:
        chosen = [np.unique(device.chosen(layer)[0]) for layer in range(engine.config.n_layers)]
        found.append(sum(int(records.record_bytes[layer, ids].sum()) for layer, ids in enumerate(chosen)))

    engine.trace = note
    return found


@pytest.mark.parametrize(("mode", "n_layers"), [("off", 60), ("always", 12)])
def test_every_pair_once_at_the_size_of_deepseek(
    mode: str, n_layers: int, deepseek: tuple[Path, SparseRecords]
) -> None:
    path, records = deepseek[0], SparseRecords(n_layers, 256, 4 * ALIGNMENT, STRIDE)
    engine, session, device, experts = model(path, records, V3, share=0.06, mode=mode)
    used = used_bytes(records, engine)
    long = 100 if n_layers == 12 else 20  # from 96 tokens on practically every expert of a layer is needed
    for n_tokens, chunk in ((1, 1), (12, 12), (20, 20), (long, long), (3, 1)):
        list(engine.prefill([1] * n_tokens, session, chunk=chunk))  # NullDevice.combine checks pairs and their order
        assert experts.residency.check() == []
    assert device.expert_bytes == sum(used) and device.calls["combine"] == 7 * n_layers
    counts = experts.residency.counts
    assert counts.expert_hits + counts.expert_misses >= sum(used) // (3 * 4 * ALIGNMENT)
    if mode == "off":  # what was not there was read; of the chunk of 100, whole layers with what it did not route to
        assert counts.bytes_read >= sum(used) * counts.expert_misses // (counts.expert_hits + counts.expert_misses) // 2
    assert 0.9 * experts.buffer.n_bytes < device.most_bytes <= experts.buffer.n_bytes
    experts.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_below_one_working_set_hits_are_what_fits(policy: str, deepseek: tuple[Path, SparseRecords]) -> None:
    """Where each token needs the same experts in the same order, a policy over all layers would keep none of them."""
    path, records = deepseek
    engine, session, device, experts = model(path, records, V3, share=0.5 * 8 / 256, policy=policy)
    device.repeat = True
    used = used_bytes(records, engine)
    list(engine.prefill([1] * 4, session, chunk=1))
    before = experts.residency.counts
    list(engine.prefill([1] * 5, session, chunk=1))
    counts = experts.residency.counts - before
    share = 1.0 - counts.bytes_read / sum(used[4:])
    assert 0.35 < share < 0.5 and counts.expert_hits > 0.35 * 5 * 60 * 8, share
    assert experts.residency.check() == []
    held = (experts.buffer.state == READY).reshape(60, 256).sum(axis=1)
    assert held.min() >= 2  # every layer has its part
    experts.close()


@pytest.mark.parametrize("predictors", [("previous",), ("path", "frequency")])
def test_what_repeats_is_read_ahead(predictors: tuple[str, ...], deepseek: tuple[Path, SparseRecords]) -> None:
    path, records = deepseek[0], SparseRecords(12, 256, 4 * ALIGNMENT, STRIDE)
    engine, session, device, experts = model(
        path, records, V3, share=0.5 * 8 / 256, mode="always", predictors=predictors
    )
    device.repeat = True
    list(engine.prefill([1] * 30, session, chunk=1))  # it learns
    before = experts.residency.counts
    list(engine.prefill([1] * 10, session, chunk=1))
    counts = experts.residency.counts - before
    needed = counts.prefetch_useful + counts.prefetch_late
    assert needed > 0.3 * counts.bytes_read and needed > counts.prefetch_wasted + counts.prefetch_evicted, counts
    assert needed + counts.prefetch_wasted + counts.prefetch_evicted <= counts.bytes_read + experts.buffer.n_bytes
    assert experts.residency.check() == []
    experts.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_memory_is_given_back_and_taken_again(deepseek: tuple[Path, SparseRecords]) -> None:
    path, records = deepseek[0], SparseRecords(12, 256, 16 * ALIGNMENT, STRIDE)
    engine, session, device, experts = model(path, records, V3, share=0.2)  # 77 MiB
    residency, planned = experts.residency, experts.buffer.n_bytes
    list(engine.prefill([1] * 40, session, chunk=20))
    full = resident_bytes()
    residency.request_bytes(0)
    assert residency.slot_bytes == planned  # not before it is safe
    list(engine.prefill([1], session))
    assert residency.slot_bytes == residency.least_bytes == 9 * 48 * ALIGNMENT
    assert full - resident_bytes() > 0.8 * (planned - residency.least_bytes)
    residency.request_bytes(2 * planned)
    list(engine.prefill([1] * 40, session, chunk=20))
    assert residency.slot_bytes == planned and device.most_bytes <= planned
    assert full - resident_bytes() < 0.3 * planned
    assert residency.check() == []
    experts.close()


# ---- anything in any order -------------------------------------------------------------------------------------------
class Witness(Watched):
    """Looks into each record that is to be computed: its number is at both ends, wherever it was moved to."""

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """The record's address, and its size in pages below the page's bits."""
        table[expert] = int(record.ctypes.data) + len(record) // ALIGNMENT

    def experts(self, layer: int, group: ExpertGroup) -> None:
        table = self._tables[layer]
        assert table is not None and self.config.router is not None
        for row, expert in zip(table[group.ids].tolist(), group.ids.tolist(), strict=True):
            start, n_bytes = row // ALIGNMENT * ALIGNMENT, row % ALIGNMENT * ALIGNMENT
            ends = [start] * bool(group.phases & 1) + [start + n_bytes - 8] * bool(group.phases & 2)
            key = layer * self.config.router.n_expert + expert
            assert all(ctypes.c_int64.from_address(end).value == key + 1 for end in ends), (layer, expert)
        super().experts(layer, group)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, SparseRecords]]:
    """Small files of records of 1 to 3 pages with their numbers at both ends, for models of so many layers."""
    return {n_layers: _numbered(tmp_path_factory.mktemp("numbered"), n_layers) for n_layers in (1, 2, 5)}


def _numbered(folder: Path, n_layers: int) -> tuple[Path, SparseRecords]:
    path, records = folder / "experts.bin", SparseRecords(n_layers, 16, ALIGNMENT, 3 * ALIGNMENT)
    content = np.zeros(records.n_bytes // 8, np.int64)
    for key, (offset, size) in enumerate(zip(records.record_offset.flat, records.record_bytes.flat, strict=True)):
        content[offset // 8] = content[(offset + size) // 8 - 1] = key + 1
    path.write_bytes(content.tobytes())
    return path, records


@pytest.mark.parametrize("n_layers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_chunks_sizes_and_faults(
    seed: int, n_layers: int, numbered: dict[int, tuple[Path, SparseRecords]]
) -> None:
    path, records = numbered[n_layers]
    draw = random.Random(seed)
    engine, session, _, experts = model(
        path,
        records,
        RouterConfig(16, draw.choice((1, 2, 5, 16))),
        Witness,
        share=draw.choice((0.0, 0.2, 0.5, 0.9, 1.0)),
        policy=draw.choice(list(POLICIES)),
        mode=draw.choice(("off", "auto", "always", "always")),
        predictors=draw.sample(list(PREDICTORS), 2),
        halves=draw.random() < 0.7,
        chunk_bytes=draw.choice((4096, 8192, 1 << 16)),
        lanes=draw.choice((1, 3, 8)),
    )
    failing = False

    def fault(view: memoryview, offset: int) -> None:
        if failing and draw.random() < 0.02:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    experts.file.fault = fault
    n_failed, planned = 0, experts.buffer.n_bytes
    for _ in range(25):
        failing = draw.random() < 0.4
        if draw.random() < 0.2:
            experts.residency.request_bytes(draw.randrange(2 * planned))
        session.tokens.clear()
        try:
            n_tokens = draw.choice((1, 1, 1, 4, 16, 17, 60))
            list(engine.prefill([1] * n_tokens, session, chunk=draw.choice((1, 60)) if n_tokens < 10 else 60))
        except ModelFileError as error:
            assert "failed: Input/output error" in str(error) and "layer" in str(error)
            n_failed += 1
        assert experts.residency.check() == []
    failing = False
    list(engine.prefill([1] * 20, session, chunk=7))
    assert experts.residency.check() == []
    experts.close()
    assert n_failed or experts.residency.counts.expert_misses < 500


def test_a_prompt_finds_only_its_last_experts_here(numbered: dict[int, tuple[Path, SparseRecords]]) -> None:
    """The first of them has no room until the last are given up, and these must stay once they are back."""
    path, records = numbered[5]
    for _ in range(5):
        engine, session, _, experts = model(path, records, RouterConfig(16, 5), Witness, share=0.0, chunk_bytes=4096)
        buffer = experts.buffer
        buffer.read(deque(range(10, 16)), 0)
        while buffer.reads:
            buffer.book(experts.reader.wait())
        list(engine.prefill([1] * 60, session, chunk=60))
        assert experts.residency.check() == []
        experts.close()


@pytest.mark.skipif(sys.gettrace() is not None, reason="lines are being traced already")
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_an_interrupt_at_any_line_while_records_are_moved(
    n_tokens: int, numbered: dict[int, tuple[Path, SparseRecords]]
) -> None:
    path, records = numbered[5]
    draw = random.Random(n_tokens)
    engine, session, _, experts = model(path, records, RouterConfig(16, 3), Witness, share=0.3, mode="always")
    n_interrupted = 0
    for _ in range(200):
        try:
            with Interrupt(draw.randrange(1, 800)):
                list(engine.prefill([1] * n_tokens, session, chunk=20))
        except KeyboardInterrupt:
            n_interrupted += 1
            if draw.random() < 0.5:
                continue
        session.tokens.clear()
        list(engine.prefill([1] * n_tokens, session, chunk=20))  # what is computed is looked at
        assert experts.residency.check() == []
    assert n_interrupted > 50
    experts.close()

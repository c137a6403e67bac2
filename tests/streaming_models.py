"""Models whose experts are streamed, put together by hand, so that tests choose what loading would choose for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.architectures import read_config
from edgert.devices.cpu import CpuDevice
from edgert.engine import Engine, Session
from edgert.errors import ModelFileError
from edgert.experts.buffer import Checked, ExpertBuffer, Records
from edgert.experts.policies import make_policy
from edgert.experts.predictors import DEFAULT
from edgert.experts.prefetch import Prefetcher
from edgert.experts.prefetch_control import Controller, Mode
from edgert.experts.slots import ALIGNMENT, Slots
from edgert.experts.streamed import Streamed
from edgert.quant.checksum import checksum
from edgert.quant.formats import MatrixSource, PackedPart
from edgert.storage.bundle import Bundle
from edgert.storage.flash import FlashFile
from edgert.storage.reader import Reader
from edgert.types import Floats, Ids
from edgert.weights import Weights


class Faulty(FlashFile):
    """A file whose reads go as `fault` says: it gets view and offset, and returns what the system would, or None."""

    fault: Callable[[memoryview, int], int | None] | None = None

    def _preadv(self, view: memoryview, offset: int) -> int:
        got = self.fault(view, offset) if self.fault is not None else None
        return super()._preadv(view, offset) if got is None else got


class WrittenRecords:
    """Experts by [layer][expert], each gate, up and down of any formats, written one after the other to a file."""

    def __init__(self, path: Path, experts: Sequence[Sequence[Sequence[MatrixSource]]]) -> None:
        self.path = path
        shape = len(experts), len(experts[0])
        self.record_bytes: Ids = np.zeros(shape, np.int64)
        self.record_offset: Ids = np.zeros(shape, np.int64)
        self._checksums, self._parts = np.zeros(shape, np.uint64), dict[tuple[int, int], Any]()
        with path.open("wb") as file:
            for layer, of_layer in enumerate(experts):
                for expert, matrices in enumerate(of_layer):
                    record = self._packed(layer, expert, matrices)
                    self.record_offset[layer, expert], self.record_bytes[layer, expert] = file.tell(), len(record)
                    self._checksums[layer, expert] = checksum(record)
                    file.write(record.tobytes())

    def _packed(self, layer: int, expert: int, matrices: Sequence[MatrixSource]) -> npt.NDArray[np.uint8]:
        parts, n_bytes = [], 0
        for matrix in matrices:
            parts.append(PackedPart(matrix.format, matrix.shape, n_bytes))
            n_bytes = -(-(n_bytes + parts[-1].n_bytes) // 64) * 64
        record = np.zeros(-(-n_bytes // ALIGNMENT) * ALIGNMENT, np.uint8)
        for matrix, part in zip(matrices, parts, strict=True):
            matrix.pack(record[part.offset : part.offset + part.n_bytes])
        self._parts[layer, expert] = tuple(parts)
        return record

    def parts(self, layer: int, expert: int) -> tuple[PackedPart, PackedPart, PackedPart]:
        """Gate, up and down within a record."""
        found: tuple[PackedPart, PackedPart, PackedPart] = self._parts[layer, expert]
        return found

    def check_record(self, layer: int, expert: int, record: npt.NDArray[np.uint8]) -> None:
        """Raise ModelFileError if the bytes of a record are not those that were written."""
        if checksum(record) != int(self._checksums[layer, expert]):
            raise ModelFileError(f"{self.path}: layer {layer}, expert {expert} is damaged")


class Experts:
    """A Streamed over a device and a file of records, with all that it needs; `share` of the experts' bytes in RAM."""

    def __init__(
        self,
        device: Any,
        records: Records,
        path: Path,
        top_k: int,
        *,
        share: float,
        policy: str = "lru",
        mode: Mode = "off",
        predictors: Sequence[str] = DEFAULT,
        checked: bool = True,
        halves: bool = True,  # gate and up may run while down is on its way, however small the records
        lanes: int = 4,
        chunk_bytes: int = 16 << 10,  # so that records are read in pieces
    ) -> None:
        n_layers, n_expert = records.record_bytes.shape
        total, largest = int(records.record_bytes.sum()), int(records.record_bytes.max())
        self.file, self.policy = Faulty(path), make_policy(policy, records.record_bytes)
        self.reader = Reader(
            self.file,
            lanes=lanes,
            chunk_bytes=chunk_bytes,
            check=Checked(records) if checked else None,
            name=lambda key: f"layer {key // n_expert}, expert {key % n_expert}",
        )
        self.slots = Slots(max(int(share * total) // ALIGNMENT * ALIGNMENT, (top_k + 1) * largest))
        self.buffer = ExpertBuffer(device, records, self.reader, self.slots, self.policy)
        self.buffer.HALVES_FROM = 0 if halves else 1 << 30
        ahead = None
        if mode != "off":
            ahead = Prefetcher(top_k, records.record_bytes, Restless(n_layers, 4096, mode=mode), predictors)
        self.residency = Streamed(device, self.buffer, self.policy, top_k, ahead)

    def close(self) -> None:
        """End the lanes and close the file."""
        self.reader.close()
        self.file.close()


class Restless(Controller):
    """Goes on trying whatever it costs: tiny models are to be read ahead for, with and without in turn."""

    FIRST, CONTROL, RUN, LONGEST_RUN = 2, 3, 5, 5
    LEAST_IDLE = STARTS_AT = ENDS_AT = -100.0
    _LAYER_S = _READ_S = 0.0


class Host:
    """A device that holds a bundle's hot weights, for one engine after the other; all are closed with it."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 2,
        device: Any = CpuDevice,
        n_context: int = 256,
        records: tuple[Records, Path] | None = None,  # other experts than the bundle's own
    ) -> None:
        self.config = config = read_config(bundle.metadata, str(bundle.path))
        weights = Weights(bundle, config)
        self._records, self._path = records or (bundle, bundle.experts_path)
        self.device = device(config, n_context, threads=threads, rope_divisors=weights.rope_divisors())
        table = self.device.new_table(self._records.record_bytes.shape[1])
        for layer, expert in np.argwhere(self._records.record_bytes):  # the device learns which formats will come
            self.device.place_expert(table, expert, self._records.parts(layer, expert), np.zeros(0, np.uint8))
        weights.load_into(self.device, lambda stage, fraction: None, experts=False)
        rows = weights.embed(list(range(config.n_vocab))) if config.n_vocab < 1000 else None
        self._embed: Callable[[list[int]], Floats] = weights.embed if rows is None else lambda ids: rows[ids]
        self._cache = self.device.new_cache(n_context, "f16")
        self._experts: Experts | None = None

    def streamed(self, **options: Any) -> tuple[Engine, Session, Experts]:
        """An engine with experts of these options, which takes the place of the last one; and an empty session."""
        assert self.config.router is not None
        self._close_experts()
        self._experts = Experts(self.device, self._records, self._path, self.config.router.top_k, **options)
        return Engine(self.config, self.device, self._experts.residency, self._embed), self.session(), self._experts

    def session(self) -> Session:
        """An empty session; there is one cache."""
        return Session(self._cache)

    def _close_experts(self) -> None:
        if self._experts is not None:
            self._experts.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_experts()
        self.device.close()


def answer(engine: Engine, session: Session, prompt: list[int], chunk: int, n_tokens: int) -> tuple[Any, list[int]]:
    """Logits (n, n_vocab) of a prompt run in chunks, and the tokens that follow greedily."""
    n, rows, tokens = 1, [], list[int]()
    for n in engine.prefill(prompt, session, chunk=chunk):
        rows += [part.copy() for part in engine.logits(n)]
    for _ in range(n_tokens):
        tokens.append(int(engine.last_logits(n).argmax()))
        engine.step(tokens[-1:], session)
        n = 1
    return np.concatenate(rows), tokens

"""What goes wrong while experts are streamed: a clear error for that request, and the next one is answered as ever."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from interrupts import Interrupt
from models import HERE, golden_path
from streaming_models import Faulty, Host, answer

import edgert
from edgert import streaming
from edgert.errors import EdgertError, ModelFileError
from edgert.model import Model
from edgert.pack import pack
from edgert.storage import flash
from edgert.storage.bundle import Bundle

PROMPT = [(5 * i * i + 3) % 300 for i in range(40)]
NAME, N_TOKENS = "olmoe-q8_0", 12  # 2 layers of 6 experts, of which a token uses 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return pack(golden_path(NAME), tmp_path / "model.edge", progress=lambda stage, fraction: None)


@pytest.fixture(scope="module")
def expected() -> tuple[int, ...]:
    with edgert.load(golden_path(NAME), residency=1.0) as model:
        return model.generate(PROMPT, max_tokens=N_TOKENS).token_ids


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Faulty]:
    """The files that streaming opens from now on, into which faults can be put."""
    opened: list[Faulty] = []

    def open_file(path: Path, **options: Any) -> Faulty:
        opened.append(Faulty(path, **options))
        return opened[-1]

    monkeypatch.setattr(streaming, "FlashFile", open_file)
    return opened


def load(path: Path, **options: Any) -> Model:
    """With as few experts in RAM as run."""
    return edgert.load(path, residency=0.01, **{"prefetch": "always", "context": 256, **options})


def check(model: Model, expected: tuple[int, ...]) -> None:
    """A model answers as ever, and its books are in order."""
    assert model.generate(PROMPT, max_tokens=N_TOKENS).token_ids == expected
    assert residency(model).check() == []


def residency(model: Model) -> Any:
    return model._open().engine.residency


# ---- the drive -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE])
@pytest.mark.parametrize("share_of_reads", [0.05, 1.0])
def test_a_drive_that_fails(
    number: int, share_of_reads: float, path: Path, files: list[Faulty], expected: tuple[int, ...]
) -> None:
    draw, broken = random.Random(1), False

    def fault(view: memoryview, offset: int) -> None:
        if broken and draw.random() < share_of_reads:
            raise OSError(number, os.strerror(number))

    with load(path) as model:
        (file,) = files
        file.fault = fault
        for stream in (model.generate(PROMPT, max_tokens=200, stream=True) for _ in range(5)):
            next(stream)
            broken = True
            with pytest.raises(
                ModelFileError, match=rf"layer \d, expert \d: .*experts.bin: reading at byte .*{os.strerror(number)}"
            ):
                stream.finish()
            assert residency(model).check() == []
            broken = False
            check(model, expected)


def test_short_reads_go_on(path: Path, files: list[Faulty], expected: tuple[int, ...]) -> None:
    with load(path) as model:
        (file,) = files

        def fault(view: memoryview, offset: int) -> int | None:
            return flash.FlashFile._preadv(file, view[:4096], offset) if len(view) > 4096 else None

        file.fault = fault
        check(model, expected)


def test_a_file_that_ends_too_early(path: Path, files: list[Faulty], expected: tuple[int, ...]) -> None:
    with load(path) as model:
        (file,) = files
        stream = model.generate(PROMPT, max_tokens=200, stream=True)
        next(stream)
        file.fault = lambda view, offset: 0
        with pytest.raises(ModelFileError, match=r"expert \d: .*experts.bin: .* gave too few; copy or pack it again"):
            stream.finish()
        file.fault = None
        check(model, expected)


def test_a_drive_that_is_slow(path: Path, files: list[Faulty], expected: tuple[int, ...]) -> None:
    def fault(view: memoryview, offset: int) -> None:
        time.sleep(0.002)

    with load(path) as model:
        files[0].fault = fault
        said = model.generate(PROMPT, max_tokens=N_TOKENS)
        assert said.token_ids == expected and residency(model).check() == []
        assert said.usage.flash_wait_s > 0.002 and said.usage.flash_busy_s >= 0.002 * N_TOKENS


# ---- the files -------------------------------------------------------------------------------------------------------
def test_records_cut_off_and_put_back(path: Path, expected: tuple[int, ...]) -> None:
    file = path / "experts.bin"
    content = file.read_bytes()
    with load(path) as model:
        check(model, expected)
        os.truncate(file, 8192)
        with pytest.raises(ModelFileError, match=r"experts.bin: the file has 8,192 bytes now, reading up to byte"):
            model.generate(PROMPT, max_tokens=N_TOKENS)
        assert residency(model).check() == []
        with pytest.raises(ModelFileError, match=r"has 8,192 bytes, the manifest says"):
            load(path)
        with file.open("r+b") as opened:
            opened.write(content)
        check(model, expected)


def test_an_open_model_outlives_its_files(path: Path, expected: tuple[int, ...]) -> None:
    with load(path) as model:
        for file in path.iterdir():
            file.unlink()
        check(model, expected)
    with pytest.raises(ModelFileError, match=r"model.edge"):
        load(path)


def flip(file: Path, at: int) -> None:
    """Flip one bit of a file."""
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("mode", ["off", "always"])
def test_a_flipped_bit_is_found_when_it_is_read_first(mode: str, path: Path, expected: tuple[int, ...]) -> None:
    with Bundle.open(path) as bundle:
        offset = int(bundle.record_offset[1, 2])
    flip(path / "experts.bin", offset + 777)
    with load(path, prefetch=mode) as model:
        for _ in range(2):
            with pytest.raises(
                ModelFileError,
                match=rf"^layer 1, expert 2: .*experts.bin: layer 1, expert 2 at byte {offset:,} has checksum",
            ):
                model.generate(PROMPT, max_tokens=N_TOKENS)
            assert residency(model).check() == []
        flip(path / "experts.bin", offset + 777)
        check(model, expected)


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("hot.bin", None, r"hot.bin: tensor [\w.]+ at byte [\d,]+ has checksum"),
        ("manifest.json", 300, "manifest.json"),
        ("metadata.gguf", 2000, "metadata.gguf: its digest is not the one in the manifest"),
    ],
)
def test_a_flipped_bit_elsewhere_is_found_at_load(
    name: str, at: int | None, message: str, path: Path, expected: tuple[int, ...]
) -> None:
    if at is None:  # within a tensor, not between two
        with Bundle.open(path) as bundle:
            largest = max(bundle.manifest.tensors.values(), key=lambda tensor: tensor.n_bytes)
        at = largest.offset + largest.n_bytes // 2
    flip(path / name, at)
    with pytest.raises(EdgertError, match=message):
        load(path)
    flip(path / name, at)
    with load(path) as model:
        check(model, expected)


def test_a_flipped_bit_in_a_row_of_the_embedding_table(path: Path, expected: tuple[int, ...]) -> None:
    with Bundle.open(path) as bundle:
        offset = bundle.table.offset + PROMPT[-1] * bundle.table.stride
    with load(path) as model:
        flip(path / "hot.bin", offset + 9)
        with pytest.raises(ModelFileError, match=rf"hot.bin: row {PROMPT[-1]} of token_embd.weight at byte {offset:,}"):
            model.generate(PROMPT, max_tokens=N_TOKENS)
        assert residency(model).check() == []
        flip(path / "hot.bin", offset + 9)
        check(model, expected)


# ---- answers that end early ------------------------------------------------------------------------------------------
def test_streams_that_are_dropped_cancelled_or_closed(path: Path, expected: tuple[int, ...]) -> None:
    with load(path) as model:
        for end in ("drop", "cancel", "close"):
            stream = model.generate(PROMPT, max_tokens=200, stream=True)
            for _ in range(3):
                next(stream)
            if end == "cancel":
                stream.cancel()
                assert stream.finish().finish_reason == "cancelled"
            elif end == "close":
                stream.close()
            del stream
            assert residency(model).check() == []
            check(model, expected)


def test_a_prompt_is_cancelled_between_chunks(path: Path, files: list[Faulty], expected: tuple[int, ...]) -> None:
    with load(path, context=512) as model:
        engine, begun = model._open().engine, threading.Event()
        engine.device.chunk = 8
        files[0].fault = lambda view, offset: begun.set() or time.sleep(0.01)  # type: ignore[func-returns-value]
        stream = model.generate(PROMPT * 10, max_tokens=1, stream=True)
        threading.Thread(target=lambda: begun.wait(60) and stream.cancel()).start()
        assert stream.finish().finish_reason == "cancelled"
        assert 0 < len(model._open().session.tokens) < 400
        files[0].fault = None
        check(model, expected)


@pytest.mark.parametrize("streaming_thread", [True, False])
def test_a_model_is_closed_while_it_reads(streaming_thread: bool, path: Path, files: list[Faulty]) -> None:
    before = threading.active_count()
    model = load(path)
    files[0].fault = lambda view, offset: time.sleep(0.003)
    stream = model.generate(PROMPT, max_tokens=200, stream=True)
    next(stream)
    if streaming_thread:
        model.close()
        with pytest.raises(StopIteration):
            next(stream)
    else:
        said: list[Any] = []
        thread = threading.Thread(target=lambda: said.append(stream.finish()))
        thread.start()
        time.sleep(0.05)
        model.close()
        thread.join(60)
        assert said[0].finish_reason == "cancelled"
    with pytest.raises(EdgertError, match="closed"):
        model.generate(PROMPT)
    for _ in range(1000):
        if threading.active_count() <= before:
            break
        time.sleep(0.01)
    assert threading.active_count() <= before


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.gettrace() is not None, reason="lines are being traced already")
@pytest.mark.parametrize("chunk", [40, 5])
def test_an_interrupt_at_any_line(chunk: int, path: Path) -> None:
    draw = random.Random(chunk)
    with Bundle.open(path) as bundle, Host(bundle, threads=1) as host:
        engine, session, _ = host.streamed(share=1.0)
        right = answer(engine, session, PROMPT, chunk, 4)
        engine, session, experts = host.streamed(share=0.4, policy="lfru", mode="always")
        n_interrupted = 0
        for _ in range(150):
            if draw.random() < 0.3:
                experts.residency.request_bytes(draw.randrange(2 * experts.buffer.most_bytes))
            session.tokens.clear()
            try:
                with Interrupt(draw.randrange(1, 2500)):
                    answer(engine, session, PROMPT, chunk, 4)
            except KeyboardInterrupt:
                n_interrupted += 1
                if draw.random() < 0.5:
                    continue  # the next one is interrupted as well
            session.tokens.clear()
            logits, tokens = answer(engine, session, PROMPT, chunk, 4)
            assert (logits == right[0]).all() and tokens == right[1]
            assert experts.residency.check() == []
        assert n_interrupted > 100


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_interrupts_by_a_signal(path: Path, expected: tuple[int, ...]) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before, draw, n_interrupted = signal.signal(signal.SIGALRM, interrupt), random.Random(1), 0
    try:
        with load(path) as model:
            for _ in range(40):
                try:
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.05))
                    model.generate(PROMPT, max_tokens=150)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    n_interrupted += 1
                check(model, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert n_interrupted > 5


# ---- several models --------------------------------------------------------------------------------------------------
def test_two_models_in_one_process(path: Path, tmp_path: Path, expected: tuple[int, ...]) -> None:
    other = pack(golden_path("llama-q4_0"), tmp_path / "other.edge", progress=lambda stage, fraction: None)
    with edgert.load(golden_path("llama-q4_0"), residency=1.0) as model:
        other_expected = model.generate(PROMPT, max_tokens=N_TOKENS).token_ids
    with load(path) as first, load(other) as second, load(path) as third:
        streams = [model.generate(PROMPT, max_tokens=N_TOKENS, stream=True) for model in (first, second, third)]
        for _ in range(4):
            for stream in streams:
                next(stream)
        threads = [threading.Thread(target=stream.finish) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        said = [stream.completion.token_ids for stream in streams]
        assert said == [expected, other_expected, expected]
        first.close()
        check(third, expected)
        check(second, other_expected)


FORKED = """
import os, sys, edgert
with edgert.load(sys.argv[1], residency=0.01, prefetch="always", threads=2) as model:
    stream = model.generate([1, 2, 3, 4, 5], stream=True, max_tokens=20)
    next(stream)
    child = os.fork()
    if child == 0:
        said = []
        for call in (lambda: next(stream), lambda: model.generate([1, 2]), lambda: model.logits([1])):
            try:
                call()
            except edgert.EdgertError as error:
                said.append("before fork" in str(error))
        model.close()
        with edgert.load(sys.argv[1], residency=0.01, threads=2) as own:
            own.generate([1, 2, 3], max_tokens=5)
        os._exit(0 if said == [True] * 3 else 1)
    _, status = os.waitpid(child, 0)
    assert len(stream.finish().token_ids) == 20
    assert model._open().engine.residency.check() == []
    sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_no_lanes_and_says_so(path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, env=env, cwd=HERE)
    assert (done.returncode, done.stderr) == (0, "")

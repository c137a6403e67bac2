"""Routing traces: what is recorded comes back, and a file that is none or lies is refused in one line."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import ModelFileError, OptionError
from edgert.experts import trace as traces
from edgert.experts.trace import Trace, TraceWriter

N_LAYERS, N_EXPERT, TOP_K = 3, 300, 4
SIZES = np.full((N_LAYERS, N_EXPERT), 8192)
SIZES[0] = 0  # a dense layer


def routes(n_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights (n_layers, n_tokens, top_k)."""
    draw = np.random.default_rng(seed)
    ids = np.argsort(draw.random((N_LAYERS, n_tokens, N_EXPERT)), axis=2)[:, :, :TOP_K]
    return ids, draw.random(ids.shape).astype(np.float32)


def written(path: Path) -> dict[str, Any]:
    """A sound trace's arrays; the file is there as well."""
    with TraceWriter(path, "model", SIZES, TOP_K) as writer:
        for n_tokens in (7, 1):
            writer.add(*routes(n_tokens))
    with np.load(path) as archive:
        return dict(archive)


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    ids, weights = routes(5)
    scores = np.random.default_rng(1).normal(size=(2, N_EXPERT + 20)).astype(np.float32)  # padded, as a device has them
    with TraceWriter(tmp_path / "t.npz", "digest", SIZES, TOP_K) as writer:
        writer.add(ids, weights)
        writer.add(ids[:, :1], weights[:, :1], [list(scores), list(scores[:1]), []])
    trace = Trace.load(tmp_path / "t.npz")
    assert (trace.model, trace.n_tokens, trace.top_k, trace.layers) == ("digest", 6, TOP_K, [1, 2])
    assert np.array_equal(trace.ids[:, :5], ids) and trace.ids.dtype == np.uint16
    assert np.allclose(trace.weights[:, :5], weights, atol=1e-3) and trace.steps.tolist() == [5, 1]
    assert np.array_equal(trace.record_bytes, SIZES)
    assert trace.lookahead(0, 4) == [] and trace.lookahead(2, 5) == []
    first, second = trace.lookahead(0, 5)
    for row, given in ((first, scores[0]), (second, scores[1])):
        given = given[:N_EXPERT]
        assert np.abs(row - (given - given.mean()) / given.std()).max() <= 1 / 32 + 1e-5
    assert len(trace.lookahead(1, 5)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_the_last_tokens_can_be_had_alone(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    trace = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(trace.last(3).ids, trace.ids[:, 5:]) and trace.last(3).steps.tolist() == [1, 1, 1]
    assert trace.last(100).n_tokens == 8


def test_nothing_is_written_for_nothing_and_of_a_long_run_the_newest_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TraceWriter(tmp_path / "none.npz", "", SIZES, TOP_K):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(traces, "_MOST_TOKENS", 10)
    ids, weights = routes(23)
    scores = np.random.default_rng(1).normal(size=N_EXPERT).astype(np.float32)
    with TraceWriter(tmp_path / "t.npz", "", SIZES, TOP_K) as writer:
        for start, end in ((0, 12), (12, 13), (13, 18), (18, 21), (21, 23)):
            writer.add(ids[:, start:end], weights[:, start:end], [[scores], [], []])
        assert writer.n_tokens == 10
    trace = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(trace.ids, ids[:, 13:]) and trace.steps.tolist() == [5, 3, 2]
    assert [bool(trace.lookahead(0, token)) for token in range(10)] == [token in (4, 7, 9) for token in range(10)]
    with TraceWriter(tmp_path / "t.npz", "", SIZES, TOP_K) as writer:
        writer.add(ids, weights, [[scores], [], []])
        writer.add(ids[:, :1], weights[:, :1])
    trace = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(trace.ids[:, :9], ids[:, 14:]) and trace.steps.tolist() == [9, 1] and trace.lookahead(0, 8)


def test_a_long_run_takes_a_few_megabytes(tmp_path: Path) -> None:
    sizes, (ids, weights) = np.full((N_LAYERS, N_EXPERT), 4096), routes(512)
    writer = TraceWriter(tmp_path / "t.npz", "", sizes, TOP_K)
    for _ in range(20):
        writer.add(ids, weights)
    assert writer.n_tokens == traces._KEPT_BYTES // (N_LAYERS * (4 * TOP_K + 2 * N_EXPERT))
    writer.close()
    assert Trace.load(tmp_path / "t.npz").n_tokens == writer.n_tokens


@pytest.mark.parametrize("name", ["", "not/there.npz", "file/t.npz", "t\0.npz"])
def test_a_path_that_cannot_be_written_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"trace=.* cannot be written .*; name another file"):
        TraceWriter(tmp_path / name, "", SIZES, TOP_K)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


LEAVES = """
import os, sys, numpy as np
from pathlib import Path
from edgert.experts.trace import TraceWriter
writer = TraceWriter(Path(sys.argv[1]), "m", np.full((2, 8), 4096), 2)
ids = np.array([[[0, 1]], [[2, 3]]])
writer.add(ids, np.ones(ids.shape, np.float32))
if os.fork() == 0:
    writer.add(ids, np.ones(ids.shape, np.float32))
    sys.exit()
os.wait()
assert not os.path.exists(sys.argv[1])
"""


def test_a_program_that_closes_nothing_leaves_its_trace(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LEAVES, str(tmp_path / "t.npz")], check=True, timeout=60)
    assert Trace.load(tmp_path / "t.npz").n_tokens == 1


def test_scores_that_are_not_numbers_are_recorded_as_none_or_zero(tmp_path: Path) -> None:
    ids, weights = routes(1)
    scores = np.full(N_EXPERT, np.nan, np.float32)
    with TraceWriter(tmp_path / "t.npz", "", SIZES, TOP_K) as writer:
        writer.add(ids, weights, [[scores, scores], [scores], []])
    assert all((row == 0).all() for row in Trace.load(tmp_path / "t.npz").lookahead(0, 0))


def lie(name: str, value: Any) -> Any:
    """A change of one array."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = value(arrays[name]) if callable(value) else value

    return change


LIES = {
    "version": lie("version", np.int64(2)),
    "type of ids": lie("ids", lambda a: a.astype(np.float32)),
    "id too large": lie("ids", lambda a: np.full_like(a, N_EXPERT)),
    "one id twice": lie("ids", lambda a: np.zeros_like(a)),
    "tokens": lie("ids", lambda a: a[:, :-1]),
    "no token": lambda arrays: arrays.update({n: arrays[n][:, :0] for n in ("ids", "weights", "ahead")}),
    "layers": lie("record_bytes", lambda a: a[:-1]),
    "negative size": lie("record_bytes", lambda a: -a),
    "huge size": lie("record_bytes", lambda a: a << 40),
    "half a layer": lie("record_bytes", lambda a: a * (np.arange(N_EXPERT) > 5)),
    "no experts": lie("record_bytes", lambda a: a * 0),
    "steps": lie("steps", lambda a: a + 1),
    "step of none": lie("steps", lambda a: np.append(a, 0)),
    "scores": lie("ahead", lambda a: a.astype(np.int16)),
    "missing": lambda arrays: arrays.pop("weights"),
    "more": lie("more", np.zeros(3)),
    "objects": lie("model", np.array([{}], object)),
}


@pytest.mark.parametrize("what", LIES)
def test_a_trace_that_lies_is_refused(what: str, tmp_path: Path) -> None:
    arrays = written(tmp_path / "t.npz")
    LIES[what](arrays)
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ModelFileError, match=r"t\.npz is not a routing trace \(") as caught:
        Trace.load(tmp_path / "t.npz")
    assert "\n" not in str(caught.value)


def test_what_would_unpack_to_gigabytes_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "t.npz")
    monkeypatch.setattr(traces, "_MOST_BYTES", 20_000)
    with pytest.raises(ModelFileError, match="bytes unpacked"):
        Trace.load(tmp_path / "t.npz")


def test_a_damaged_file_is_refused_or_read_never_worse(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    content = (tmp_path / "t.npz").read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content[: len(content) if draw.random() < 0.7 else draw.integers(len(content))])
        for place in draw.integers(len(damaged) or 1, size=3 if damaged else 0):
            damaged[place] ^= 1 << draw.integers(8)
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            Trace.load(tmp_path / "bad.npz")
        except ModelFileError:
            pass


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a.txt", "b")
    for name in ("text", "zip", "absent", "."):
        with pytest.raises(ModelFileError, match="--trace"):
            Trace.load(tmp_path / name)

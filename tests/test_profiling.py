"""Profiling: the same bits in RAM or from flash, in steps of any size and interrupted anywhere; and what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import decoded, write_folder
from models import engine_of, golden_path
from profiling_runs import CHUNK, run, save_every_chunk, silent, write_text
from test_profile import assert_same
from toy_dense import write_dense

from edgert import needs, profile_journal, profile_run
from edgert.errors import OptionError, StorageError
from edgert.experts.profile import OWN_TEXT, Profile
from edgert.loading import open_model
from edgert.model_digest import model_digest
from edgert.pack import pack
from edgert.profiling import default_out


@pytest.fixture
def model() -> Path:
    return golden_path("qwen3moe-q4_0")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return [write_text(tmp_path / "one.txt"), write_text(tmp_path / "two.txt", seed=1)]


# ---- what a profile says ---------------------------------------------------------------------------------------------
def test_a_profile_is_what_the_engine_routes_and_gives_to_its_experts(
    model: Path, texts: list[Path], tmp_path: Path
) -> None:
    done = run(model, tmp_path / "p.npz", texts, activations="f32", kv_type="f32")
    profile = Profile.load(tmp_path / "p.npz")
    assert_same(profile, done.profile)
    assert done.n_run == profile.n_tokens == 8 * CHUNK and done.n_resumed == 0 and done.seconds > 0
    assert [domain.name for domain in profile.domains] == ["one.txt", "two.txt"] and not profile.own_text
    assert profile.shares == {"one.txt": 0.5, "two.txt": 0.5} and profile.sensitivity is None
    engine, session = engine_of(model)
    shape = profile.record_bytes.shape
    inputs, hidden = np.zeros(profile.input_moments.shape), np.zeros(profile.hidden_moments.shape)
    counts = np.zeros(shape)
    for domain in profile.domains:
        assert len(domain.held_out) and len(domain.held_out) % CHUNK == 0
        for start in range(0, len(domain.tokens), CHUNK):

            def observe(layer: int, domain: Any = domain, start: int = start) -> None:
                routed = engine.device.routed(layer)
                assert np.array_equal(domain.ids[layer, start : start + CHUNK], routed.routes.ids)
                weights = domain.weights[layer, start : start + CHUNK]
                assert np.array_equal(weights, routed.routes.weights.astype(np.float16))
                for expert in range(shape[1]):
                    pairs = slice(routed.first[expert], routed.first[expert + 1])
                    rows = engine.device.inputs(layer)[routed.tokens[pairs]].astype(np.float64)
                    inputs[layer, expert] += (rows**2).sum(axis=0)
                    hidden[layer, expert] += (engine.device.hidden(layer)[pairs].astype(np.float64) ** 2).sum(axis=0)
                    counts[layer, expert] += len(rows)

            engine.observe = observe
            session.tokens.clear()
            assert list(engine.prefill(domain.tokens[start : start + CHUNK].tolist(), session)) == [CHUNK]
    engine.device.close()
    counts = np.maximum(counts, 1)[..., None]
    np.testing.assert_allclose(profile.input_moments, inputs / counts, rtol=1e-6)
    np.testing.assert_allclose(profile.hidden_moments, hidden / counts, rtol=1e-6)
    assert profile.frequency().sum() == pytest.approx(2 * profile.top_k)


def test_recall_is_known_for_what_can_guess(model: Path, texts: list[Path], tmp_path: Path) -> None:
    recall = run(model, tmp_path / "p.npz", texts).profile.recall
    assert {"router", "path", "previous", "frequency", "router + path + frequency"} <= set(recall)
    assert np.isnan(recall["router"][0, 0]), "no layer looks ahead to the first"
    assert 0.2 < recall["router"][0, 1] <= 1 and 0 < recall["frequency"][0, 0] <= 1


# ---- the same bits ---------------------------------------------------------------------------------------------------
def test_experts_on_flash_steps_of_any_size_and_threads_give_the_same_bits(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(model, tmp_path / "p.npz", texts).profile
    ways: list[tuple[int, dict[str, Any]]] = [
        (32, {}),
        (5, {"threads": 2}),
        (32, {"residency": "60%"}),
        (7, {"residency": "70%", "policy": "lru", "prefetch": "always"}),
        (1, {"residency": "60%"}),
    ]
    for place, (step, options) in enumerate(ways):
        monkeypatch.setattr(needs, "_CHUNKS", (step,))
        found = run(model, tmp_path / f"{place}.npz", texts, **options).profile
        assert_same(found, expected)


def test_the_embedded_model_profiles_alike_from_flash_and_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_run, "_WARM_TOKENS", 16)
    monkeypatch.setattr(profile_run, "_GUESSED_TOKENS", 16)
    text = write_text(tmp_path / "t.txt", 5000)
    found = [
        run(None, tmp_path / f"{residency}.npz", [text], context=512, n_tokens=512, residency=residency).profile
        for residency in (None, "25%")
    ]
    assert found[0].record_bytes.shape == (30, 16) and found[0].input_moments.any()
    assert_same(found[1], found[0])


class Stops:
    """Progress that raises at the n-th call after the model was loaded."""

    def __init__(self, n: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.n, self.error, self.loaded = n, error, False

    def __call__(self, stage: str, fraction: float) -> None:
        self.loaded |= stage.startswith(("profiling", "the model writes"))
        if self.loaded:
            self.n -= 1
            if self.n < 0:
                raise self.error


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk is saved, and progress is called at every step."""
    save_every_chunk(monkeypatch)


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize(
    ("own_text", "error"), [(False, KeyboardInterrupt), (False, RuntimeError), (True, KeyboardInterrupt)]
)
def test_an_interrupted_run_goes_on_and_gives_the_same_bits(
    own_text: bool,
    error: type[BaseException],
    model: Path,
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "_CHUNKS", (32,))
    texts = [] if own_text else texts
    expected = run(model, tmp_path / "p.npz", texts).profile
    out, done = tmp_path / "q.npz", None
    for n in [150] * 10 if own_text else range(1, 200, 7):  # 150 tokens are less than the model writes
        with contextlib.suppress(error):
            done = run(model, out, texts, Stops(n, error))
            break
        assert not out.exists()
    assert done is not None and n > 1 and (own_text or done.n_resumed)
    assert_same(done.profile, expected)
    assert not list(tmp_path.glob("*.part"))


KILLED = """
import sys, time
from pathlib import Path
from edgert import profile_journal
from edgert.profiling import profile_model
profile_journal._LEAST_S = 0.0
def progress(stage, fraction):
    if "384 of" in stage or "measuring" in stage:
        print("here", flush=True)
        time.sleep(60)
import edgert.pack_meter
edgert.pack_meter._REPORT_S = 0.0
profile_model(Path(sys.argv[1]), Path(sys.argv[2]), corpora=[Path(p) for p in sys.argv[3:]], progress=progress,
              n_tokens=512, held_out=0.1, context=64, threads=1)
"""


def test_a_killed_run_goes_on_and_gives_the_same_bits(model: Path, texts: list[Path], tmp_path: Path) -> None:
    expected = run(model, tmp_path / "p.npz", texts).profile
    arguments = [sys.executable, "-W", "ignore", "-c", KILLED, str(model), str(tmp_path / "q.npz"), *map(str, texts)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        with pytest.raises(
            OptionError, match=r"another process is at work on .*q\.npz: wait until it is done, or name"
        ):
            run(model, tmp_path / "q.npz", texts)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "q.npz.part").exists() and not (tmp_path / "q.npz").exists()
    done = run(model, tmp_path / "q.npz", texts)
    assert 0 < done.n_resumed < 512 and done.n_run + done.n_resumed == 512
    assert_same(done.profile, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "p.npz", "q.npz", "two.txt"]


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize("change", ["text", "tokens", "damage", "model", "kv_type"])
def test_what_was_run_counts_for_the_same_run_alone(
    change: str, model: Path, texts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "p.npz"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, texts, Stops(6))
    part, options = tmp_path / "p.npz.part", dict[str, Any]()
    assert part.stat().st_size
    if change == "text":
        write_text(texts[1], seed=7)
    elif change == "tokens":
        options["n_tokens"] = 6 * CHUNK
    elif change == "damage":
        part.write_bytes(part.read_bytes()[:-100])
    elif change == "model":
        model = golden_path("qwen3moe-q4_1")
    else:
        options["kv_type"] = "f32"
    done = run(model, out, texts, **options)
    assert done.n_resumed == 0 and done.n_run == options.get("n_tokens", 8 * CHUNK)
    assert_same(done.profile, run(model, tmp_path / "q.npz", texts, **options).profile)


def test_a_profile_that_is_there_is_left_as_it_is(model: Path, texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    first = run(model, out, texts)
    time = out.stat().st_mtime_ns
    again = run(model, out, texts)
    assert (again.n_run, again.n_resumed, out.stat().st_mtime_ns) == (0, first.profile.n_tokens, time)
    assert_same(again.profile, first.profile)
    kept = out.read_bytes()
    for difference, other, corpora, options in (
        ("of one.txt, two.txt, not of one.txt", model, texts[:1], {}),
        ("256 tokens of one.txt, not 384", model, texts, {"n_tokens": 12 * CHUNK}),
        ("[0-9]+ tokens kept back of one.txt, not 0", model, texts, {"held_out": 0.0}),
        ("run with defaults, not with --kv-type f32", model, texts, {"kv_type": "f32"}),
        ("in chunks of 64 tokens, not of 32, see --context", model, texts, {"context": 32}),
        ("of --corpus files, not of own text", model, [], {}),
        ("of another model than qwen3moe-q4_1.gguf", golden_path("qwen3moe-q4_1"), texts, {}),
    ):
        with pytest.raises(OptionError, match=rf"other settings \(({difference})\): name another .* or remove it$"):
            run(other, out, corpora, **options)
    write_text(texts[1], seed=7)
    with pytest.raises(OptionError, match=r"two\.txt had other text"):
        run(model, out, texts)
    assert out.read_bytes() == kept, "what took long to learn is not lost"
    out.write_text("my thesis")
    with pytest.raises(OptionError, match="is no profile: remove it, or name another file"):
        run(model, out, texts)
    assert out.read_text() == "my thesis"


# ---- the model's own text --------------------------------------------------------------------------------------------
def test_a_model_writes_its_own_text_and_the_profile_says_so(model: Path, tmp_path: Path) -> None:
    profile = run(model, tmp_path / "p.npz", []).profile
    assert profile.own_text and [domain.name for domain in profile.domains] == [OWN_TEXT]
    domain = profile.domains[0]
    assert len(domain.tokens) == 4 * CHUNK and len(domain.held_out) == 2 * CHUNK
    chunks = np.concatenate([domain.tokens, domain.held_out]).reshape(-1, CHUNK)
    assert len({tuple(chunk) for chunk in chunks}) == 6, "each chunk is drawn anew"
    assert len({tuple(chunk[:4]) for chunk in chunks}) == 6, "and prompts of what is kept back are its own"
    more = run(model, tmp_path / "q.npz", [], n_tokens=6 * CHUNK).profile.domains[0]
    assert np.array_equal(more.tokens[: 4 * CHUNK], domain.tokens), "whatever else was written"
    again = run(model, tmp_path / "p.npz", [])
    assert again.n_run == 0
    with pytest.raises(
        OptionError, match="256 tokens of own text, 128 more kept back, not 256 tokens of own text, 0 more"
    ):
        run(model, tmp_path / "p.npz", [], held_out=0)


# ---- which model, and where ------------------------------------------------------------------------------------------
def digest(path: Path) -> str:
    file = open_model(path)
    try:
        return model_digest(file)
    finally:
        file.close()


def test_the_digest_tells_models_apart_and_nothing_else(model: Path, tmp_path: Path) -> None:
    found = digest(model)
    assert len(found) == 32 and found != digest(golden_path("qwen3moe-q4_1"))
    copy = tmp_path / "other.gguf"
    copy.write_bytes(model.read_bytes())
    assert digest(copy) == found, "wherever it lies"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1  # the last weight of the last tensor
    copy.write_bytes(content)
    assert digest(copy) != found


def test_the_digest_of_a_hugging_face_folder_is_that_of_its_weights(tmp_path: Path) -> None:
    metadata, weights = decoded(golden_path("qwen3moe-f32"))
    folders = [write_folder(tmp_path / str(n), metadata, weights, kind="F32", shards=n) for n in (1, 3)]
    assert digest(folders[0]) == digest(folders[1]), "however it is cut into files"
    weights["blk.1.ffn_down_exps.weight"] = -weights["blk.1.ffn_down_exps.weight"]
    other = write_folder(tmp_path / "other", metadata, weights, kind="F32", shards=1)
    assert digest(other) != digest(folders[0])


def test_a_profile_goes_beside_its_model(model: Path, tmp_path: Path) -> None:
    assert default_out(model) == model.with_name("qwen3moe-q4_0.profile.npz")
    assert default_out(None) == Path("smollm2-moe-q4_0.profile.npz"), "not into the installation"
    bundle = pack(model, tmp_path / "small.edge", progress=silent)
    assert default_out(bundle) == tmp_path / "small.profile.npz"


def test_a_bundle_gives_the_routes_of_its_source(model: Path, texts: list[Path], tmp_path: Path) -> None:
    bundle = pack(model, tmp_path / "small.edge", progress=silent)
    found, expected = (run(path, tmp_path / f"{path.name}.npz", texts).profile for path in (bundle, model))
    assert_same(found.domains, expected.domains)
    assert_same(found.input_moments, expected.input_moments)
    assert found.model == expected.model and np.array_equal(found.record_bytes, expected.record_bytes)


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_what_cannot_be_profiled_is_refused_before_anything_runs(
    model: Path, texts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"not/p\.npz cannot be written \(No such file.*another file with --out"):
        run(model, tmp_path / "not" / "p.npz", texts)
    with pytest.raises(OptionError, match="context=8 is too short to profile; use at least 16"):
        run(model, tmp_path / "p.npz", texts, context=8)
    for wrong in ({"n_tokens": 0}, {"held_out": 1.0}, {"held_out": -0.1}):
        with pytest.raises(OptionError, match="at least 1, and a share from 0 to below 1"):
            run(model, tmp_path / "p.npz", texts, **wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "two.txt"]


@pytest.mark.usefixtures("saving")
def test_a_full_disk_is_said_and_what_was_kept_before_counts(
    model: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = profile_journal.write_arrays, list[Path]()

    def write(path: Path, arrays: Any, *, compress: bool) -> None:
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(path)
        real(path, arrays, compress=compress)

    monkeypatch.setattr(profile_journal, "write_arrays", write)
    with pytest.raises(StorageError, match=r"p\.npz\.part cannot be written \(No space left.*; make room"):
        run(model, tmp_path / "p.npz", texts)
    monkeypatch.undo()
    assert run(model, tmp_path / "p.npz", texts).n_resumed == 3 * CHUNK


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    path = write_dense(tmp_path / "dense.gguf")
    with pytest.raises(OptionError, match="has no experts to profile"):
        run(path, tmp_path / "p.npz", [])

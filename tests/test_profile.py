"""The profile: what is saved comes back, a file that is none or lies is refused in one line, and its views are sums."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgert.errors import ModelFileError, OptionError
from edgert.experts.profile import Domain, Profile, Sensitivity

N_LAYERS, N_EXPERT, TOP_K, D_MODEL, D_EXPERT, CHUNK = 3, 8, 2, 16, 4, 4
SIZES = np.full((N_LAYERS, N_EXPERT), 4096)
SIZES[0] = 0  # a dense layer


def make_domain(name: str, n_chunks: int, n_held_out: int = 1, seed: int = 0) -> Domain:
    draw = np.random.default_rng(seed)
    n_tokens = n_chunks * CHUNK
    ids = np.argsort(draw.random((N_LAYERS, n_tokens, N_EXPERT)), axis=2)[..., :TOP_K].astype(np.uint8)
    weights = draw.random(ids.shape).astype(np.float16)
    tokens, held_out = draw.integers(100, size=n_tokens), draw.integers(100, size=n_held_out * CHUNK)
    return Domain(name, tokens.astype(np.int32), held_out.astype(np.int32), ids, weights)


def make_sensitivity(n_tokens: int, formats: tuple[str, ...] = ("q2", "q4")) -> Sensitivity:
    draw = np.random.default_rng(5)
    return Sensitivity(
        "gptq",
        formats,
        draw.random((N_LAYERS, N_EXPERT, 3, len(formats)), dtype=np.float32),
        draw.integers(n_tokens + 1, size=SIZES.shape).astype(np.int32),
        draw.random(N_LAYERS, dtype=np.float32),
        n_tokens,
    )


def make_profile(*domains: Domain, sensitivity: Sensitivity | None = None) -> Profile:
    draw = np.random.default_rng(3)
    domains = domains or (make_domain("books", 3, seed=1), make_domain("code", 2, seed=2))
    n_tokens = sum(len(domain.tokens) for domain in domains)
    return Profile(
        model="m",
        digest="d",
        chunk=CHUNK,
        record_bytes=SIZES,
        domains=domains,
        shares={domain.name: len(domain.tokens) / n_tokens for domain in domains},
        own_text=False,
        input_moments=draw.random((N_LAYERS, N_EXPERT, D_MODEL), dtype=np.float32),
        hidden_moments=draw.random((N_LAYERS, N_EXPERT, D_EXPERT), dtype=np.float32),
        recall={"router": np.full((2, N_LAYERS), np.nan, np.float32), "path": draw.random((2, 3), dtype=np.float32)},
        sensitivity=sensitivity,
    )


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit, with the same types."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (Profile, Domain, Sensitivity)):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


@pytest.mark.parametrize("kept", ["measured", "assumed", ""])
def test_what_is_saved_comes_back(kept: str, tmp_path: Path) -> None:
    sensitivity = replace(make_sensitivity(20), is_measured=kept == "measured") if kept else None
    profile = make_profile(sensitivity=sensitivity)
    if kept:
        profile = replace(profile, settings={"own": [4, 2], "kinds": [None, "f32"], "template": [[1, 2], [3]]})
    profile.save(tmp_path / "p.npz")
    assert_same(Profile.load(tmp_path / "p.npz"), profile)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_frequency_and_mass_are_weighted_means_of_the_domains() -> None:
    profile = make_profile()
    for shares in (None, {"books": 1.0}, {"books": 3.0, "code": 1.0}):
        total = sum((shares or profile.shares).values())
        frequency, mass = np.zeros(SIZES.shape), np.zeros(SIZES.shape)
        for name, share in (shares or profile.shares).items():
            domain = profile.domain(name)
            for layer in (1, 2):
                for token in range(len(domain.tokens)):
                    for place in range(TOP_K):
                        expert, part = domain.ids[layer, token, place], share / total / len(domain.tokens)
                        frequency[layer, expert] += part
                        mass[layer, expert] += part * float(domain.weights[layer, token, place])
        np.testing.assert_allclose(profile.frequency(shares), frequency, rtol=1e-6)
        np.testing.assert_allclose(profile.mass(shares), mass, rtol=1e-6)
    with pytest.raises(OptionError, match="no text called 'law'; it has books, code"):
        profile.frequency({"law": 1.0})
    with pytest.raises(OptionError, match="not all 0"):
        profile.frequency({"books": 0.0})


def test_a_loss_is_gain_times_share_of_the_tokens_times_error() -> None:
    sensitivity = make_sensitivity(20)
    loss = sensitivity.loss()
    assert loss.shape == sensitivity.errors.shape and loss.dtype == np.float32
    expected = sensitivity.gains[2] * sensitivity.rows[2, 5] / 20 * sensitivity.errors[2, 5, 1, 0]
    assert loss[2, 5, 1, 0] == pytest.approx(expected, rel=1e-6)


def test_a_format_that_does_not_fit_costs_without_end_and_comes_back(tmp_path: Path) -> None:
    sensitivity = make_sensitivity(20)
    sensitivity.errors[:, :, 2, 1] = np.inf
    sensitivity.rows[2, 3] = 0
    make_profile(sensitivity=sensitivity).save(tmp_path / "p.npz")
    found = Profile.load(tmp_path / "p.npz").sensitivity
    assert found is not None and np.isinf(found.loss()[:, :, 2, 1]).all() and np.isfinite(found.loss()[..., 0]).all()


def test_routes_can_be_replayed() -> None:
    from edgert.experts import replay

    profile = make_profile()
    trace = profile.trace()
    assert trace.n_tokens == profile.n_tokens == 20 and trace.layers == profile.layers == [1, 2]
    assert profile.trace("code").n_tokens == 8 and trace.lookahead(1, 3) == []
    assert replay.compare_policies(trace, [0.5])["belady"][0].n_asked == 10 * 2 * TOP_K


@pytest.mark.parametrize(
    "settings",
    [
        {"template": [[]]},
        {"template": [[-1]]},
        {"template": [["a"]]},
        {"template": 3},
        {"own": 1},
        {"own": [1, 2, 3]},
        {"own": [1, "2"]},
        {"kinds": {}},
        {"model": "x" * (1 << 20)},
    ],
)
def test_settings_that_lie_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    replace(make_profile(), settings=settings).save(tmp_path / "p.npz")
    with pytest.raises(ModelFileError, match=r"p\.npz is not a profile \("):
        Profile.load(tmp_path / "p.npz")


def lie(name: str, change: Any) -> Any:
    """A change of one array."""
    return lambda arrays: arrays.update({name: change(arrays[name])})


LIES = {
    "version": lie("version", lambda a: a + 1),
    "type of ids": lie("ids", lambda a: a.astype(np.float32)),
    "id too large": lie("ids", lambda a: np.full_like(a, N_EXPERT)),
    "one id twice": lie("ids", lambda a: a * 0),
    "tokens": lie("ids", lambda a: a[:, :-1]),
    "weights": lie("weights", lambda a: a * np.float16(np.nan)),
    "negative weights": lie("weights", lambda a: -a),
    "wide weights": lie("weights", lambda a: a.astype(np.float64)),
    "negative token": lie("tokens", lambda a: a - 1000),
    "counts": lie("n_tokens", lambda a: a[::-1] + 4),
    "counts wrap": lie("n_tokens", lambda a: np.array([2**62, 2**62 + 20])),
    "negative counts": lie("n_tokens", lambda a: np.array([24, -4])),
    "half chunks": lie("n_tokens", lambda a: np.array([11, 9])),
    "held out": lie("n_held_out", lambda a: a + 4),
    "chunk": lie("chunk", lambda a: a * 0),
    "no domain": lambda arrays: arrays.update({n: arrays[n][:0] for n in ("domains", "shares", "n_tokens")}),
    "same names": lie("domains", lambda a: a[[0, 0]]),
    "no name": lie("domains", lambda a: np.array(["", "x"])),
    "shares": lie("shares", lambda a: a * 0),
    "negative share": lie("shares", lambda a: np.array([2.0, -1.0])),
    "share that is none": lie("shares", lambda a: a * np.nan),
    "layers": lie("record_bytes", lambda a: a[:-1]),
    "half a layer": lie("record_bytes", lambda a: a * (np.arange(N_EXPERT) > 5)),
    "no experts": lie("record_bytes", lambda a: a * 0),
    "moments": lie("input_moments", lambda a: -a),
    "width": lie("hidden_moments", lambda a: a[:, :-1]),
    "recall": lie("recall", lambda a: a * 5),
    "recall of none": lie("predictors", lambda a: a[:-1]),
    "errors": lie("errors", lambda a: a * np.inf),
    "formats": lie("formats", lambda a: a[[0, 0]]),
    "rows": lie("rows", lambda a: a + 100),
    "gains": lie("gains", lambda a: a - 5),
    "no tokens": lie("n_sensitivity", lambda a: a * 0),
    "half a sensitivity": lambda arrays: arrays.pop("gains"),
    "missing": lambda arrays: arrays.pop("weights"),
    "more": lambda arrays: arrays.update(more=np.zeros(3)),
    "objects": lambda arrays: arrays.update(model=np.array([{}], object)),
}


@pytest.mark.parametrize("what", LIES)
def test_a_profile_that_lies_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    make_profile(sensitivity=make_sensitivity(20)).save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    LIES[what](arrays)
    np.savez(path, **arrays)
    with pytest.raises(ModelFileError, match=r"p\.npz is not a profile \(.*\); give a file made with") as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_or_read_never_worse(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    make_profile(sensitivity=make_sensitivity(20)).save(path)
    content, draw = path.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content[: len(content) if draw.random() < 0.7 else draw.integers(len(content))])
        for place in draw.integers(len(damaged) or 1, size=3 if damaged else 0):
            damaged[place] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        try:
            Profile.load(path)
        except ModelFileError:
            pass


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name, reason in (("text", "zip"), ("absent", "No such file"), (".", "directory")):
        with pytest.raises(ModelFileError, match=f"{reason}.*; give a file made with `edgert profile`"):
            Profile.load(tmp_path / name)


def test_a_profile_is_not_half_written(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    profile = make_profile()
    profile.save(path)
    with pytest.raises(ValueError):
        replace(profile, recall={"path": np.zeros(3, np.float32)}).save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["p.npz"]
    assert_same(Profile.load(path), profile)

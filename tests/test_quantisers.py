"""Quantisers: what they store is what they measured, stronger ones err less, and bad input is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from edgert.errors import OptionError
from edgert.quant.formats import F16, FORMATS, Format
from edgert.quant.quantise_expert import Biases, option_errors, quantise_expert
from edgert.quant.quantisers import QUANTISERS, Inputs, quantise
from edgert.quant.reference import activate
from edgert.types import Floats

INTEGER = [format for format in FORMATS.values() if format.is_integer]


def rows(n: int, n_in: int, seed: int = 1) -> Floats:
    """Correlated inputs with a few strong columns, as a norm leaves them."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((n_in, n_in)) / np.sqrt(n_in) * np.exp(random.standard_normal(n_in))
    return (random.standard_normal((n, n_in)) @ mixing).astype(np.float32)


def weights(n_out: int, n_in: int, seed: int = 2) -> Floats:
    return (np.random.default_rng(seed).standard_normal((n_out, n_in)) * 0.02).astype(np.float32)


@functools.cache
def inputs_of(n: int, n_in: int) -> tuple[Floats, Inputs]:
    """Rows, and what quantisers know of them, shared as quantisers share it."""
    x = rows(n, n_in)
    return x, Inputs(x)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("format", INTEGER, ids=lambda format: format.name)
def test_every_format_is_stored_as_it_was_measured(format: Format, quantiser: str) -> None:
    (x, inputs), w = inputs_of(300, 256), weights(5, 256)
    found = quantise(w, format, quantiser, inputs)
    matrix = found.matrix
    assert found.quantiser == quantiser and matrix.format is format and matrix.shape == w.shape
    assert matrix.values.dtype == np.uint8 and int(matrix.values.max()) < 1 << format.bits and matrix.not_finite() == -1
    matrix.pack(np.empty(format.matrix_bytes(*matrix.shape), np.uint8))
    error = np.mean(np.sum(np.square((w - matrix.to_float()) @ x.T, dtype=np.float64), axis=0))
    assert found.error == pytest.approx(error, rel=1e-3)
    assert error < 8 * 4.0**-format.bits * np.mean(np.sum(np.square(w @ x.T), axis=0))


@pytest.mark.parametrize("name", ["int2-g16", "int2-k", "int2-g64-min", "int3", "int3-k", "int4", "int4-k", "int6-k"])
def test_stronger_quantisers_err_less(name: str) -> None:
    x, w = rows(2000, 256), weights(16, 256)
    inputs, fresh = Inputs(x[:1500]), x[1500:]
    errors = {}
    for quantiser in QUANTISERS:
        found = quantise(w, FORMATS[name], quantiser, inputs).matrix.to_float()
        errors[quantiser] = np.mean(np.square((w - found) @ fresh.T))  # rows that were not seen
    assert errors["gptq"] < 0.8 * errors["hqq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def plain_gptq(w: Floats, hessian: Floats, group: int, bits: int) -> Floats:
    """Algorithm 1 of arXiv 2210.17323, column by column, with the scales of round-to-nearest."""
    factor = np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T
    rest, made = w.astype(np.float64), np.empty_like(w)
    for j in range(w.shape[1]):
        if j % group == 0:
            part = rest[:, j : j + group]
            extreme = np.take_along_axis(part, np.abs(part).argmax(axis=1)[:, None], axis=1)[:, 0]
            scale = (extreme / -(1 << bits - 1)).astype(np.float16).astype(np.float64)
        made[:, j] = scale * np.clip(np.rint(rest[:, j] / scale), -(1 << bits - 1), (1 << bits - 1) - 1)
        rest[:, j + 1 :] -= np.outer((rest[:, j] - made[:, j]) / factor[j, j], factor[j, j + 1 :])
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_fed_back_at_least_as_well_as_by_the_published_algorithm(bits: int) -> None:
    (_, inputs), w = inputs_of(3000, 128), weights(16, 128)

    def cost(made: Floats) -> float:
        return float(np.sum((w - made) @ inputs.shrunk * (w - made)))

    found = quantise(w, FORMATS[f"int{bits}-g64"], "gptq", inputs).matrix.to_float()
    assert cost(found) < 0.9 * cost(plain_gptq(w, inputs.shrunk, 64, bits))


@pytest.mark.parametrize("n", [40, 90, 400])
def test_what_is_expected_of_unseen_rows_hangs_on_no_basis(n: int) -> None:
    """Where a half has fewer rows than columns, its rest has as many bases as there are orders of the columns."""
    random = np.random.default_rng(n)
    rows = (random.normal(size=(n, 96)) @ random.normal(size=(96, 96))).astype(np.float32)
    order = random.permutation(96)
    found, other = Inputs(rows).shrunk, Inputs(rows[:, order]).shrunk
    np.testing.assert_allclose(other, found[np.ix_(order, order)], atol=1e-5 * float(np.abs(found).max()))
    assert np.linalg.eigvalsh(found)[0] > 0
    assert np.trace(found) == pytest.approx(np.trace(Inputs(rows).hessian()), rel=1e-3)


def test_few_rows_promise_no_more_than_unseen_ones_keep() -> None:
    """Along its smallest eigenvectors a Hessian of few rows is far too small; what is used errs upwards."""
    x = rows(20000, 128)
    truth, few = Inputs(x[200:]).hessian(), Inputs(x[:200])
    shares = []
    for hessian in (few.hessian(), few.shrunk):
        _, directions = np.linalg.eigh(hessian)
        promised, kept = (np.sum(directions * (h @ directions), axis=0)[:64].sum() for h in (hessian, truth))
        shares.append(promised / kept)
    assert shares[0] < 0.5 and 0.9 < shares[1] < 2.5, shares


def test_without_inputs_the_weights_decide() -> None:
    w = weights(16, 128)
    for quantiser in QUANTISERS:
        found = quantise(w, FORMATS["int3"], quantiser)
        assert found.quantiser == ("rtn" if quantiser == "rtn" else "hqq")
        assert found.error == pytest.approx(128 * np.mean(np.square(w - found.matrix.to_float())), rel=1e-3)


def test_too_few_rows_fall_back() -> None:
    found = quantise(weights(16, 256), FORMATS["int3"], "gptq", Inputs(rows(8, 256)))
    assert found.quantiser == "hqq" and np.isfinite(found.error)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("name", ["int2-k", "int2-g16", "int3-k", "int4-k", "int4-min", "int8", "iq4-nl", "mxfp4"])
def test_extreme_matrices(name: str, quantiser: str) -> None:
    x = rows(300, 256)
    x[:, 7] = 0.0  # a column that no token uses
    w = weights(16, 256)
    w[0], w[1], w[2, :32] = 0.0, 0.02, 0.0
    w[3] *= 1e-7
    w[4, 5] = 40.0
    found = quantise(w, FORMATS[name], quantiser, Inputs(x))
    assert np.isfinite(found.error) and found.matrix.not_finite() == -1
    assert not found.matrix.to_float()[0].any()
    nothing = quantise(w, FORMATS[name], quantiser, Inputs(np.zeros((300, 256), np.float32)))
    assert nothing.error == 0.0 and nothing.matrix.not_finite() == -1


def test_tokens_weigh_what_their_expert_is_worth() -> None:
    x = rows(600, 64)
    importance = np.r_[np.ones(300), np.zeros(300)].astype(np.float32)
    whole = Inputs(x, importance)
    half = Inputs(x[:300])
    np.testing.assert_allclose(whole.hessian() * 2, half.hessian(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.moments, np.diagonal(whole.hessian()))


def test_bad_input_is_refused() -> None:
    w = weights(16, 64)
    with pytest.raises(OptionError, match="known are rtn, hqq, awq, gptq"):
        quantise(w, FORMATS["int4"], "gguf")
    with pytest.raises(OptionError, match="64 columns are no multiple of 256"):
        quantise(w, FORMATS["int4-k"])
    with pytest.raises(OptionError, match="f16 holds no integers"):
        quantise(w, F16)
    with pytest.raises(OptionError, match="not finite"):
        quantise(np.where(w > 0, np.nan, w), FORMATS["int4"])
    with pytest.raises(OptionError, match="inputs of a matrix are not finite"):
        quantise(w, FORMATS["int4"], "gptq", Inputs(np.full((200, 64), np.inf, np.float32)))


def expert() -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """gate, up, down of an expert 64 -> 32 -> 64, its inputs and what its output is worth to each token."""
    importance = np.random.default_rng(5).uniform(0.1, 1, 700).astype(np.float32)
    return weights(32, 64, 1) * 10, weights(32, 64, 2) * 10, weights(64, 32, 3), rows(700, 64), importance


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu-oss"])
def test_an_expert_and_what_each_projection_costs(activation: str) -> None:
    gate, up, down, x, importance = expert()
    names = ("int8", "int2-g16", "int3-g64")
    errors = option_errors(gate, up, down, [FORMATS[name] for name in names], "gptq", x, importance, activation)
    assert errors.shape == (3, 3) and errors.dtype == np.float32
    assert (errors[:, 0] < errors[:, 1]).all() and np.isinf(errors[2, 2]) and np.isfinite(errors[:2]).all()

    formats = (FORMATS["int4"], FORMATS["int3"], FORMATS["int2-g16"])
    found = quantise_expert(gate, up, down, formats, "gptq", x, importance, activation)
    assert tuple(matrix.format for matrix in found.matrices) == formats
    g, u, d = (matrix.to_float() for matrix in found.matrices)
    chosen = np.arange(512) * 700 // 512
    difference = activate(x @ gate.T, x @ up.T, activation) @ down.T - activate(x @ g.T, x @ u.T, activation) @ d.T
    measured = np.sum(np.square(difference[chosen]), axis=1) @ np.square(importance[chosen]) / 512
    assert found.error == pytest.approx(measured, rel=1e-3)


def biases_of(n: int) -> Biases:
    """Of gate and up, as large as their products."""
    random = np.random.default_rng(8)
    return random.normal(1, 2, n).astype(np.float32), random.normal(-1, 2, n).astype(np.float32)


@pytest.mark.parametrize("quantiser", ["gptq", "awq"])
@pytest.mark.parametrize("activation", ["swiglu-oss", "silu"])
def test_what_gate_and_up_add_is_in_the_error(quantiser: str, activation: str) -> None:
    gate, up, down, x, importance = expert()
    b, c = biases = biases_of(32)

    def given(gate: Floats, up: Floats, down: Floats, x: Floats) -> Floats:
        return activate(x @ gate.T + b, x @ up.T + c, activation) @ down.T  # down's own bias is in both

    formats = [FORMATS[name] for name in ("int3", "int3", "int3")]
    found = quantise_expert(gate, up, down, formats, quantiser, x, importance, activation, biases)
    made = [matrix.to_float() for matrix in found.matrices if matrix]
    chosen = np.arange(512) * 700 // 512
    difference = (given(gate, up, down, x) - given(*made, x))[chosen]
    measured = np.sum(np.square(difference), axis=1) @ np.square(importance[chosen]) / 512
    assert found.error == pytest.approx(measured, rel=1e-3)

    for place in range(3):  # of each projection alone, on rows that it was not fitted to
        one: list[Format | None] = [None] * 3
        one[place] = formats[place]
        alone = quantise_expert(gate, up, down, one, quantiser, x, importance, activation, biases)
        pairs = zip((gate, up, down), alone.matrices, strict=True)
        changed = [matrix.to_float() if matrix else weights for weights, matrix in pairs]
        fresh = rows(2700, 64)[700:]
        error = np.square(given(gate, up, down, fresh) - given(*changed, fresh)).sum(axis=1).mean()
        ones = np.ones(700, np.float32)
        told = option_errors(gate, up, down, formats[:1], quantiser, x, ones, activation, biases)[place, 0]
        assert 0.6 < told / error < 1.6, (place, told, error)


def test_down_is_fitted_to_what_gate_and_up_really_make() -> None:
    """With biases as large as the products, a fit that knows nothing of them serves other rows."""
    gate, up, down, x, importance = expert()
    formats, biases, fresh = [None, None, FORMATS["int2"]], biases_of(32), rows(2700, 64)[700:]
    made = activate(fresh @ gate.T + biases[0], fresh @ up.T + biases[1], "swiglu-oss")
    errors = []
    for known in (biases, None):
        found = quantise_expert(gate, up, down, formats, "gptq", x, importance, "swiglu-oss", known).matrices[2]
        assert found is not None
        errors.append(np.square(made @ (down - found.to_float()).T).mean())
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("quantiser", ["gptq", "awq"])
def test_a_sample_of_outputs_tells_the_error_of_all(monkeypatch: pytest.MonkeyPatch, quantiser: str) -> None:
    _, _, _, x, importance = expert()
    gate, up, down = weights(320, 64, 1) * 10, weights(320, 64, 2) * 10, weights(256, 320, 3)
    gate[:5] *= 6  # a few units make most of the output
    formats = [FORMATS[name] for name in ("int4", "int3", "int2")]
    sampled = option_errors(gate, up, down, formats, quantiser, x, importance)
    monkeypatch.setattr("edgert.quant.quantise_expert._ERROR_OUTPUTS", 1 << 20)
    assert np.abs(np.log(sampled / option_errors(gate, up, down, formats, quantiser, x, importance))).max() < 0.25


@pytest.mark.parametrize("n", [40, 100])
def test_errors_of_a_rare_expert_are_those_of_rows_that_it_was_not_fitted_to(n: int) -> None:
    gate, up, down, _, _ = expert()
    x, fresh = rows(n, 64), rows(n + 2000, 64)[n:]  # of the same mixture
    format, one = FORMATS["int2"], np.ones(len(fresh), np.float32)
    told = option_errors(gate, up, down, [format], "gptq", x, one[:n])[2, 0]
    found = quantise_expert(gate, up, down, [None, None, format], "gptq", x, one[:n]).matrices[2]
    assert found is not None
    missing = activate(fresh @ gate.T, fresh @ up.T, "silu") @ (down - found.to_float()).T
    assert told > 0.8 * np.square(missing).sum(axis=1).mean()
    alone = option_errors(gate, up, down, [format], "gptq", x[:1], one[:1])
    assert np.array_equal(alone, option_errors(gate, up, down, [format], "hqq", x[:1], one[:1]))  # knows nothing


def test_down_makes_good_what_gate_and_up_miss() -> None:
    gate, up, down, x, importance = expert()
    fresh = rows(2400, 64)[700:]  # of the same mixture
    target = activate(fresh @ gate.T, fresh @ up.T, "silu") @ down.T
    found = quantise_expert(gate, up, down, [FORMATS[n] for n in ("int2", "int2", "int8")], "gptq", x, importance)
    g, u, d = (matrix.to_float() for matrix in found.matrices if matrix)
    alone = quantise(down, FORMATS["int8"], "gptq", Inputs(activate(x @ gate.T, x @ up.T, "silu"))).matrix.to_float()
    made = activate(fresh @ g.T, fresh @ u.T, "silu")
    assert np.square(target - made @ d.T).mean() < 0.95 * np.square(target - made @ alone.T).mean()


@pytest.mark.parametrize("quantiser", ["hqq", "awq"])
@pytest.mark.parametrize("name", ["int2", "int2-g16-min", "int2-k", "int3"])
def test_what_is_fitted_keeps_the_size_of_what_an_expert_gives(quantiser: str, name: str) -> None:
    x, n = rows(700, 256), np.ones(700, np.float32)
    gate, up, down = weights(256, 256, 1) * 10, weights(256, 256, 2) * 10, weights(256, 256, 3)
    found = quantise_expert(gate, up, down, [FORMATS[name]] * 3, quantiser, x, n)
    g, u, d = (matrix.to_float() for matrix in found.matrices if matrix)
    whole, made = activate(x @ gate.T, x @ up.T, "silu") @ down.T, activate(x @ g.T, x @ u.T, "silu") @ d.T
    assert 0.9 < np.sum(whole * made) / np.sum(np.square(whole)) < 1.1


def test_awq_scales_columns_of_down_where_up_can_take_the_inverse() -> None:
    gate, up, down, x, importance = expert()
    up[3] *= 50  # what it makes weighs most
    formats = [FORMATS[name] for name in ("int8", "int8", "int3")]
    found = quantise_expert(gate, up, down, formats, "awq", x, importance)
    scaled = found.matrices[1]
    assert scaled is not None and np.abs(scaled.to_float()[3]).max() < 0.9 * np.abs(up[3]).max()
    fixed = quantise_expert(gate, up, down, [None, None, formats[2]], "awq", x, importance)
    assert fixed.matrices[:2] == (None, None) and found.error < fixed.error


def test_an_expert_that_nothing_is_routed_to() -> None:
    gate, up, down, x, importance = expert()
    formats = (FORMATS["int4"],) * 3
    found = quantise_expert(gate, up, down, formats, "gptq", x[:0], importance[:0])
    assert found.error == 0.0
    assert not option_errors(gate, up, down, formats, "gptq", x[:0], importance[:0]).any()

"""The tools behind README's figures of bits, on a tiny model: each runs to its end and says what is true of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgert.profiling import profile_model
from edgert.quant.formats import FORMATS
from edgert.quant.quantise_expert import quantise_expert
from edgert.quantising import Bench, measure_sensitivity
from edgert.weights import silent
from tests import tiny_moe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import bits_table  # found through the line above
import proxy_rank
import quantiser_errors


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and its profile, with what quantising costs."""
    folder = tmp_path_factory.mktemp("m")
    model, corpus, out = tiny_moe.write(folder / "tiny.gguf"), folder / "text.txt", folder / "p.npz"
    corpus.write_text(tiny_moe.text(8_000, 1))
    options = {"context": 64, "threads": 1}
    profile = profile_model(model, out, corpora=[corpus], n_tokens=1024, progress=silent, **options).profile
    bench = Bench(model, folder / "w", silent, options=options)
    profile.with_sensitivity(measure_sensitivity(bench, profile, "rtn")).save(out)
    return [str(model), str(out)]


def test_an_error_is_the_share_that_it_has_of_an_experts_output() -> None:
    random = np.random.default_rng(3)
    gate, up, down = (random.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (32, 64), (64, 32)))
    rows, weight = random.standard_normal((9, 64)).astype(np.float32), np.ones(9, np.float32)
    before = [gate, up, down]
    assert quantiser_errors.relative_error(before, before, rows, weight, "silu") == 0
    halved = [gate, up, down * np.float32(0.5)]
    assert quantiser_errors.relative_error(before, halved, rows, weight, "silu") == pytest.approx(0.25, rel=1e-5)
    rows[4] = 0  # what the router gives nothing counts for nothing
    spoilt = quantise_expert(*before, [FORMATS["int2"]] * 3, "rtn", rows, weight)
    after = [matrix.to_float() for matrix in spoilt.matrices if matrix is not None]
    only = np.where(np.arange(9) == 4, 1, 0).astype(np.float32)
    assert quantiser_errors.relative_error(before, after, rows, only, "silu") == 0


def test_errors_fall_with_bits(subject: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quantiser_errors.main([*subject, "--quantisers", "rtn,gptq", "--formats", "int2,int4,int8", "--every", "3"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith("experts, medians") and len(lines) == 6
    errors = [float(line.split()[3].rstrip("%,")) for line in lines]
    assert errors[0] > errors[1] > errors[2] and errors[3] > errors[4] > errors[5] and errors[3] < errors[0]


def test_each_guess_is_ranked(subject: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ranks.json"
    proxy_rank.main([*subject, "--chunks", "4", "--work", str(tmp_path / "w"), "--json", str(out)])
    found = json.loads(out.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(found) > 4
    assert all(-1 <= value <= 1 for by in found.values() for value in by.values())
    # experts of a tiny model of random weights differ by what they add, which whatever looks at outputs sees
    assert found["second order (used)"]["kl"] > 0.5 and found["output error x share of tokens"]["kl"] > 0.5


def test_the_table_has_a_row_for_each_setting(subject: list[str], tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    words = ["--quantisers", "rtn,hqq", "--formats", "int2,int8", "--bpw", "4", "--chunk", "64", "--exact"]
    bits_table.main([*subject, *words, "--chunks", "8", "--work", str(tmp_path / "w"), "--json", str(out)])
    table = json.loads(out.read_text())
    rows = {(row["name"], row["quantiser"]): row for row in table["rows"]}
    assert set(rows) == {("mixed 4", "rtn"), *((name, q) for name in ("int2", "int8") for q in ("rtn", "hqq"))}
    assert all(rows["int2", q]["kl"] > 10 * rows["int8", q]["kl"] for q in ("rtn", "hqq"))
    assert rows["mixed 4", "rtn"]["bits_per_weight"] <= 4 and rows["mixed 4", "rtn"]["kl"] < rows["int2", "rtn"]["kl"]
    for row in rows.values():
        assert row["increase"] == pytest.approx(row["perplexity"] / table["source"] - 1, abs=1e-9)

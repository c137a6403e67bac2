"""Experts whose down projection has rows that no format takes: it stays as it is, said in a line, the rest goes on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path
from typer.testing import CliRunner

import edgert
from edgert.bits import kept_words
from edgert.cli.app import app
from edgert.errors import OptionError
from edgert.experts.profile import Profile
from edgert.goal import Goal
from edgert.pack_bits import PackedBits, Request, pack_bits
from edgert.profiling import profile_model
from edgert.quantising import Bench, measure_sensitivity
from edgert.storage.bundle import read_manifest
from edgert.weights import silent
from tests import tiny_moe

OPTIONS: dict[str, Any] = {"context": 128}
LINE = "ffn_down_exps, whose rows have 48 columns, where formats take multiples of 32: left as in the source"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.write(tmp_path_factory.mktemp("narrow") / "tiny.gguf", sizes=replace(tiny_moe.SIZES, d_expert=48))


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    corpus, said = model.with_name("text.txt"), list[str]()
    corpus.write_text(tiny_moe.text(12_000, 1))
    found = profile_model(
        model, model.with_name("p.npz"), corpora=[corpus], n_tokens=2048, held_out=0.3, progress=silent, context=128
    ).profile
    bench = Bench(model, model.with_name("work"), lambda stage, fraction: said.append(stage), options=OPTIONS)
    measured = measure_sensitivity(bench, found)
    assert sum(LINE in stage for stage in said) == 1
    down = measured.errors[:, :, 2]
    assert np.isinf(down[measured.rows > 0]).all() and np.isfinite(measured.errors[:, :, :2]).all()
    assert (measured.gains > 0).all() and np.isfinite(measured.gains).all()
    return found.with_sensitivity(measured)


def pack(model: Path, out: Path, profile: Profile, **goal: Any) -> PackedBits:
    found = pack_bits(Request(model, out, profile, Goal(**goal), options=OPTIONS), silent)
    assert [line for line in found.lines() if LINE in line] == [f"not quantised: {LINE}, the rest is quantised"]
    for parts in read_manifest(out).kinds:
        assert parts[2].format.name == "f16" and all(part.format.bits <= 8 for part in parts[:2])
    return found


def test_one_format(model: Path, profile: Profile, tmp_path: Path) -> None:
    found = pack(model, tmp_path / "one.edge", profile, format="int4")
    assert found.bits["bits_per_weight"] == 4.5 and found.proof.comparison.increase < 0.2
    with edgert.load(tmp_path / "one.edge", context=128) as packed:
        assert packed.generate("a", max_tokens=4).text


def test_sizes(model: Path, profile: Profile, tmp_path: Path) -> None:
    found = pack(model, tmp_path / "bits.edge", profile, bits_per_weight=4.0)
    assert found.bits["bits_per_weight"] <= 4.0
    with pytest.raises(OptionError, match=r"is too small: the bundle takes [\d,]+ bytes at least") as caught:
        pack(model, tmp_path / "bytes.edge", profile, n_bytes=1000)
    least = int(re.findall(r"takes ([\d,]+) bytes", str(caught.value))[0].replace(",", ""))
    assert 0.5 * found.packed.n_bytes < least < found.packed.n_bytes  # what stays is in it


def test_two_widths_by_edgemoe(model: Path, profile: Profile, tmp_path: Path) -> None:
    found = pack(model, tmp_path / "loss.edge", profile, loss=0.5, method="edgemoe")
    assert found.proof.comparison.increase <= 0.5 + found.proof.comparison.standard_error


def test_awq(model: Path, profile: Profile, tmp_path: Path) -> None:
    pack(model, tmp_path / "awq.edge", replace(profile, sensitivity=None), bits_per_weight=4.0, quantiser="awq")


def test_the_command_line(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(golden_path("qwen3moe-f32").read_bytes())
    run = CliRunner().invoke(app, ["profile", str(model), "--tokens", "512", "--context", "64"])
    assert run.exit_code == 0, run.output
    line = LINE.replace("48", "24")
    assert line in " ".join(run.stderr.split()), run.stderr
    run = CliRunner().invoke(app, ["pack", str(model), "--size", "4.5bpw", "--context", "256"])
    assert run.exit_code == 0, run.output
    assert f"not quantised: {line}" in run.stdout, run.stdout


def test_where_nothing_fits() -> None:
    from edgert.architectures import read_config
    from edgert.storage.gguf_file import GgufFile

    with GgufFile.open(golden_path("qwen3moe-f32")) as file:
        config = read_config(file.metadata, "m")
    with pytest.raises(OptionError, match=r"rows of 48 and 24 columns, .* multiples of 32: none .* pack the model as"):
        kept_words(replace(config, d_model=48))
    assert kept_words(replace(config, d_expert=96)) == ""
    assert kept_words(replace(config, d_model=48, d_expert=64)).startswith("ffn_gate_exps and ffn_up_exps, whose rows")

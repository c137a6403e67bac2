"""What a report is about: bundles with their bits and proof, profiles alone, and those of another model."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_profiles import (
    MACHINE,
    N_EXPERT,
    N_LAYERS,
    assert_stands_alone,
    made_profile,
    subject_of,
    tables_of,
)
from models import golden_path

from edgert.architectures import read_config
from edgert.divergence import Comparison
from edgert.errors import ModelFileError, UnsupportedError
from edgert.experts.profile import Domain, Profile, Sensitivity
from edgert.memory import WORD_BYTES
from edgert.pack import pack
from edgert.proof import Proof, Score
from edgert.report import render, write_report
from edgert.report_loss import loss_curve
from edgert.report_subject import config_of, open_subject
from edgert.storage.bundle import Bundle, read_manifest
from edgert.storage.gguf_file import GgufFile
from edgert.streaming import model_key


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its profile."""
    path = tmp_path_factory.mktemp("packed") / "tiny.edge"
    pack(golden_path("olmoe-q4_0"), path, progress=lambda stage, fraction: None)
    with Bundle.open(path) as bundle:
        config = read_config(bundle.metadata, str(path))
        assert config.router is not None
        profile = profile_like(config, model_key(bundle.metadata, config), bundle.record_bytes)
        replace(profile, digest=bundle.manifest.model["digest"]).save(path / "profile.npz")
    return path


def profile_like(config: Any, key: str, sizes: Any) -> Profile:
    """Of random routes."""
    draw, shape = np.random.default_rng(0), (config.n_layers, config.router.n_expert)
    ids = np.argsort(draw.random((shape[0], 64, shape[1])), axis=2)[..., : config.router.top_k].astype(np.uint8)
    tokens = np.zeros(64, np.int32)
    domain = Domain("text", tokens, tokens[:0], ids, np.ones(ids.shape, np.float16))
    moments = np.ones((*shape, config.d_model), np.float32), np.ones((*shape, config.d_expert), np.float32)
    return Profile(key, "0", 32, sizes, (domain,), {"text": 1.0}, False, *moments, {})


def test_a_bundle_shows_its_own_bits_and_memory(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    subject = open_subject(packed)
    bits = subject.bits()
    assert bits is not None and np.unique(bits).tolist() == [4.5] and subject.needs is not None
    with Bundle.open(packed) as bundle:
        assert subject.needs.hot <= sum(tensor.n_bytes for tensor in bundle.tensors.values())
    document = write_report(packed, tmp_path / "r.html").read_text()
    assert_stands_alone(document)
    assert tables_of(document)["widths"][1:] == [["4.50", str(bits.size), "100.0 %"]]
    memories = [re.fullmatch(r"([\d.,]+) MiB", row[2]) for row in tables_of(document)["what-if"][1:]]
    least = subject.needs.least_budget / 2**20
    assert all(found is not None and float(found[1]) >= round(least, 1) for found in memories)


def test_layers_without_experts_count_neither_as_weights_nor_as_bits() -> None:
    pytest.importorskip("matplotlib")
    profile = made_profile()
    sensitivity = profile.sensitivity
    assert sensitivity is not None
    sizes, rows = profile.record_bytes.copy(), sensitivity.rows.copy()
    sizes[0], rows[0] = 0, 0
    found = replace(profile, record_bytes=sizes, sensitivity=replace(sensitivity, rows=rows))
    curve = loss_curve(subject_of(found))
    assert curve is not None and curve.chosen is not None
    assert np.isnan(curve.bits[0]).all() and curve.bits[1:].mean() == pytest.approx(curve.chosen.bits)
    tables = tables_of(render(subject_of(found), MACHINE))
    assert sum(int(row[1]) for row in tables["widths"][1:]) == (N_LAYERS - 1) * N_EXPERT
    assert tables["loss-sizes"][1][2] == "36.0 KiB"  # 16 experts of 3 * 2048 weights in 3 bits


def test_the_loss_of_a_bundle_is_that_of_its_formats(packed: Path) -> None:
    subject = open_subject(packed)
    profile = subject.profile
    shape, formats = (*profile.record_bytes.shape, 3, 2), ("int4", "int8")
    errors, rows = np.ones(shape, np.float32), np.full(shape[:2], 64, np.int32)
    found = Sensitivity("rtn", formats, errors, rows, np.full(shape[0], 1e-5, np.float32), 64)
    curve = loss_curve(replace(subject, profile=profile.with_sensitivity(found)))
    assert curve is not None and curve.chosen is not None and curve.chosen.bits == 4.5
    assert curve.chosen.increase == pytest.approx(np.expm1(1e-5 * 3 * np.prod(shape[:2])), rel=1e-4)
    other = replace(found, formats=("int5", "int8"))
    curve = loss_curve(replace(subject, profile=profile.with_sensitivity(other)))
    assert curve is not None and curve.chosen is None and np.unique(curve.bits).tolist() == [4.5]


def test_the_proof_of_a_bundle_is_shown(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bundle = shutil.copytree(packed, tmp_path / "b.edge")
    manifest = read_manifest(bundle)
    measured = Comparison(8, 1024, 20.0, 20.4, 0.02, 0.004, 0.0123, 0.4, 0.91)
    manifest.proof = Proof("made text", measured, {"valid JSON": Score(0.5, 0.25, 12)}).as_document()
    (bundle / "manifest.json").write_text(manifest.as_text())
    document = render(open_subject(bundle), MACHINE)
    assert_stands_alone(document)
    rows = dict(tables_of(document)["proven"][1:])
    assert rows["perplexity"] == "20.000 -> 20.400 (+2.00% +/- 0.40%)" and rows["valid JSON"] == "50.0% -> 25.0% of 12"
    assert "+2.00&#160;%, with a standard error of 0.40&#160;%" in document and "Measured loss" in document
    manifest.proof = {"text": 1}
    (bundle / "manifest.json").write_text(manifest.as_text())
    with pytest.raises(ModelFileError, match="its proof"):
        render(open_subject(bundle), MACHINE)


def test_a_profile_of_another_model_is_refused(packed: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(packed, tmp_path / "b.edge")
    made_profile().save(bundle / "profile.npz")
    with pytest.raises(ModelFileError, match="profile of another model, 'made', not of"):
        open_subject(bundle)
    profile = open_subject(packed).profile
    replace(profile, model="renamed").save(bundle / "profile.npz")
    assert open_subject(bundle).profile.digest == profile.digest
    replace(profile, digest="other weights").save(bundle / "profile.npz")
    with pytest.raises(ModelFileError, match="profile of another model"):
        open_subject(bundle)
    (bundle / "profile.npz").unlink()
    with pytest.raises(ModelFileError, match="holds no profile; pack it with"):
        open_subject(bundle)


def test_a_profile_with_formats_of_a_newer_edgert_is_refused(tmp_path: Path) -> None:
    profile = made_profile()
    assert profile.sensitivity is not None
    newer = replace(profile.sensitivity, formats=("int2-min", "int4-min", "int4", "int1"))
    profile.with_sensitivity(newer).save(tmp_path / "p.npz")
    with pytest.raises(UnsupportedError, match="its sensitivity is to 'int1', a format"):
        open_subject(tmp_path / "p.npz")


def test_a_profile_gives_its_models_configuration_back_and_nothing_else(tmp_path: Path) -> None:
    with GgufFile.open(golden_path("olmoe-q4_0")) as file:
        config = read_config(file.metadata, "x")
    assert config.router is not None
    profile = profile_like(config, "made", np.full((config.n_layers, config.router.n_expert), 4096))
    sizes = {"name": "made", "config": asdict(config), "hot": 1 << 20, "words": 500}
    replace(profile, settings={"model": sizes}).save(tmp_path / "p.npz")
    subject = open_subject(tmp_path / "p.npz")
    assert subject.config == config and subject.needs is not None
    assert (subject.needs.hot, subject.needs.tokenizer) == (1 << 20, 500 * WORD_BYTES)
    assert loss_curve(replace(subject_of(made_profile()), config=None)) is None
    shape = sizes["config"]
    for hostile in (
        None,
        "olmoe",
        {},
        {"config": []},
        {"config": {**shape, "d_model": -1}},
        {"config": {**shape, "d_model": "64"}},
        {"config": {**shape, "n_vocab": 1e9}},
        {"config": {**shape, "n_context": True}},
        {"config": {**shape, "router": {**shape["router"], "top_k": 1}}},
        {"config": {**shape, "rope": shape["router"]}},
        {"config": {**shape, "more": 1}},
    ):
        assert config_of(replace(profile, settings={"model": hostile})) is None, hostile
    for hot in (None, -1, "1", 1 << 60):
        replace(profile, settings={"model": {**sizes, "hot": hot}}).save(tmp_path / "p.npz")
        assert open_subject(tmp_path / "p.npz").needs is None, hot

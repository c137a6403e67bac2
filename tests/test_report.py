"""The report: a page that stands alone, whose tables say what the profile says, whatever the profile holds."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import golden_path
from typer.testing import CliRunner

from edgert.architectures import read_config
from edgert.cli.app import app
from edgert.divergence import Comparison
from edgert.errors import ModelFileError, StorageError, UnsupportedError
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.profile import OWN_TEXT, Domain, Profile, Sensitivity
from edgert.experts.replay import Belady, replay_policy
from edgert.memory import WORD_BYTES
from edgert.pack import pack
from edgert.proof import Proof, Score
from edgert.quant.formats import FORMATS
from edgert.report import default_out, render, write_report
from edgert.report_loss import loss_curve
from edgert.report_numbers import replayed, sampled
from edgert.report_runtime import what_memory_gives
from edgert.report_speed import ARITHMETIC_SHARE, Machine, Row, enough
from edgert.report_subject import Subject, config_of, open_subject
from edgert.report_svg import SMALL, legible, spread
from edgert.storage.bundle import Bundle, read_manifest
from edgert.storage.gguf_file import GgufFile
from edgert.streaming import model_key
from edgert.types import ModelConfig, RopeConfig, RouterConfig

N_LAYERS, N_EXPERT, TOP_K, D_MODEL, D_EXPERT, CHUNK = 3, 8, 2, 64, 32, 32
CONFIG = ModelConfig(
    "qwen3moe", N_LAYERS, D_MODEL, 2, 2, 32, 32, 100, 64, 1e-5, RopeConfig("neox", 32), RouterConfig(8, 2), D_EXPERT
)
FORMATS_TRIED = ("int2-min", "int4-min", "int4", "int8")
MACHINE = Machine(ram=10e9, flash=1e9)
SECTIONS = ["maps", "skew", "transfer", "reuse", "together", "policies", "recall", "speed", "loss", "bits"]


def made_domain(name: str, n_tokens: int, seed: int, top_k: int = TOP_K) -> Domain:
    """Skewed routes; expert 7 of the last layer is never chosen."""
    draw = np.random.default_rng(seed)
    scores = draw.gumbel(size=(N_LAYERS, n_tokens, N_EXPERT)) + draw.normal(size=(N_LAYERS, 1, N_EXPERT))
    scores[-1, :, 7] = -np.inf
    ids = np.argsort(-scores, axis=2)[..., :top_k].astype(np.uint8)
    tokens = np.zeros(n_tokens, np.int32)
    return Domain(name, tokens, tokens[:0], ids, draw.random(ids.shape).astype(np.float16))


def made_profile(*domains: Domain, model: str = "made", sensitivity: bool = True) -> Profile:
    """A profile of random numbers; books weigh three times as much as code."""
    draw = np.random.default_rng(0)
    domains = domains or (made_domain("books", 96, 1), made_domain("code", 64, 2))
    sizes = np.full((N_LAYERS, N_EXPERT), 8192)
    recall = {
        "router": np.array([[np.nan, 0.8, 0.7], [np.nan, np.nan, 0.5]], np.float32),
        "router + path + frequency": draw.random((2, N_LAYERS), np.float32),
    }
    shares = {domain.name: float(n) for domain, n in zip(domains, (3, 1), strict=False)}
    moments = draw.random((N_LAYERS, N_EXPERT, D_MODEL + D_EXPERT), np.float32)
    profile = Profile(
        model,
        "0",
        CHUNK,
        sizes,
        domains,
        {name: share / sum(shares.values()) for name, share in shares.items()},
        domains[0].name == OWN_TEXT,
        moments[..., :D_MODEL],
        moments[..., D_MODEL:],
        recall,
    )
    return profile.with_sensitivity(made_sensitivity(profile)) if sensitivity else profile


def made_sensitivity(profile: Profile) -> Sensitivity:
    """Errors that fall fourfold with each bit."""
    draw, n_tokens = np.random.default_rng(1), profile.n_tokens
    bits = np.array([FORMATS[name].bits for name in FORMATS_TRIED])
    errors = draw.lognormal(size=(N_LAYERS, N_EXPERT, 3, 1)) * 4.0**-bits
    rows = np.rint(profile.frequency() * n_tokens).astype(np.int32)
    return Sensitivity(
        "gptq", FORMATS_TRIED, errors.astype(np.float32), rows, np.full(N_LAYERS, 0.1, np.float32), n_tokens
    )


def subject_of(profile: Profile) -> Subject:
    return Subject(Path("made.profile.npz"), "made", profile, CONFIG, profile.record_bytes, None)


def parsed(document: str) -> ElementTree.Element:
    """The page; it is XML apart from its first line."""
    first, _, rest = document.partition("\n")
    assert first == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def tables_of(document: str) -> dict[str, list[list[str]]]:
    """The cells of each table by its name, header first."""
    return {
        table.attrib["id"]: [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for table in parsed(document).iter("table")
    }


def assert_stands_alone(document: str) -> None:
    """Nothing is loaded from anywhere, and what is pointed to is there, once."""
    page = parsed(document)
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert "://" not in document and "@import" not in document and "<script" not in document
    for element in page.iter():
        assert "src" not in element.attrib and element.tag not in ("link", "iframe", "object", "base")
        target = element.attrib.get("href", "#" + ids[0])
        assert target.startswith("data:image/png;base64,") or target[1:] in ids
    assert set(re.findall(r"url\(#([^)]*)\)", document)) <= set(ids) and document.count("url(") == document.count(
        "url(#"
    )


@pytest.fixture(scope="module")
def page() -> str:
    pytest.importorskip("matplotlib")
    return render(subject_of(made_profile()), MACHINE)


# ---- the page --------------------------------------------------------------------------------------------------------
def test_the_page_is_well_formed_and_stands_alone(page: str) -> None:
    assert_stands_alone(page)
    assert [section.attrib["id"] for section in parsed(page).iter("section")] == SECTIONS
    assert len(page) < 5 << 20
    for section in parsed(page).iter("section"):
        said = section.find("p[@class='says']")
        assert said is not None and len("".join(said.itertext())) > 40
        assert section.find("figure/svg") is not None or section.find(".//table") is not None


def test_the_same_profile_gives_the_same_page(page: str) -> None:
    assert render(subject_of(made_profile()), MACHINE) == page


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    assert "#0102" not in page and "#000000" not in page
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert {"ink", "rule", "blue"} <= used
    for scheme in (":root {", "prefers-color-scheme: dark", "@media print"):
        part = page[page.index(scheme) :].partition("}")[0]
        assert used <= set(re.findall(r"--(\w+):", part))


def test_names_may_hold_anything() -> None:
    pytest.importorskip("matplotlib")
    names = ["<script>&\"'", "$x^2$ \\frac{", "日本語", "a\x00b\x1b[31m\ufffe", "x" * 500, "`a`"]
    profile = made_profile(*(made_domain(name, 32, seed) for seed, name in enumerate(names)), sensitivity=False)
    document = render(replace(subject_of(profile), name="".join(names), path=Path("/<b>")), MACHINE)
    assert_stands_alone(document)
    shown = [row[0] for row in tables_of(document)["hottest"][2:]]
    assert shown[:3] == names[:3] and shown[3] == "a\ufffdb\ufffd[31m\ufffd"


def single(top_k: int = TOP_K, **changes: Any) -> Profile:
    return replace(made_profile(made_domain(OWN_TEXT, 64, 1, top_k), sensitivity=False), **changes)


@pytest.mark.parametrize(
    ("profile", "absent"),
    [
        (single(record_bytes=np.repeat([[0], [4096], [8192]], N_EXPERT, axis=1)), {"transfer", "loss", "bits"}),
        (single(top_k=N_EXPERT - 1), {"transfer", "loss", "bits"}),
        (single(top_k=1), {"transfer", "together", "loss", "bits"}),
        (single(recall={"path": np.full((2, N_LAYERS), np.nan, np.float32)}), {"transfer", "recall", "loss", "bits"}),
    ],
)
def test_what_is_not_known_is_left_out(profile: Profile, absent: set[str]) -> None:
    pytest.importorskip("matplotlib")
    document = render(subject_of(profile), MACHINE)
    assert [section.attrib["id"] for section in parsed(document).iter("section")] == [
        name for name in SECTIONS if name not in absent
    ]
    assert "written by the model itself" in document


# ---- the numbers -----------------------------------------------------------------------------------------------------
def number(cell: str) -> float:
    """What a cell says, in per cent where it does."""
    return float(cell.split()[0].replace(",", ""))


def test_tables_of_use_say_what_the_profile_says(page: str) -> None:
    profile, tables = made_profile(), tables_of(page)
    used = {domain.name: np.zeros((N_LAYERS, N_EXPERT)) for domain in profile.domains}
    for domain in profile.domains:
        for layer in range(N_LAYERS):
            for expert in domain.ids[layer].reshape(-1):
                used[domain.name][layer, expert] += 1 / len(domain.tokens)
    used = {"all text": 0.75 * used["books"] + 0.25 * used["code"], **used}
    for row in tables["hottest"][1:]:
        ordered = np.sort(used[row[0]].reshape(-1))[::-1]
        for cell, n in zip(row[1:4], (2, 6, 12), strict=True):  # of 24 experts
            assert number(cell) == pytest.approx(100 * ordered[:n].sum() / ordered.sum(), abs=0.05001)
    for layer, share, expert, _, never in tables["layers"][1:]:
        line = used["all text"][int(layer)]
        assert number(share) == pytest.approx(100 * line.max(), abs=0.05001) and int(expert) == line.argmax()
        assert int(never) == (line == 0).sum() == (1 if layer == "2" else 0)
    learnt, judged = (
        {
            domain.name: np.array([np.bincount(one, minlength=N_EXPERT) for one in half.reshape(N_LAYERS, -1)])
            for domain in profile.domains
            for half in [np.array_split(domain.ids, 2, axis=1)[second]]
        }
        for second in (0, 1)
    )
    text = " ".join("".join(parsed(page).itertext()).split())
    new = re.search(r"learnt on the first halves of the texts, ([\d.]+) % in the second", text)
    first, second = (np.float32(0.75 * half["books"] / 48 + 0.25 * half["code"] / 32) for half in (learnt, judged))
    best = np.argsort(-first.reshape(-1), kind="stable")[:6]
    assert new and float(new[1]) == pytest.approx(100 * second.reshape(-1)[best].sum() / second.sum(), abs=0.05001)
    for name, *cells in tables["served"][1:-1]:
        best = np.argsort(-learnt[name.removeprefix("hot in ")].reshape(-1), kind="stable")[:6]
        for cell, other in zip(cells, ("books", "code"), strict=True):
            flat = judged[other].reshape(-1)
            assert number(cell) == pytest.approx(100 * flat[best].sum() / flat.sum(), abs=0.05001)


def test_what_was_counted_is_said_and_pairs_promise_no_foresight(page: str) -> None:
    text = " ".join("".join(parsed(page).itertext()).split())
    assert "of which the first 26 fill the buffer and 54 are counted" in text
    assert "worth reading with it" not in text and "hottest in this very text; of new text it is less" in text
    assert (
        "a layer's router names all that a token uses there at once" in text or "nothing is gained by keeping" in text
    )


def test_tables_of_reuse_and_pairs_say_what_the_routes_say(page: str) -> None:
    profile, tables = made_profile(), tables_of(page)
    expected = np.zeros((2, 5))
    for place, domain in enumerate(profile.domains):
        for layer, start in itertools.product(range(N_LAYERS), range(0, len(domain.tokens), CHUNK)):
            routes = [set(ids) for ids in domain.ids[layer, start : start + CHUNK].tolist()]
            for token, used in enumerate(routes):
                for expert in used:
                    last = max((at for at in range(token) if expert in routes[at]), default=None)
                    if last is not None:
                        between = set().union(*routes[last + 1 : token])
                        expected[place] += [last == token - 1, *(len(between) < kept for kept in (1, 2, 4, 8))]
        n_tokens, n_chunks = len(domain.tokens), len(domain.tokens) // CHUNK
        expected[place, 1:] *= 100 / (N_LAYERS * n_tokens * TOP_K)
        expected[place, 0] *= 100 / (N_LAYERS * (n_tokens - n_chunks) * TOP_K)
    for row, rates in zip(tables["reused"][1:], (0.75 * expected[0] + 0.25 * expected[1], *expected), strict=True):
        assert [number(cell) for cell in row[1:]] == pytest.approx(rates, abs=0.05001)
    for layer, pair, share, lift in tables["pairs"][1:]:
        one, other = map(int, pair.split(" and "))
        both, chance = 0.0, np.zeros(N_EXPERT)
        for domain, weight in zip(profile.domains, (0.75, 0.25), strict=True):
            has = np.array([(domain.ids[int(layer)] == expert).any(axis=1) for expert in range(N_EXPERT)])
            both, chance = both + weight * (has[one] & has[other]).mean(), chance + weight * has.mean(axis=1)
        expected_both = chance[one] * chance[other] * 2 / (4 - (chance**2).sum())
        assert number(share) == pytest.approx(100 * both, abs=0.05001)
        assert number(lift) == pytest.approx(both / expected_both, abs=0.05001)


def test_replayed_rates_and_speeds_say_what_replay_says(page: str) -> None:
    profile, tables = made_profile(), tables_of(page)
    trace = sampled(profile, profile.record_bytes)
    second = np.concatenate([domain.ids[:, len(domain.tokens) // 2 :] for domain in profile.domains], axis=1)
    assert trace.n_tokens == 80 and sorted(trace.ids[1].tolist()) == sorted(second[1].tolist())
    shares = [number(cell) / 100 for cell in tables["policies-rates"][0][1:]]
    assert shares == [0.125, 0.25, 0.375, 0.5, 0.75]  # below, not even a layer's experts of a token fit
    first = [domain.ids[:, : len(domain.tokens) // 2] for domain in profile.domains]
    known = sum(
        weight * np.array([np.bincount(ids.reshape(-1), minlength=N_EXPERT) / len(ids) for ids in text])
        for text, weight in zip(first, (0.75, 0.25), strict=True)
    )
    found = {}
    for name in ("lru", "pinned", "topics", "cost", "belady"):
        found[name] = [
            replay_policy(
                trace,
                Belady(trace) if name == "belady" else make_policy(name, trace.record_bytes, np.float32(known)),
                int(share * trace.record_bytes.sum()),
                80 // 3,
            )
            for share in shares
        ]
        cells = dict((row[0], row[1:]) for row in tables["policies-rates"][1:])[name]
        assert [number(cell) for cell in cells] == pytest.approx([100 * hits.rate for hits in found[name]], abs=0.05001)
    assert {row[0] for row in tables["policies-rates"][1:]} == {"belady", *POLICIES}
    compute = N_LAYERS * TOP_K * 8192 / (ARITHMETIC_SHARE * MACHINE.ram)
    names = ["SD card, 80 MB/s", "eMMC, 250 MB/s", "SATA or UFS, 500 MB/s", "this drive, 1.0 GB/s", "NVMe, 2.0 GB/s"]
    assert tables["what-if"][0][6:] == names
    checked = 0
    for place, row in enumerate(tables["what-if"][1:-1]):
        if row[3] in found:
            hits, checked = found[row[3]][place], checked + 1
            for cell, rate in zip(row[6:], (80e6, 250e6, 500e6, 1e9, 2e9), strict=True):
                seconds = compute + (hits.bytes_missed / rate + hits.n_missed * 1e-4) / hits.n_tokens
                assert number(cell) == pytest.approx(1 / seconds, rel=0.001)
            assert row[2] == "--" and number(row[4]) == pytest.approx(100 * hits.rate, abs=0.05001)
    last = tables["what-if"][-1]
    assert (
        checked
        and last[0] == last[4] == "100.0 %"
        and last[3] == "--"
        and number(last[-1]) == pytest.approx(1 / compute, rel=0.001)
    )


def test_the_memory_suggested_is_the_least_worth_having_that_fits() -> None:
    rows = [Row(share, int(100 * share), None, "lru", share, 0.0, (10 * share,)) for share in (0.25, 0.5, 0.875, 1.0)]
    assert enough(rows, 0, None) is rows[2] and enough(rows, 0, 87) is rows[2]
    assert enough(rows, 0, 86) is rows[1] and enough(rows, 0, 1) is rows[0]  # all that fits, if it is not worth it
    with_process = [replace(row, process_bytes=1000 + row.buffer_bytes) for row in rows]
    assert enough(with_process, 0, None) is with_process[3]  # hardly more
    assert enough(with_process, 0, 1099) is with_process[2]


def test_what_is_said_of_speed_fits_the_machine() -> None:
    pytest.importorskip("matplotlib")
    profile = made_profile(sensitivity=False)
    found = replayed(profile, profile.record_bytes, lambda stage, fraction: None)
    for machine, words in (
        (Machine(ram=1e6, flash=1e9), "the least of these sizes that gives 80 % of the full speed is"),
        (Machine(ram=10e9, flash=1e9, memory=60_000), "This machine can spare 58.6 KiB."),
        (Machine(ram=10e9, flash=None), "With all experts in RAM, 192.0 KiB for experts, expect"),
    ):
        section, facts = what_memory_gives(subject_of(profile), found, machine)
        assert words in section.says and facts[0].section == section.name
        assert ("on NVMe, 2.0 GB/s" if machine.flash is None else "on this drive, 1.0 GB/s") in section.says


def test_recall_is_the_mean_over_layers_where_there_is_a_guess(page: str) -> None:
    router, combined = tables_of(page)["recall-mean"][1:]
    assert router == ["router", "75.0 %", "50.0 %"]
    kept = made_profile().recall["router + path + frequency"].mean(axis=1)
    assert [number(cell) for cell in combined[1:]] == pytest.approx(100 * kept, abs=0.05001)
    assert [row[1] for row in tables_of(page)["recall-layers"][1:]] == ["--", "80.0 %", "70.0 %"]


def test_losses_and_bits_say_what_the_sensitivity_says(page: str) -> None:
    sensitivity, tables = made_profile().sensitivity, tables_of(page)
    assert sensitivity is not None
    loss = sensitivity.loss().astype(np.float64).sum(axis=(0, 1, 2))
    points = [(float(row[1]), number(row[3])) for row in tables["loss-sizes"][1:]]
    for place, name in enumerate(FORMATS_TRIED):
        assert tables["loss-sizes"][1 + place][0] == name
        assert points[place][0] == pytest.approx(8 * FORMATS[name].matrix_bytes(64, 32) / 2048, abs=0.00501)
        assert points[place][1] == pytest.approx(100 * np.expm1(loss[place]), abs=0.00501)
    mixes = points[len(FORMATS_TRIED) :]
    assert mixes == sorted(mixes, key=lambda point: (point[0], -point[1]))  # more bits, less loss
    unused = 8.5 - (8.5 - 4.5) / (N_LAYERS * N_EXPERT)  # the expert that was never routed to keeps 4 bits
    assert mixes[-1] == (round(unused, 2), points[FORMATS_TRIED.index("int8")][1])
    assert sum(int(row[1]) for row in tables["widths"][1:]) == N_LAYERS * N_EXPERT


def test_the_chosen_mix_is_the_smallest_within_two_per_cent() -> None:
    found = loss_curve(subject_of(made_profile()))
    assert found is not None and found.chosen is not None
    assert 0.015 < found.chosen.increase <= 0.02
    assert found.bits.mean() == pytest.approx(found.chosen.bits)
    assert found.bits[2, 7] == pytest.approx(4.5)  # never routed to
    smaller = [point for point in found.mixes if point.bits < found.chosen.bits - 0.1]
    assert smaller and all(point.increase > 0.02 for point in smaller)


# ---- what it is about ------------------------------------------------------------------------------------------------
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
    assert all(re.fullmatch(r"[\d.,]+ MiB", row[2]) for row in tables_of(document)["what-if"][1:])


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


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_writes_beside_the_profile(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made_profile(sensitivity=False).save(tmp_path / "m.profile.npz")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "m.profile.npz")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "m.report.html")
    assert_stands_alone((tmp_path / "m.report.html").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.profile.npz", "m.report.html"]


@pytest.mark.parametrize("name", ["m.profile.npz", "m.npz", "m.edge", "m"])
def test_where_a_report_goes(name: str, tmp_path: Path) -> None:
    assert default_out(tmp_path / name) == tmp_path.resolve() / "m.report.html"


def one_line(result: Any) -> str:
    """What a failed command says."""
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return str(result.stderr)


def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "m.profile.npz"
    made_profile().save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-200] + bytes(200)):
        path.write_bytes(content)
        assert "is not a profile" in one_line(CliRunner().invoke(app, ["report", str(path)]))
    assert "No such file" in one_line(CliRunner().invoke(app, ["report", str(tmp_path / "absent.npz")]))
    assert "it holds no manifest.json" in one_line(CliRunner().invoke(app, ["report", str(tmp_path)]))
    assert [path.name for path in tmp_path.iterdir()] == ["m.profile.npz"]


def test_without_matplotlib_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = one_line(CliRunner().invoke(app, ["report", str(tmp_path / "m.npz")]))
    assert 'pip install "edgert[report]"' in said


def test_a_page_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made_profile(sensitivity=False).save(tmp_path / "m.npz")
    stages: list[str] = []
    with pytest.raises(StorageError, match=r"nowhere/r\.html cannot be written .*name another file with -o"):
        write_report(tmp_path / "m.npz", tmp_path / "nowhere" / "r.html", lambda stage, fraction: stages.append(stage))
    assert stages == ["reading the profile"]


# ---- labels ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_labels_are_moved_apart_in_order_and_stay_within(seed: int) -> None:
    draw = np.random.default_rng(seed)
    wished = sorted(draw.uniform(0, 100, draw.integers(1, 9)).tolist())
    places = spread(wished, 10.0, 100.0)
    assert all(b - a > 10 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9 and places[-1] <= 100 + 1e-9
    if all(b - a >= 10 for a, b in itertools.pairwise(wished)):
        assert places == pytest.approx(wished)


@pytest.mark.parametrize("seed", range(20))
def test_names_along_a_line_do_not_touch_and_none_is_left_out_without_need(seed: int) -> None:
    draw = np.random.default_rng(seed)
    names = [(place, "1" * int(draw.integers(1, 12))) for place in sorted(draw.uniform(0, 3.2, 8).tolist())]
    kept = legible(names)
    wide = [0.6 * SMALL / 72 * len(name) for _, name in names]  # inches; the font's digits are a little wider
    ends = [(place - w / 2, place + w / 2) for (place, _), w in zip(names, wide, strict=True)]
    assert kept[0] == 0 and all(ends[a][1] < ends[b][0] for a, b in itertools.pairwise(kept))
    for number in set(range(len(names))) - set(kept):
        before = max(other for other in kept if other < number)
        assert ends[number][0] - ends[before][1] < 0.25
    assert legible([(0.0, "0"), (3.2 * 0.125, "1.56"), (3.2 * 0.25, "6.25"), (1.6, "25"), (3.2, "100")]) == list(
        range(5)
    )

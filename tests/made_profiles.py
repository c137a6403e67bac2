"""Profiles of random routes, and what their reports say, read back from the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from edgert.experts.profile import OWN_TEXT, Domain, Profile, Sensitivity
from edgert.quant.formats import FORMATS
from edgert.report_speed import Machine
from edgert.report_subject import Subject
from edgert.types import ModelConfig, RopeConfig, RouterConfig

N_LAYERS, N_EXPERT, TOP_K, D_MODEL, D_EXPERT, CHUNK = 3, 8, 2, 64, 32, 32
CONFIG = ModelConfig(
    "qwen3moe", N_LAYERS, D_MODEL, 2, 2, 32, 32, 100, 64, 1e-5, RopeConfig("neox", 32), RouterConfig(8, 2), D_EXPERT
)
FORMATS_TRIED = ("int2-min", "int4-min", "int4", "int8")
MACHINE = Machine(ram=10e9, flash=1e9)


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

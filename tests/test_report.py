"""The report: a page that stands alone, whatever the profile holds, and the command that writes it."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_profiles import (
    MACHINE,
    N_EXPERT,
    N_LAYERS,
    TOP_K,
    assert_stands_alone,
    made_domain,
    made_profile,
    parsed,
    subject_of,
    tables_of,
)
from typer.testing import CliRunner

from edgert.cli.app import app
from edgert.errors import StorageError
from edgert.experts.profile import OWN_TEXT, Profile
from edgert.report import default_out, render, write_report
from edgert.report_svg import SMALL, legible, spread

SECTIONS = ["maps", "skew", "transfer", "reuse", "together", "policies", "recall", "speed", "loss", "bits"]


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

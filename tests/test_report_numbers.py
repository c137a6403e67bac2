"""The report's numbers: its tables say what routes, replay and sensitivity say, counted slowly."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from made_profiles import (
    CHUNK,
    FORMATS_TRIED,
    MACHINE,
    N_EXPERT,
    N_LAYERS,
    TOP_K,
    made_profile,
    parsed,
    subject_of,
    tables_of,
)

from edgert import report_runtime
from edgert.experts.policies import POLICIES, make_policy
from edgert.experts.replay import Belady, Hits, Report, replay_policy
from edgert.quant.formats import FORMATS
from edgert.report import render
from edgert.report_loss import loss_curve
from edgert.report_numbers import replayed, sampled
from edgert.report_runtime import what_memory_gives
from edgert.report_speed import ARITHMETIC_SHARE, Machine, Row, enough


@pytest.fixture(scope="module")
def page() -> str:
    pytest.importorskip("matplotlib")
    return render(subject_of(made_profile()), MACHINE)


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


def test_a_policy_that_is_chosen_for_its_bytes_while_another_finds_more_experts_says_so() -> None:
    def says(cost_bytes: int) -> str:
        hits = {"cost": (40, cost_bytes), "lfru": (45, 400), "lru": (60, 600), Belady.name: (30, 300)}
        policies = {name: [Hits(1, 100, missed, 1000, n_bytes)] for name, (missed, n_bytes) in hits.items()}
        return report_runtime.policies(Report(made_profile().trace(), [0.25], policies, {})).says

    assert "`lfru` finds 55.0 %" in says(500) and says(500).endswith("for experts differ in size.")
    assert "`cost` finds 60.0 %" in says(380) and "differ in size" not in says(380)


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

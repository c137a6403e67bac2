"""Sections of a report on bits: what fewer of them cost, and how many each expert has or would get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgert.proof import Proof
from edgert.quant.formats import FORMATS
from edgert.report_loss import GOAL, Loss, Point
from edgert.report_page import Section, Table
from edgert.report_subject import Subject
from edgert.report_svg import INK, MUTED, SERIES, SMALL, WIDTH, Box, Drawing, count_from_zero
from edgert.report_words import increase, per_cent, rise, size
from edgert.types import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAME = 0.005  # bits: a smaller difference is none
_MOST_WIDTHS = 12  # of rows in the table of bits; more are put into classes of half a bit


# ---- loss by size ----------------------------------------------------------------------------------------------------
def loss(subject: Subject, found: Loss, measured: Proof | None) -> Section:
    """Expected loss by size, for the best mixes and for one format for all; measured: of the bundle."""
    sensitivity = subject.profile.sensitivity
    assert sensitivity is not None
    n_weights = int(np.isfinite(found.bits).sum()) * subject.weights_per_expert  # layers may be without experts

    def row(name: str, point: Point) -> list[str]:
        return [name, f"{point.bits:.2f}", size(point.bits * n_weights / 8), increase(point.increase)]

    rows = [row(point.name, point) for point in found.uniform] + [row("best mix", point) for point in found.mixes]
    table = Table("loss-sizes", "expected loss by size", ["format", "bits per weight", "experts", "perplexity"], rows)
    does = (
        "what such errors in each layer were measured to do to the model's predictions"
        if sensitivity.is_measured
        else "layers that are taken to be alike, for not all experts were in RAM to measure what such errors cost"
    )
    note = (
        f"Expected from the error that {sensitivity.quantiser} makes in the output of each expert, and from {does}. "
        "That is their divergence from the source: perplexity rises by as much on text that the model is as sure of as "
        "it should be, on other text by more or less. Packing measures the result on text that was kept back."
    )
    says = _about_loss(subject, found, n_weights)
    return Section("loss", "What fewer bits cost", says, _draw_loss(found, measured), note, more=[table])


def _about_loss(subject: Subject, found: Loss, n_weights: int) -> str:
    chosen = found.chosen
    if chosen is None:
        return "The bundle has formats whose loss the profile did not measure, so it has no place on this curve."
    whose = (
        "of this bundle" if subject.bundle is not None else f"that `edgert pack --loss {100 * GOAL:.0f}%` begins with"
    )
    says = (
        f"The mix {whose} takes {chosen.bits:.2f} bits per weight, {size(chosen.bits * n_weights / 8)} of experts, and "
        f"is expected to raise perplexity by {increase(chosen.increase)}"
    )
    if subject.bundle is None and chosen.bits < found.mixes[0].bits + _SAME:
        return f"{says}: the smallest formats that the profile knows are within the bound."
    rivals = [point for point in found.uniform if point.increase <= chosen.increase and point.bits > chosen.bits]
    rival = min(rivals, key=lambda point: point.bits, default=None)
    if rival is None:
        return f"{says}; no single format for all experts loses as little."
    return f"{says}; the smallest single format that loses no more, {rival.name}, takes {rival.bits:.2f}."


def _draw_loss(found: Loss, measured: Proof | None) -> str:
    curve, single = ([p for p in points if p.increase > 0] for points in (found.mixes, found.uniform))
    if not curve:
        return ""  # nothing loses anything
    with Drawing("loss", 4.2) as drawing:
        axes = drawing.axes(Box(0.95, 0.6, 7.2, 3.45))
        low, high = min(p.bits for p in curve), max(p.bits for p in [*curve, *single])
        axes.set(xlim=(low - 0.25 * (high - low), high + 0.1 * (high - low)), yscale="log")  # with room for names
        axes.set(xlabel="bits per weight of the experts, scales counted", ylabel="expected increase of perplexity, %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(True)
        axes.plot([p.bits for p in curve], [100 * p.increase for p in curve], color=SERIES[0], linewidth=2.4)
        third = len(curve) // 3
        nearer = found.chosen is None or found.chosen.bits > curve[len(curve) // 2].bits
        _name(axes, curve[third if nearer else 2 * third]._replace(name="best mixes"), SERIES[0], left=True)
        _draw_single(axes, single)
        if (chosen := found.chosen) is not None and chosen.increase > 0:
            axes.plot(chosen.bits, 100 * chosen.increase, "D", color=INK, markersize=7)
            _name(axes, chosen._replace(name=f"chosen: {chosen.bits:.2f} bits"), INK, left=True)
        if measured is not None:
            _draw_measured(axes, float(np.nanmean(found.bits)), measured)
        return drawing.svg("Expected increase of perplexity by bits per weight, best mixes and single formats")


def _draw_single(axes: Axes, points: Sequence[Point]) -> None:
    """Single formats: those of one width that nothing smaller beats are joined, and named once; the others are grey."""
    leading: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.bits):
        if any(other.bits <= point.bits and other.increase < point.increase for other in points):
            axes.plot(point.bits, 100 * point.increase, "o", color=MUTED, markersize=3)
        else:
            leading.setdefault(FORMATS[point.name].bits, []).append(point)
    for width, row in leading.items():
        x, y = [point.bits for point in row], [100 * point.increase for point in row]
        axes.plot(x, y, "o-", color=SERIES[1], markersize=4, linewidth=1)
        _name(axes, row[len(row) // 2]._replace(name=f"int{width} for all"), SERIES[1])


def _draw_measured(axes: Axes, bits: float, measured: Proof) -> None:
    """What was measured of the bundle, with its standard error; nothing where it did not rise."""
    rise, error = 100 * measured.comparison.increase, 100 * measured.comparison.standard_error
    if rise > 0:
        low = min(error, 0.9 * rise)  # the axis is logarithmic
        axes.errorbar([bits], [rise], [[low], [error]], fmt="s", color=SERIES[2], markersize=6, capsize=3)
        _name(axes, Point("measured", bits, rise / 100), SERIES[2])


def _name(axes: Axes, point: Point, colour: str, *, left: bool = False) -> None:
    side, place = ("right", (-8, -11)) if left else ("left", (5, 4))
    axes.annotate(
        point.name,
        (point.bits, 100 * point.increase),
        place,
        textcoords="offset points",
        color=colour,
        ha=side,
        fontsize=SMALL,
    )


# ---- the proof -------------------------------------------------------------------------------------------------------
def proof(measured: Proof, expected: Point | None) -> Section:
    """What packing measured of a bundle against its source, beside what was expected."""
    found = measured.comparison
    within = abs(found.increase) <= 2 * found.standard_error
    says = (
        f"On {found.n_tokens:,} tokens of {measured.text}, perplexity went from {found.perplexity_before:.3f} to "
        f"{found.perplexity_after:.3f}: {rise(found.increase)}, with a standard error of "
        f"{per_cent(found.standard_error, 2)}"
    )
    says += ", too little to be told from none. " if within else ". "
    if expected is not None:
        says += (
            f"The divergence is {1e3 * found.kl:.3g} thousandths of a nat a token, rounded activations and hot weights "
            f"in it; {1e3 * math.log1p(expected.increase):.2g} were expected from the experts' bits alone. "
        )
    says += f"The likeliest next token is the same {per_cent(found.top1)} of the time."
    rows = [[name, words] for name, words in measured.words().items()]
    return Section(
        "proof",
        "What it lost, measured",
        says,
        tables=[Table("proven", "against the source", ["", ""], rows, words=True)],
    )


# ---- the map ---------------------------------------------------------------------------------------------------------
def bits(subject: Subject, found: Floats) -> Section | None:
    """Bits per weight of each expert, (n_layers, n_expert), NaN in layers without; None for a plan all alike."""
    layers, packed = subject.profile.layers, subject.bundle is not None
    table, order = found[layers], np.argsort(-subject.profile.frequency()[layers].reshape(-1), kind="stable")
    ordered, quarter, by_layer = table.reshape(-1)[order], max(1, table.size // 4), table.mean(axis=1)
    most, least = int(by_layer.argmax()), int(by_layer.argmin())
    have = "has" if packed else "would have"
    says = (
        f"The average expert {have} {table.mean():.2f} bits per weight, from {table.min():.2f} to {table.max():.2f}; "
        f"the most used quarter {ordered[:quarter].mean():.2f}, the least used {ordered[-quarter:].mean():.2f}."
    )
    if differs := float(table.max() - table.min()) > _SAME:
        says += (
            f" Layer {layers[most]} gets most ({by_layer[most]:.2f}), layer {layers[least]} least "
            f"({by_layer[least]:.2f}): that is where quantising does most and least harm for its bytes."
        )
    elif packed:
        says = f"Every expert has the same {table.mean():.2f} bits per weight."
    else:
        return None
    title = "Bits of each expert" if packed else f"Bits that a loss of {100 * GOAL:.0f} % would leave each expert"
    rows = [[name, f"{n:,}", per_cent(n / table.size)] for name, n in _classes(table) if n]
    more = Table("widths", "experts by bits per weight", ["bits per weight", "experts", "of all"], rows)
    return Section("bits", title, says, _draw_bits(layers, table) if differs else "", more=[more])


def _classes(table: Floats) -> list[tuple[str, int]]:
    """How many experts have how many bits: each number, or classes of half a bit where there are many."""
    values, counts = np.unique(np.round(table, 2), return_counts=True)
    if len(values) <= _MOST_WIDTHS:
        return [(f"{value:.2f}", n) for value, n in zip(values.tolist(), counts.tolist(), strict=True)]
    halves, counts = np.unique(np.floor(table * 2), return_counts=True)
    return [(f"{n / 2:.1f} to {n / 2 + 0.5:.1f}", m) for n, m in zip(halves.tolist(), counts.tolist(), strict=True)]


def _draw_bits(layers: Sequence[int], table: Floats) -> str:
    with Drawing("bits", 4.8) as drawing:
        axes, image = drawing.map(Box(0.55, 1.15, WIDTH - 3.1, 3.45), table)
        count_from_zero(axes.xaxis, range(table.shape[1]), 16)
        count_from_zero(axes.yaxis, layers)
        axes.set(xlabel="expert", ylabel="layer")
        drawing.bar(image, "bits per weight, scales counted")
        beside = drawing.axes(Box(WIDTH - 2.25, 1.15, 2.05, 3.45))
        beside.barh(np.arange(len(layers)), table.mean(axis=1), height=0.7, color=SERIES[0])
        beside.set(ylim=(len(layers) - 0.5, -0.5), xlabel="mean of the layer, bits per weight")
        beside.set_yticks([])
        beside.spines.left.set_visible(False)
        return drawing.svg("Map of bits per weight by layer and expert, and the mean of each layer")

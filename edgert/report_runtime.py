"""Sections of a report on how the model will run: buffer sizes and policies, guesses, and tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgert.experts.choice import DEFAULT_POLICY
from edgert.experts.predictors import DEFAULT
from edgert.experts.replay import Belady, Hits, Report
from edgert.report_numbers import warm_tokens
from edgert.report_page import Fact, Section, Table
from edgert.report_speed import ARITHMETIC_SHARE, FLASH, READ_S, WORTH, Machine, Row, enough, what_if
from edgert.report_subject import Subject
from edgert.report_svg import INK, MUTED, SERIES, Box, Drawing, Label, label_ends
from edgert.report_words import per_cent, rate, size, speed
from edgert.types import Floats

_COMBINED = " + ".join(DEFAULT)
_ASSUMED_FLASH = "NVMe"


# ---- policies --------------------------------------------------------------------------------------------------------
def policies(found: Report) -> Section:
    """Share of the experts asked for that are in RAM, by the size of the buffer, for every policy and Belady's."""
    shares = list(found.residencies)
    place = min(range(len(shares)), key=lambda at: abs(shares[at] - 0.25))
    rates = {name: hits[place].rate for name, hits in found.policies.items()}
    best, foreseen = found.best_policies()[shares[place]], rates[Belady.name]
    others = ", ".join(f"`{name}` {per_cent(rates[name])}" for name in (DEFAULT_POLICY, "lru") if name != best)
    says = (
        f"With {per_cent(shares[place])} of the experts in RAM, the policy `{best}` finds {per_cent(rates[best])} of "
        f"what is asked for there ({others}). Belady, who knows the future, would find {per_cent(foreseen)}: better "
        f"foresight could gain at most {100 * (foreseen - rates[best]):.1f} points."
    )
    if any(_finds_more_and_reads_more(hits[place], found.policies[best][place]) for hits in found.policies.values()):
        says += " Others find more of them there, but read more bytes, for experts differ in size."
    order = sorted(found.policies, key=lambda name: (name != Belady.name, -rates[name]))
    rows = [[name, *(per_cent(hits.rate) for hits in found.policies[name])] for name in order]
    warm = warm_tokens(found.trace)
    caption = "share of the experts asked for that are in RAM, by the share of the experts' bytes that RAM holds"
    note = (
        f"Replayed token by token over {found.trace.n_tokens:,} tokens, stretches of the second halves of all texts in "
        f"turn, of which the first {warm:,} fill the buffer and {found.trace.n_tokens - warm:,} are counted. The "
        "policies begin with what the first halves of the texts say, as a bundle that is packed with the profile lets "
        "them."
    )
    table = Table("policies-rates", caption, ["policy", *map(per_cent, shares)], rows)
    title = "How large a buffer pays, and which policy"
    return Section("policies", title, says, _draw_policies(found, best), note, more=[table])


def _finds_more_and_reads_more(one: Hits, other: Hits) -> bool:
    return one.rate > other.rate and one.byte_rate < other.byte_rate


def _draw_policies(found: Report, best: str) -> str:
    with Drawing("policies", 3.9) as drawing:
        axes = drawing.axes(Box(0.75, 0.6, 6.6, 3.15))
        x = [100 * share for share in found.residencies]
        axes.set(xlim=(0, x[-1]), ylim=(0, 100), ylabel="experts found in RAM, %")
        axes.set_xlabel(f"expert buffer, % of all experts ({size(int(found.trace.record_bytes.sum()))})")
        axes.grid(True)
        labels, colours = [], iter(SERIES[1:])
        for name, hits in found.policies.items():
            y = [100 * one.rate for one in hits]
            colour = INK if name == Belady.name else SERIES[0] if name == DEFAULT_POLICY else next(colours, MUTED)
            width = 2.4 if name in (Belady.name, DEFAULT_POLICY, best) else 1.3
            axes.plot(x, y, color=colour, linewidth=width, marker="o", markersize=1.5 + width / 1.2, clip_on=False)
            remark = {Belady.name: " (knows the future)", DEFAULT_POLICY: " (default)"}.get(name, "")
            labels.append(Label(x[-1], y[-1], name + remark, colour))
        label_ends(axes, labels)
        return drawing.svg("Share of experts found in RAM by the size of the expert buffer, for each policy")


# ---- guesses ---------------------------------------------------------------------------------------------------------
def recall(layers: Sequence[int], found: Mapping[str, Floats]) -> Section | None:
    """What share of the experts used were guessed, layer by layer; found: (2, n_layers) of each predictor."""
    near = {name: of[0, layers] for name, of in found.items() if not np.isnan(of[0, layers]).all()}
    if not near:
        return None
    best = _COMBINED if _COMBINED in near else max(near, key=lambda name: float(np.nanmean(near[name])))
    worst = int(np.nanargmin(near[best]))
    says = (
        f"The guess by {best} names {_mean(near[best])} of the next layer's experts before they are asked for, least "
        f"in layer {layers[worst]} ({per_cent(float(near[best][worst]))}): reading ahead can hide no more than that "
        "share of what is not in RAM."
    )
    rows = [[name, *(_mean(of[distance, layers]) for distance in range(2))] for name, of in found.items()]
    caption = "share of the experts used that are among as many best guesses, mean over the layers"
    table = Table("recall-mean", caption, ["predictor", "next layer", "the layer after"], rows)
    by_layer = [[str(layer), *(_mean(of[0, [layer]]) for of in found.values())] for layer in layers]
    more = Table("recall-layers", "guesses one layer ahead, by layer", ["layer", *found], by_layer)
    shown = {name: of for name, of in near.items() if name == best or " + " not in name}
    figure = _draw_recall(layers, shown, best)
    return Section("recall", "How well the next experts are guessed", says, figure, tables=[table], more=[more])


def _mean(shares: Floats) -> str:
    known = shares[~np.isnan(shares)]
    return per_cent(float(known.mean(dtype=np.float64))) if len(known) else "--"


def _draw_recall(layers: Sequence[int], near: Mapping[str, Floats], best: str) -> str:
    with Drawing("recall", 3.6) as drawing:
        axes = drawing.axes(Box(0.75, 0.6, 6.2, 2.85))
        axes.set(xlim=(layers[0], max(layers[-1], layers[0] + 1)), ylim=(0, 100))
        axes.set(xlabel="layer", ylabel="next layer's experts guessed, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True)
        labels, colours = [], iter(SERIES[1:])
        for name, of in near.items():
            colour = SERIES[0] if name == best else next(colours, MUTED)
            axes.plot(layers, 100 * of, color=colour, linewidth=2.4 if name == best else 1.3)
            last = int(np.flatnonzero(~np.isnan(of))[-1])
            labels.append(Label(layers[last], 100 * float(of[last]), f"{name} ({100 * np.nanmean(of):.0f} %)", colour))
        label_ends(axes, labels)
        return drawing.svg("Share of the next layer's experts that each predictor names, by layer")


# ---- tokens a second -------------------------------------------------------------------------------------------------
def what_memory_gives(subject: Subject, found: Report, machine: Machine) -> tuple[Section, list[Fact]]:
    """Tokens a second by memory and flash, and what the summary says of them."""
    rates, here = dict(FLASH), _ASSUMED_FLASH
    if machine.flash is not None:
        here = "this drive"
        rates = dict(sorted([*rates.items(), (here, machine.flash)], key=lambda one: one[1]))
    rows = what_if(subject, found, machine, list(rates.values()))
    column = list(rates).index(here)
    chosen = enough(rows, column, machine.memory)
    flash = f"{here}, {rate(rates[here])}"
    memory = size(chosen.bytes)
    where = "--memory" if chosen.process_bytes else "for experts alone"
    expected = f"{speed(chosen.tokens_per_s[column])} tok/s"
    facts = [
        Fact("Suggested memory", memory, f"{where}; it holds {per_cent(chosen.residency)} of the experts", "speed"),
        Fact("Expected speed", expected, f"with that and {flash}", "speed"),
    ]
    says = _about_speed(rows, chosen, column, machine, flash)
    table = _speed_table(rows, rates, rows.index(chosen))
    figure, note = _draw_speed(rows, rates, here), _assumptions(subject, machine)
    return Section("speed", "How fast it will answer", says, figure, note, tables=[table]), facts


def _about_speed(rows: Sequence[Row], chosen: Row, column: int, machine: Machine, flash: str) -> str:
    memory = size(chosen.bytes) if chosen.process_bytes else f"{size(chosen.bytes)} for experts"
    whole, part = (speed(row.tokens_per_s[column]) for row in (rows[-1], chosen))
    if chosen is rows[-1]:
        return (
            f"With all experts in RAM, {memory}, expect {whole} tokens a second; holding only as many as give "
            f"{100 * WORTH:.0f} % of that, the others on {flash}, would take hardly less."
        )
    found = (
        f"{part} of the {whole} tokens a second that all experts in RAM would give, {per_cent(chosen.hit_rate)} of the "
        f"experts found, {size(chosen.read_bytes)} read a token."
    )
    if chosen.tokens_per_s[column] < WORTH * rows[-1].tokens_per_s[column]:
        return (
            f"This machine can spare {size(machine.memory or 0)}. With experts on {flash}, {memory} gives {found} The "
            "table says what more memory or faster flash would give."
        )
    worth = f"the least of these sizes that gives {100 * WORTH:.0f} % of the full speed"
    return f"With experts on {flash}, {worth} is {memory}: {found}"


def _speed_table(rows: Sequence[Row], rates: Mapping[str, float], marked: int) -> Table:
    header = ["experts in RAM", "their bytes", "memory in all", "policy", "found in RAM", "read a token"]
    header += [f"{name}, {rate(one)}" for name, one in rates.items()]
    cells = [
        [
            per_cent(row.residency),
            size(row.buffer_bytes),
            size(row.process_bytes) if row.process_bytes else "--",
            row.policy or "--",
            per_cent(row.hit_rate),
            size(row.read_bytes),
            *map(speed, row.tokens_per_s),
        ]
        for row in rows
    ]
    return Table("what-if", "tokens a second by memory and by the flash that holds the experts", header, cells, marked)


def _assumptions(subject: Subject, machine: Machine) -> str:
    ram = f"{rate(machine.ram)}, {'measured on this machine now' if machine.ram_measured else 'assumed'}"
    hot = "hot weights are not counted, for the profile does not say what they are"
    if subject.needs is not None:
        hot = f"hot weights are {size(subject.needs.hot)}"
    context = (
        f" Memory in all, which is what `--memory` takes, is for a context of {subject.needs.context:,} tokens."
        if subject.needs is not None
        else ""
    )
    drive = "" if machine.flash is not None else " How fast this drive is was never measured: run `edgert doctor`."
    return (
        "An estimate, for tokens that are generated one by one after a short prompt. Arithmetic takes as long as "
        f"reading all weights that a token needs from memory at {100 * ARITHMETIC_SHARE:.0f} % of {ram}; {hot}. What "
        "the policy did not keep in the replay above is read from flash at the rate given and "
        f"{1000 * READ_S:.1f} ms a read. Nothing is read ahead, and no reading overlaps arithmetic.{context}{drive}"
    )


def _draw_speed(rows: Sequence[Row], rates: Mapping[str, float], here: str) -> str:
    with Drawing("speed", 3.7) as drawing:
        from matplotlib.ticker import LogLocator

        axes = drawing.axes(Box(2.0, 0.6, 6.6, 2.95))
        axes.set(xlim=(100 * rows[0].residency, 100), xlabel="expert buffer, % of all experts")
        axes.set(yscale="log", ylabel="tokens a second")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
        axes.yaxis.set_label_position("right")
        axes.yaxis.tick_right()
        axes.spines.left.set_visible(False)
        axes.spines.right.set_visible(True)
        axes.grid(True)
        x, labels, colours = [100 * row.residency for row in rows], [], iter(SERIES[1:])
        for column, (name, one) in enumerate(rates.items()):
            y = [row.tokens_per_s[column] for row in rows]
            colour = SERIES[0] if name == here else next(colours, MUTED)
            width = 2.4 if name == here else 1.3
            axes.plot(x, y, color=colour, linewidth=width, marker="o", markersize=1.5 + width / 1.2, clip_on=False)
            labels.append(Label(x[0], y[0], f"{name}, {rate(one)}", colour))
        label_ends(axes, labels, left=True)
        return drawing.svg("Expected tokens a second by the size of the expert buffer, for each kind of flash")

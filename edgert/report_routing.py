"""Sections of a report on what was routed where: maps, unevenness, other texts' hot sets, reuse, pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgert.experts.profile import Profile, normalised
from edgert.experts.profile_statistics import previous_token_reuse, reuse
from edgert.experts.profile_statistics import skew as skew_by_layer
from edgert.report_numbers import Numbers, concentration, halves, hot_count, hot_share, served, together
from edgert.report_page import Section, Table
from edgert.report_svg import (
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Box,
    Drawing,
    Label,
    count_from_zero,
    label_ends,
    list_names,
)
from edgert.report_words import count, per_cent, shorten, times
from edgert.types import Floats

_ALL = "all text"
_HOT_PARTS = (0.1, 0.25, 0.5)
_QUARTER = 0.25
_EVEN = 0.35  # of all uses on the hottest quarter: below, routing is called even
_LOST = 0.03  # of uses that another text's hot set misses: above, texts are called different
_MOST_TEXTS, _MOST_MAPS, _PAIR_MAPS = 12, 9, 3
_STRONG = 2.0  # times chance, from which a pair is called one


def by_domain(profile: Profile) -> dict[str, Floats]:
    """The share of tokens that use each expert, all text by its weights first, (n_layers with experts, n_expert)."""
    return {name: profile.frequency(shares)[profile.layers] for name, shares in _texts(profile).items()}


def _texts(profile: Profile) -> dict[str, dict[str, float] | None]:
    """Weights of domains for all text together, and for each of the longest alone."""
    longest = sorted(profile.domains, key=lambda domain: -len(domain.tokens))[:_MOST_TEXTS]
    alone = {domain.name: {domain.name: 1.0} for domain in longest}
    return {_ALL: None, **(alone if len(alone) > 1 else {})}


def _effective(profile: Profile, shares: Mapping[str, float] | None = None) -> Floats:
    """As many experts, used evenly, have the same entropy: (n_layers with experts,)."""
    entropy: Floats = 2 ** skew_by_layer(profile, shares).entropy[profile.layers]
    return entropy


# ---- maps ------------------------------------------------------------------------------------------------------------
def maps(profile: Profile) -> Section:
    """How often each expert of each layer is used, by kind of text."""
    shares = by_domain(profile)
    every, even = shares[_ALL], profile.top_k / profile.n_expert
    row, expert = np.unravel_index(every.argmax(), every.shape)
    never = ~np.any([profile.frequency({one.name: 1.0})[profile.layers] > 0 for one in profile.domains], axis=0)
    says = (
        f"The busiest expert is number {expert} of layer {profile.layers[row]}: {per_cent(every[row, expert])} of all "
        f"tokens use it, {times(every[row, expert] / even)} the {per_cent(even)} of even routing. "
    )
    if never.any():
        says += (
            f"{count(int(never.sum()), 'expert')} of {never.size:,} {'was' if never.sum() == 1 else 'were'} never used "
            f"in {profile.n_tokens:,} tokens (grey): nothing is known of them, and packing leaves them at the base "
            "width."
        )
    else:
        says += f"All {never.size:,} experts were used at least once in {profile.n_tokens:,} tokens."
    rows = [
        [str(layer), per_cent(line.max()), str(int(line.argmax())), f"{wide:.1f}", str(int(blank.sum()))]
        for layer, line, wide, blank in zip(profile.layers, every, _effective(profile), never, strict=True)
    ]
    header = ["layer", "busiest expert's share", "its number", "effective experts", "never used"]
    caption = f"all text; effective experts: as many, used evenly, have the same entropy, of {profile.n_expert}"
    table = Table("layers", caption, header, rows)
    return Section("maps", "Which experts are used", says, _draw_maps(profile, shares), more=[table])


def _draw_maps(profile: Profile, shares: Mapping[str, Floats]) -> str:
    names = list(shares)[:_MOST_MAPS]
    n_columns = min(len(names), 3)
    n_rows = -(-len(names) // n_columns)
    left, gap, bottom, high, apart = 0.55, 0.35, 1.15, 2.6, 0.6
    wide = (WIDTH - left - 0.1 - gap * (n_columns - 1)) / n_columns
    with Drawing("maps", bottom + n_rows * (high + apart) - apart + 0.3) as drawing:
        from matplotlib.colors import PowerNorm

        most = max(100 * float(one.max()) for one in shares.values())
        norm = PowerNorm(0.5, vmin=0, vmax=most)  # most experts are near the even share, a few far above
        for place, name in enumerate(names):
            row, column = divmod(place, n_columns)
            y = bottom + (n_rows - 1 - row) * (high + apart)
            box, values = Box(left + column * (wide + gap), y, wide, high), np.ma.masked_equal(100 * shares[name], 0.0)
            axes, image = drawing.map(box, values, shorten(name, 40), norm=norm)
            count_from_zero(axes.xaxis, range(profile.n_expert))
            count_from_zero(axes.yaxis, profile.layers)
            axes.set_ylabel("" if column else "layer")
            axes.set_xlabel("" if place + n_columns < len(names) else "expert")
        even = 100 * profile.top_k / profile.n_expert
        ticks = {tick: f"{tick:.3g}" for tick in (0, even, 4 * even, 16 * even, 64 * even) if tick <= most}
        drawing.bar(image, f"tokens that use the expert, %; even routing: {even:.3g}; grey: none", ticks)
        shape = f"{profile.n_expert} experts by {len(profile.layers)} layers"
        return drawing.svg(f"Maps of {shape}, coloured by how often each is used")


# ---- unevenness ------------------------------------------------------------------------------------------------------
def skew(profile: Profile) -> Section:
    """What part of the work the hottest experts do."""
    shares = by_domain(profile)
    n = shares[_ALL].size
    tenth, quarter = hot_share(shares[_ALL], 0.1), hot_share(shares[_ALL], _QUARTER)
    learnt, new = (one.frequency()[profile.layers] for one in halves(profile))
    kept = served(learnt, new, _QUARTER)
    says = (
        f"The hottest tenth of the experts ({hot_count(n, 0.1)} of {n:,}) does {per_cent(tenth)} of the work, the "
        f"hottest quarter {per_cent(quarter)}; learnt on the first halves of the texts, {per_cent(kept)} in the "
        "second. "
    )
    says += (
        "That is close to even: a fixed set of experts in RAM serves little more than its size, and what is kept has "
        "to follow the text."
        if kept < _EVEN
        else f"A fixed set of a quarter of the experts in RAM serves {times(kept / _QUARTER)} what it would if "
        "routing were even."
    )
    rows = [
        [
            name,
            *(per_cent(hot_share(shares[name], part)) for part in _HOT_PARTS),
            f"{_effective(profile, one).mean():.1f}",
        ]
        for name, one in _texts(profile).items()
    ]
    header = ["text", *(f"hottest {100 * part:.0f} %" for part in _HOT_PARTS), "effective experts a layer"]
    caption = "part of all uses that falls on the experts that are hottest in this very text; of new text it is less"
    table = Table("hottest", caption, header, rows)
    return Section("skew", "How uneven the use is", says, _draw_skew(shares), tables=[table])


def _draw_skew(shares: Mapping[str, Floats]) -> str:
    with Drawing("skew", 3.7) as drawing:
        axes = drawing.axes(Box(0.75, 0.6, 6.4, 2.95))
        axes.set(xlim=(0, 50), ylim=(0, 100), xlabel="experts, hottest first, %", ylabel="uses that fall on them, %")
        axes.grid(True)
        axes.plot([0, 50], [0, 50], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        labels = [Label(50, 50, "even routing", MUTED)]
        for (name, share), colour in zip(shares.items(), (INK, *SERIES), strict=False):
            x, y = 100 * np.arange(1, share.size + 1) / share.size, 100 * concentration(share)
            axes.plot([0, *x], [0, *y], color=colour, linewidth=2.4 if name == _ALL else 1.4)
            labels.append(Label(50, float(np.interp(50, x, y)), shorten(name, 26), colour))
        label_ends(axes, labels)
        return drawing.svg("Cumulative share of uses by share of experts, hottest first")


# ---- other texts' hot sets -------------------------------------------------------------------------------------------
def transfer(profile: Profile) -> Section | None:
    """What the experts that are hot in one kind of text serve of another; None for a single kind.

    Learnt on the first halves of the texts and judged on the second: a set is no better than it would be on new text.
    """
    learnt, shares = (by_domain(one) for one in halves(profile))
    every, names = learnt.pop(_ALL), list(learnt)
    if len(names) < 2:
        return None
    grid = np.array([[served(learnt[hot], shares[used], _QUARTER) for used in names] for hot in names])
    merged = np.array([served(every, shares[used], _QUARTER) for used in names])
    lost = grid.diagonal()[None, :] - grid
    hot, used = (int(place) for place in np.unravel_index(lost.argmax(), lost.shape))
    says = (
        f"The hottest quarter learnt on {names[hot]} serves {per_cent(grid[hot, used])} of what {names[used]} uses; "
        f"learnt on {names[used]} itself, {per_cent(grid[used, used])}. Learnt on all of them together it loses at "
        f"most {100 * (grid.diagonal() - merged).max():.1f} points: "
    )
    says += (
        "calibrate with every kind of text that the model will see."
        if lost.max() > _LOST
        else "these kinds of text route alike, and one profile serves them all."
    )
    rows = [[f"hot in {name}", *map(per_cent, grid[row].tolist())] for row, name in enumerate(names)]
    rows.append(["hot in all of them", *map(per_cent, merged.tolist())])
    size = hot_count(every.size, _QUARTER)
    caption = (
        f"uses in the second half of one text (column) that the hottest quarter in the first half of another (row), "
        f"{size} experts, serves"
    )
    table = Table("served", caption, ["", *names], rows)
    return Section("transfer", "Would the hot experts of one text serve another?", says, tables=[table])


# ---- reuse -----------------------------------------------------------------------------------------------------------
def reused(profile: Profile) -> Section:
    """How soon an expert is used again."""
    texts = _texts(profile)
    soon = {name: float(np.nanmean(previous_token_reuse(profile, shares))) for name, shares in texts.items()}
    found = _returns(profile)
    by_experts = found[_ALL][0]
    half, most = int(np.searchsorted(by_experts, 0.5)), profile.n_expert
    says = (
        f"{per_cent(soon[_ALL])} of what a token uses was used by the token before it; if routing were random, "
        f"{per_cent(profile.top_k / most)}. "
    )
    says += (
        f"Half of all uses come after at most {count(half, 'other expert')} of the layer: keeping the last {half + 1} "
        f"used of each layer's {most} finds half of them in RAM."
        if half < most
        else f"Only {per_cent(by_experts[-1])} of all uses are of an expert that its chunk has used before."
    )
    kept = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most]
    rows = [[name, per_cent(soon[name]), *(per_cent(found[name][0][n - 1]) for n in kept)] for name in texts]
    caption = "uses that are found by keeping what the token before used, or the last experts used in each layer"
    table = Table("reused", caption, ["text", "token before", *(f"last {n}" for n in kept)], rows)
    note = f"Within chunks of {profile.chunk:,} tokens; the first use of an expert in a chunk finds nothing."
    return Section("reuse", "How soon an expert is used again", says, _draw_reuse(found), note, more=[table])


def _returns(profile: Profile) -> dict[str, tuple[Numbers, Numbers]]:
    """Shares of uses that come back by so many other experts, (n_expert,), and by so many tokens, (chunk,)."""
    found = dict[str, tuple[Numbers, Numbers]]()
    for domain in profile.domains:
        one = reuse(profile, {domain.name: 1.0})
        experts, tokens = (part[profile.layers].mean(axis=0, dtype=np.float64) for part in (one.distinct, one.tokens))
        found[domain.name] = experts.cumsum(), tokens.cumsum()
    shares = normalised(profile.shares)
    experts, tokens = (sum(shares[name] * found[name][part] for name in shares) for part in range(2))
    every = {_ALL: (np.asarray(experts), np.asarray(tokens))}
    return {**every, **found} if len(found) > 1 else every


def _draw_reuse(found: Mapping[str, tuple[Numbers, Numbers]]) -> str:
    with Drawing("reuse", 3.5) as drawing:
        left = drawing.axes(Box(0.75, 0.6, 4.1, 2.75))
        right = drawing.axes(Box(5.3, 0.6, 4.1, 2.75))
        n_expert, n_tokens = (len(one) for one in found[_ALL])
        left.set(xlim=(0, n_expert - 1), xlabel="other experts of the layer used since")
        right.set(xlim=(1, n_tokens - 1), xlabel="tokens since", xscale="log")
        for axes in (left, right):
            axes.set_ylim(0, 100)
            axes.grid(True)
        left.set_ylabel("uses that come back by then, %")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.xaxis.set_major_formatter("{x:g}")
        right.minorticks_off()
        names = [(shorten(name, 30), colour) for name, colour in zip(found, (INK, *SERIES), strict=False)]
        for (by_experts, by_tokens), (name, colour) in zip(found.values(), names, strict=False):
            width = 2.4 if name == _ALL else 1.4
            left.plot(np.arange(n_expert), 100 * by_experts, color=colour, linewidth=width)
            right.plot(np.arange(1, n_tokens), 100 * by_tokens[1:], color=colour, linewidth=width)
        list_names(right, names)
        return drawing.svg("Cumulative share of uses by the experts and by the tokens since the use before")


# ---- pairs -----------------------------------------------------------------------------------------------------------
def pairs(profile: Profile) -> Section | None:
    """Which experts of a layer are chosen together; None where a token uses one."""
    if profile.top_k < 2:
        return None
    least = 0.5 * (profile.top_k / profile.n_expert) ** 2  # of tokens: rarer pairs say little
    lifts, found = dict[int, Numbers](), dict[int, tuple[int, int, float, float]]()
    for layer in profile.layers:
        both, lifts[layer] = together(profile, layer)
        strength = np.where(both > least, lifts[layer], 0.0)  # (n_expert, n_expert)
        one, other = (int(place) for place in np.unravel_index(strength.argmax(), strength.shape))
        found[layer] = one, other, float(both[one, other]), float(strength[one, other])
    order = sorted(found, key=lambda layer: -found[layer][3])
    one, other, share, lift = found[order[0]]
    says = (
        f"The strongest pair are experts {one} and {other} of layer {order[0]}: {per_cent(share)} of all tokens use "
        f"both, {times(lift)} as many as chance would have it. "
    )
    strong = sum(lift > _STRONG for *_, lift in found.values())
    says += (
        f"{count(strong, 'layer')} of {len(found)} {'has' if strong == 1 else 'have'} a pair beyond {times(_STRONG)}: "
        "a buffer that keeps the one does well to keep the other. No guess is better for it: a layer's router names "
        "all that a token uses there at once."
        if strong
        else "Experts are chosen nearly independently of each other: nothing is gained by keeping pairs as one."
    )
    rows = [[str(n), f"{a} and {b}", per_cent(part), f"{ratio:.1f}"] for n, (a, b, part, ratio) in found.items()]
    caption = "the strongest pair of each layer; pairs that half of chance or fewer tokens use are left out"
    table = Table("pairs", caption, ["layer", "experts", "tokens that use both", "times chance"], rows)
    figure = _draw_pairs({layer: lifts[layer] for layer in sorted(order[:_PAIR_MAPS])})
    return Section("together", "Which experts go together", says, figure, more=[table])


def _draw_pairs(lifts: Mapping[int, Numbers]) -> str:
    left, gap, bottom, high = 0.55, 0.35, 1.15, 2.75
    wide = (WIDTH - left - 0.1 - (_PAIR_MAPS - 1) * gap) / _PAIR_MAPS
    with Drawing("together", bottom + high + 0.3) as drawing:
        for place, (layer, lift) in enumerate(lifts.items()):
            with np.errstate(divide="ignore"):
                values = np.ma.masked_invalid(np.log2(np.maximum(lift, 2.0**-9)))  # NaN stays
            box = Box(left + place * (wide + gap), bottom, wide, high)
            axes, image = drawing.map(box, values, f"layer {layer}", cmap="PuOr_r", vmin=-2, vmax=2)
            for axis in (axes.xaxis, axes.yaxis):
                count_from_zero(axis, range(len(lift)))
            axes.set(xlabel="expert", ylabel="" if place else "expert")
        names = {-2.0: "1/4 or less", -1.0: "1/2", 0.0: "1", 1.0: "2", 2.0: "4 or more"}
        drawing.bar(image, "tokens that use both, times chance", names)
        return drawing.svg("How often two experts of a layer are chosen together, over chance")

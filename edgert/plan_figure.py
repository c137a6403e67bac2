"""The roofline of a plan as a picture: what a board can do, and where the parts of a token and of a prompt lie.

Both axes are logarithmic. A part lies on the roof above its operations a byte; the larger its mark, the more of the
time it takes. Experts from flash lie on a roof of their own, far below that of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgert.errors import OptionError, StorageError
from edgert.report_svg import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from edgert.plan import Plan
    from edgert.plan_parts import Part

_INK, _MUTED, _RULE = "#1a1a1a", "#5f6368", "#dddddd"
_TOKEN, _PROMPT, _FLASH = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, which the colour-blind tell apart
_WIDTH, _HEIGHT = 6.4, 4.9  # inches of one board
_NEAR = 0.16  # decades within which marks share a name
_SMALL = 0.03  # of the time: what is less is named in grey, where there is room
_SHORT = {f"{part}_proj": part for part in ("q", "k", "v", "o", "qkv", "gate", "up", "down")}
_SHORT |= {"qk_matmul": "scores", "sv_matmul": "values"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "roofline",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Mark(NamedTuple):
    """A part, or several that lie together: operations a byte, operations a second, share of the time."""

    x: float
    y: float
    share: float
    name: str


def check_plot(path: Path) -> None:
    """OptionError for a file that is neither .svg nor .png; UnsupportedError without matplotlib."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise OptionError(f"--plot {path} is neither .svg nor .png: name such a file")
    require_matplotlib()


def write_roofline(plans: Sequence[Plan], path: Path) -> None:
    """Draw plans beside each other, and write the picture. StorageError if that cannot be done."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH * len(plans), _HEIGHT), layout="constrained")
        axes = figure.subplots(1, len(plans), squeeze=False, sharex=True, sharey=True)[0]
        _set_limits(axes[0], plans)
        for one, plan in zip(axes, plans, strict=True):
            _draw(one, plan)
        axes[0].set_ylabel("operations a second")
        try:
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata, facecolor="white")
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror or error}); name another file") from error


def _set_limits(axes: Axes, plans: Sequence[Plan]) -> None:
    """Limits that hold the marks and the ridges of all boards."""
    marks = [mark for plan in plans for mark in (*token_marks(plan), *prompt_marks(plan), *flash_marks(plan))]
    ridges = [plan.board.main.peak_per_s / plan.board.main.bytes_per_s for plan in plans]
    x = [mark.x for mark in marks] + ridges
    y = [mark.y for mark in marks] + [plan.board.main.peak_per_s for plan in plans]
    axes.set(xscale="log", yscale="log", xlim=(min(x) / 3, max(x) * 4), ylim=(min(y) / 4, max(y) * 4))


def _draw(axes: Axes, plan: Plan) -> None:
    """One board."""
    unit, board = plan.board.main, plan.board
    axes.grid(True)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_major_formatter(lambda value, _: _scaled(value))
    axes.set_xlabel("operations a byte")
    axes.set_title(f"{plan.model.name} on {board.title}", loc="left", fontsize=10, fontweight="bold")
    marks = (*token_marks(plan), *prompt_marks(plan), *flash_marks(plan))
    int8 = unit.int8_per_s if unit.int8_per_s and any(part.kind == "int8" for part in plan.decode) else None
    peak = int8 or unit.half_per_s
    _roof(axes, unit.bytes_per_s, peak, _INK, f"memory, {unit.bytes_per_s / 1e9:.0f} GB/s")
    high = axes.get_xlim()[1]
    words = "int8" if int8 else "floats"
    axes.annotate(
        f"{words}, {_scaled(peak)} op/s", (high, peak), (-2, 9), textcoords="offset points", ha="right", fontsize=8
    )
    if int8 and unit.half_per_s < peak:
        axes.plot((unit.half_per_s / unit.bytes_per_s, high), [unit.half_per_s] * 2, color=_MUTED, lw=0.9, ls=":")
        _note(axes, high, unit.half_per_s, f"floats, {_scaled(unit.half_per_s)} op/s")
    if plan.hits is not None:
        flash = plan.main.flash
        words = f"{flash.name}, {flash.bytes_per_s / 1e9:.2g} GB/s"
        marked = max((mark.x for mark in flash_marks(plan)), default=0.0)
        _roof(axes, flash.bytes_per_s, peak, _FLASH, words, dashed=True, marked=marked)
    for some, colour, shape in (
        (token_marks(plan), _TOKEN, "o"),
        (prompt_marks(plan), _PROMPT, "s"),
        (flash_marks(plan), _FLASH, "D"),
    ):
        for mark in some:
            axes.plot(mark.x, mark.y, shape, color=colour, ms=4 + 12 * math.sqrt(mark.share), alpha=0.75, mew=0)
    found = ((token_marks(plan), _TOKEN), (prompt_marks(plan), _PROMPT), (flash_marks(plan), _FLASH))
    _name(axes, [(mark, colour) for some, colour in found for mark in some])
    _legend(axes, plan, bool(marks))


def _roof(
    axes: Axes, bytes_per_s: float, peak: float, colour: str, words: str, *, dashed: bool = False, marked: float = 0.0
) -> None:
    """The line of what a rate of bytes allows, up to the peak of operations. marked: where its name should not be."""
    low, high = axes.get_xlim()
    ridge = peak / bytes_per_s
    style = "--" if dashed else "-"
    axes.plot((low, ridge, max(high, ridge)), (low * bytes_per_s, peak, peak), style, color=colour, lw=1.4)
    width, height = _WIDTH - 1.2, _HEIGHT - 1.1
    x_decades, y_decades = (math.log10(b / a) for a, b in (axes.get_xlim(), axes.get_ylim()))
    angle = math.degrees(math.atan2(height / y_decades, width / x_decades))
    bottom = axes.get_ylim()[0]
    x = max(low * 1.25, 1.6 * bottom / bytes_per_s)
    if x < marked < 4 * x:
        x = 2 * marked
    axes.annotate(
        words,
        (x, x * bytes_per_s),
        (0, 4),
        textcoords="offset points",
        rotation=angle,
        rotation_mode="anchor",
        color=colour,
        fontsize=8,
    )


def _note(axes: Axes, x: float, y: float, words: str) -> None:
    axes.annotate(words, (x, y), (-2, -4), textcoords="offset points", ha="right", va="top", color=_MUTED, fontsize=8)


def _name(axes: Axes, marks: Sequence[tuple[Mark, str]]) -> None:
    """Names to the right of marks and below them, moved down where they would meet; small marks without a neighbour's
    name get theirs in grey."""
    placed: list[tuple[float, float, float, float]] = []  # boxes of names, in points
    points = axes.transData + axes.figure.dpi_scale_trans.inverted()
    for mark, colour in sorted(marks, key=lambda one: -one[0].share):
        x, y = (72 * value for value in points.transform((mark.x, mark.y)))
        is_small = mark.share < _SMALL
        if is_small and any(abs(x - other[0]) < 40 and abs(y - other[3]) < 22 for other in placed):
            continue
        width, height, down = 4.6 * len(mark.name), 11.0, 12.0
        while any(_meet((x + 9, y - down - height, x + 9 + width, y - down), other) for other in placed):
            down += 6
        placed.append((x + 9, y - down - height, x + 9 + width, y - down))
        axes.annotate(
            mark.name,
            (mark.x, mark.y),
            (9, -down - height + 2),
            textcoords="offset points",
            fontsize=7.5,
            color=_MUTED if is_small else colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 3},
        )


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(axes: Axes, plan: Plan, marks: bool) -> None:
    """What the colours are."""
    rows = [(_TOKEN, f"a token, {plan.request.prompt:,} tokens in"), (_PROMPT, "a chunk of the prompt")]
    if plan.hits is not None:
        rows.append((_FLASH, f"experts from flash, {plan.hits.usual:.0%} found in RAM"))
    for line, (colour, words) in enumerate(rows if marks else ()):
        axes.annotate(
            words, (0.015, 0.985), (0, -12 * line), "axes fraction", "offset points", va="top", color=colour, fontsize=8
        )


# ---- marks -----------------------------------------------------------------------------------------------------------
def token_marks(plan: Plan) -> list[Mark]:
    """Parts of a token."""
    return list(_together(plan.decode, plan))


def prompt_marks(plan: Plan) -> list[Mark]:
    """Parts of the prompt's first chunk."""
    return list(_together(plan.prompt, plan))


def flash_marks(plan: Plan) -> list[Mark]:
    """The experts that a token reads from flash."""
    if plan.hits is None or plan.memory is None or plan.hits.usual >= 1:
        return []
    missed = 1 - plan.hits.usual
    operations = sum(part.count * part.operations for part in plan.decode if part.cold) * missed
    intensity = operations / (plan.memory.working_set * missed)
    share = plan.main.flash_s / (plan.main.flash_s + plan.main.arithmetic_s)
    return [Mark(intensity, intensity * plan.main.flash.bytes_per_s, share, "missing experts")]


def _together(parts: Sequence[Part], plan: Plan) -> Iterator[Mark]:
    """Marks of parts, of which those that lie close share one."""
    unit = plan.board.main
    there = [part for part in parts if part.n_bytes and part.operations]
    total = sum(part.seconds(unit) for part in there) or 1.0
    groups: list[list[Part]] = []
    for part in sorted(there, key=lambda part: part.intensity):
        near = groups and abs(math.log10(part.intensity / groups[-1][0].intensity)) < _NEAR
        if near and abs(math.log10(part.rate(unit) / groups[-1][0].rate(unit))) < _NEAR:
            groups[-1].append(part)
        else:
            groups.append([part])
    for group in groups:
        largest = max(group, key=lambda part: part.seconds(unit))
        share = sum(part.seconds(unit) for part in group) / total
        yield Mark(largest.intensity, largest.rate(unit), share, _names(group))


def _names(parts: Sequence[Part]) -> str:
    """The names of parts that share a mark, the kinds of matrices by their letters or once."""
    names = dict.fromkeys(_SHORT.get(part.name, part.name) for part in parts)
    if any(part.name.endswith("(experts)") for part in parts):
        names = {"experts": None} | {name: None for name in names if not name.endswith("(experts)")}
    if any(part.name.endswith("(shared)") for part in parts):
        names = {"shared": None} | {name: None for name in names if not name.endswith("(shared)")}
    return ", ".join(names)


def _scaled(value: float) -> str:
    for unit in ("", "K", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"

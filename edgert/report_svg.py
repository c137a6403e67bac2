"""Figures as SVG inside a page: matplotlib draws them, the page's style sheet gives them its colours and its font.

Colours that depend on light and dark are drawn as stand-ins and become variables of the style sheet. Knows nothing of
what is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgert.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart, in the order of use; each has a tone for dark pages.
_VARIABLES = ("ink", "muted", "rule", "paper", "blue", "orange", "green", "pink", "sky", "amber")
_STAND_INS = {name: f"#0102{number:02x}" for number, name in enumerate(_VARIABLES)}
INK, MUTED, RULE, PAPER = (_STAND_INS[name] for name in _VARIABLES[:4])
SERIES = tuple(_STAND_INS[name] for name in _VARIABLES[4:])

FONT, SMALL = 10.0, 8.5  # points; a figure is shown at about its own size
WIDTH = 9.6  # inches
_BAR = 3.2  # inches, of a scale of colours
_LETTER = 0.65  # of the size of the font, its width: that of digits
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, and is wider than what the page shows: no overlaps
    "font.size": FONT,
    "text.parse_math": False,  # names hold any character
    "axes.labelsize": FONT,
    "axes.titlesize": FONT,
    "axes.titlelocation": "left",
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "image.interpolation": "none",
    "image.cmap": "viridis",
}


class Box(NamedTuple):
    """Where axes lie in a figure, in inches from its left and lower edge."""

    left: float
    bottom: float
    width: float
    height: float


class Label(NamedTuple):
    """What a line is called, beside its last point (x, y)."""

    x: float
    y: float
    text: str
    colour: str


def require_matplotlib() -> None:
    """UnsupportedError, in one line, where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401   # whether it is there
    except ImportError as error:
        raise UnsupportedError(
            'the figures of a report are drawn by matplotlib, which is not installed; run: pip install "edgert[report]"'
        ) from error


class Drawing:
    """One figure of a page, `height` inches high, drawn within a `with` statement, for so long the page's style holds.

    `axes(box)` puts axes into it, `svg()` gives its text: the same for the same figure whenever it is drawn.
    """

    def __init__(self, name: str, height: float, width: float = WIDTH) -> None:
        self.name, self.width, self.height = name, width, height

    def __enter__(self) -> Drawing:
        import matplotlib
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name})
        self._style.__enter__()
        self.figure: Figure = Figure(figsize=(self.width, self.height))
        return self

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)

    def axes(self, box: Box, title: str = "") -> Axes:
        """New axes."""
        place = (box.left / self.width, box.bottom / self.height, box.width / self.width, box.height / self.height)
        axes = self.figure.add_axes(place, title=title)
        for spine in axes.spines.values():
            spine.set_linewidth(0.6)
        return axes

    def map(self, box: Box, values: Any, title: str = "", **options: Any) -> tuple[Axes, Any]:
        """Axes with a map of values (n_rows, n_columns), the first row on top, grey where masked; and its image."""
        axes = self.axes(box, title)
        axes.set_facecolor(RULE)
        return axes, axes.imshow(values, aspect="auto", **options)

    def bar(self, image: Any, label: str, ticks: Mapping[float, str] | None = None) -> None:
        """What the colours of an image mean, in the lowest 0.55 inches of the figure.

        ticks: names of ascending values; those that would touch the one before are left out.
        """
        axes = self.axes(Box(0.55, 0.46, _BAR, 0.12))
        bar = self.figure.colorbar(image, cax=axes, orientation="horizontal")
        if ticks is not None:
            free = legible([(_BAR * float(image.norm(value)), name) for value, name in ticks.items()])
            bar.set_ticks(
                [list(ticks)[place] for place in free], labels=[list(ticks.values())[place] for place in free]
            )
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="minor", length=0)
        bar.set_label(label, loc="left")

    def svg(self, description: str) -> str:
        """The figure as an <svg> element; `description` is for those who cannot see it."""
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page's own fonts will show it
            self.figure.savefig(written, format="svg", metadata={"Date": None})
        return inline(written.getvalue(), self.name, description)


def inline(document: str, name: str, description: str) -> str:
    """An SVG document as an element of a page: without what points outside, its ids its own, its colours the page's."""
    found = re.search(r"<svg\b[^>]*?viewBox=\"([^\"]*)\"[^>]*>(.*)</svg>", document, re.DOTALL)
    assert found, "no SVG"
    view, body = found.groups()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", body))
    body = re.sub(r" id=\"([^\"]+)\"", lambda id: f' id="{name}-{id[1]}"' if id[1] in used else "", body)
    body = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{name}-", body)
    for variable, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, f"var(--{variable})")
    title = html.escape(description)
    return f'<svg viewBox="{view}" role="img" aria-label="{title}">{body.strip()}</svg>'


def label_ends(axes: Axes, labels: Sequence[Label], *, left: bool = False) -> None:
    """Write names beside the ends of lines, moved apart where they would overlap; the axes have their final limits.

    left: the points are where lines begin, and their names stand before them.
    """
    figure = axes.get_figure()
    assert figure is not None
    axes.autoscale_view()  # which is put off until somebody looks
    height = axes.get_window_extent().height / figure.dpi * 72  # points
    to_axes, side = axes.transData + axes.transAxes.inverted(), -1 if left else 1
    ends = sorted(((to_axes.transform((one.x, one.y))[1] * height, one) for one in labels), key=lambda end: end[0])
    places = spread([end for end, _ in ends], SMALL * 1.3, height)
    for (end, one), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": one.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            one.text,
            (one.x, one.y),
            (14 * side, place - end),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=SMALL,
            color=one.colour,
            annotation_clip=False,
            arrowprops={**line, "relpos": (1.0 if left else 0.0, 0.5)},
        )


def list_names(axes: Axes, names: Sequence[tuple[str, str]]) -> None:
    """Names in their colours in the lower right corner, for lines that lie too close to be named one by one."""
    for line, (name, colour) in enumerate(reversed(names)):
        place = (-4, 6 + 1.35 * SMALL * line)
        axes.annotate(
            name, (1, 0), place, "axes fraction", "offset points", ha="right", va="bottom", color=colour, fontsize=SMALL
        )


def count_from_zero(axis: Axis, names: Sequence[object], most: int = 8) -> None:
    """Ticks at whole numbers 0, 1, ... with these names, a few of them, evenly spaced."""
    n = len(names)
    step = next(step for step in (1, 2, 3, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, n) if n <= step * most)
    axis.set_ticks(range(0, n, step), [str(names[place]) for place in range(0, n, step)])


def legible(names: Sequence[tuple[float, str]]) -> list[int]:
    """Which of the names in small print, centred at ascending places in inches, have room beside the one before."""
    found: list[int] = []
    end = -math.inf
    for number, (place, name) in enumerate(names):
        half = len(name) * _LETTER * SMALL / 72 / 2
        if place - half >= end:
            found.append(number)
            end = place + half + _LETTER * SMALL / 72
    return found


def spread(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Ascending places moved apart to at least `gap`, as little as that takes, and within 0 and `most` if they fit."""
    groups: list[list[float]] = []  # of [sum of the wished centres, members]
    for place in places:
        groups.append([place, 1.0])
        while len(groups) > 1 and _low(groups[-1], gap, most) < _high(groups[-2], gap, most) + gap:
            total, n = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += n
    return [_low(group, gap, most) + gap * step for group in groups for step in range(int(group[1]))]


def _low(group: list[float], gap: float, most: float) -> float:
    """The lowest place of a group that stands as one, `gap` apart, about its mean."""
    total, n = group
    extent = gap * (n - 1)
    return max(0.0, min(total / n - extent / 2, most - extent))


def _high(group: list[float], gap: float, most: float) -> float:
    return _low(group, gap, most) + gap * (group[1] - 1)

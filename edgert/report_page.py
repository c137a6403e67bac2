"""The page of a report: one HTML file that needs nothing else, for light and dark screens and for paper.

It is written as XML too, so that any parser can read it back. Knows nothing of what its sections say.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgert.report_words import clean

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #6a737d; --rule: #dde1e6; --paper: #ffffff; --box: #f5f6f8;
  --blue: #0072b2; --orange: #c45500; --green: #007d5a; --pink: #a8558a; --sky: #2f8fc4; --amber: #a87400; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --muted: #98a1ab; --rule: #353b43; --paper: #15181c;
  --box: #1e2329; --blue: #58b4ea; --orange: #f28c3b; --green: #3fc79a; --pink: #dd93c2; --sky: #8fd0f5;
  --amber: #e8b93e; } }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--paper); max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted, figcaption, caption, summary, footer { color: var(--muted); }
.summary { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem 1.5rem;
  background: var(--box); border: 1px solid var(--rule); border-radius: .5rem; padding: 1.1rem 1.25rem;
  margin: 1.25rem 0; }
.summary div { display: flex; flex-direction: column; }
.summary dt { color: var(--muted); font-size: .85rem; }
.summary a { color: inherit; text-decoration: underline dotted; text-underline-offset: .2em; }
.summary dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.summary small { font-size: .85rem; font-weight: 400; color: var(--muted); display: block; line-height: 1.4; }
figure { margin: .75rem 0 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 36rem; height: auto; }
svg text { font-family: inherit !important; }
svg image { image-rendering: pixelated; }
code { font-size: .9em; white-space: nowrap; }
.says { font-size: 1.02rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .25rem 0 .25rem 1.1rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; line-height: 1.25; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.marked td { font-weight: 700; }
table.words td { text-align: left; white-space: normal; }
summary { cursor: pointer; font-size: .9rem; margin-top: .5rem; }
footer { margin-top: 3rem; font-size: .85rem; border-top: 1px solid var(--rule); padding-top: .75rem; }
@media print { :root { color-scheme: light; --ink: #000; --muted: #555; --rule: #ccc; --paper: #fff; --box: #fff;
  --blue: #0072b2; --orange: #c45500; --green: #007d5a; --pink: #a8558a; --sky: #2f8fc4; --amber: #a87400; }
  html { font-size: 11px; } body { max-width: none; padding: 0; } h2 { margin-top: 2rem; break-after: avoid; }
  section, figure, table { break-inside: avoid; } figure, .scroll { overflow: visible; }
  details:not([open]) { display: none; } }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells as they are shown, the first of each its name.

    marked: the row that stands out. words: whether the cells are text rather than numbers.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A figure (an <svg> element, or ""), the sentences below it, and tables; those of `more` are folded away."""

    name: str
    title: str
    says: str
    figure: str = ""
    note: str = ""
    tables: Sequence[Table] = field(default=())
    more: Sequence[Table] = field(default=())


@dataclass(frozen=True)
class Fact:
    """An entry of the summary: what it is, its value, a remark, and the section that says more."""

    name: str
    value: str
    remark: str
    section: str


def text(words: object) -> str:
    """Words as text of the page, whatever they hold."""
    return html.escape(clean(words))


def prose(words: str) -> str:
    """A sentence; what stands between backticks is code, and numbers keep their units beside them."""
    kept = re.sub(r"(?<=\d) (?=%|[KMG]i?B\b|tok/s)", "&#160;", text(words))
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", kept)


def page(title: str, subtitle: str, facts: Sequence[Fact], sections: Sequence[Section], footer: str) -> str:
    """The whole document."""
    summary = "".join(
        f'<div><dt><a href="#{fact.section}">{text(fact.name)}</a></dt>'
        f"<dd>{prose(fact.value)}<small>{prose(fact.remark)}</small></dd></div>"
        for fact in facts
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            'img-src data:"/>',
            f"<title>{text(title)}</title><style>{_STYLE}</style></head>",
            f'<body><header><h1>{text(title)}</h1><p class="muted">{text(subtitle)}</p></header>',
            f'<main><dl class="summary">{summary}</dl>',
            *map(_section, sections),
            f"</main><footer>{text(footer)}</footer></body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{section.name}"><h2>{text(section.title)}</h2>']
    if section.figure:
        parts.append(f"<figure>{section.figure}</figure>")
    parts.append(f'<p class="says">{prose(section.says)}</p>')
    if section.note:
        parts.append(f'<p class="muted">{prose(section.note)}</p>')
    parts += map(_table, section.tables)
    if section.more:
        parts.append(f"<details><summary>The numbers</summary>{''.join(map(_table, section.more))}</details>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{text(cell)}</th>" for cell in table.header)
    rows = "".join(
        ('<tr class="marked">' if number == table.marked else "<tr>")
        + "".join(f"<td>{text(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    kind = "words" if table.words else "numbers"
    return (
        f'<div class="scroll"><table id="{table.name}" class="{kind}"><caption>{text(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )

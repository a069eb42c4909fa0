"""A report as sections of text, tables and pictures, written as HTML, Markdown and CSV.

Not for: what a report says (`page.py`).
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"(> |\[)?[-+]?[\d.]|-$")
"""How the cells of a right-aligned column begin."""
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1240px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem;
  border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }
nav { font-size: .9rem; } nav a { margin-right: .9rem; white-space: nowrap; }
table { border-collapse: collapse; font-size: .88rem; }
caption { caption-side: top; text-align: left; font-weight: 600; padding: .5rem 0 .3rem; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; vertical-align: top;
  border-bottom: 1px solid #e4e8ec; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #57606a; } td.n, th.n { text-align: right; white-space: nowrap; }
td:last-child:not(.n) { min-width: 9rem; } p, ul, figcaption { max-width: 62rem; }
.wide { overflow-x: auto; margin: .6rem 0; } .note { color: #57606a; font-size: .85rem; }
.notice { background: #fff4d6; border-left: 4px solid #bf8700; padding: .5rem .8rem; }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; font-size: .85rem; }
code { background: #f4f6f8; padding: 0 .2rem; } pre code { padding: 0; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; } summary { cursor: pointer; }
figcaption { color: #444c56; font-size: .88rem; }
"""


@dataclass(kw_only=True, slots=True)
class Table:
    """Cells as a reader sees them, and numbers for the CSV."""

    name: str
    """Name of its CSV file."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Sequence[Mapping[str, Any]] | None = None
    """None: the CSV has the cells."""
    note: str = ""
    """Text below it."""
    folded: bool = False
    """HTML shows only the title until it is clicked."""

    @property
    def numeric(self) -> list[bool]:
        """Of each column whether it holds numbers, and so is right-aligned."""
        columns = ([row[i] for row in self.rows] for i in range(len(self.columns)))
        return [all(not cell or NUMBER.match(cell) for cell in cells) for cells in columns]


@dataclass(kw_only=True, slots=True)
class Picture:
    """A figure as files."""

    name: str
    title: str
    caption: str
    svg: Path
    png: Path


@dataclass(slots=True)
class Code:
    text: str


@dataclass(slots=True)
class Notice:
    """A highlighted paragraph."""

    text: str


@dataclass(slots=True)
class Bullets:
    items: Sequence[str]


Block = str | Code | Notice | Bullets | Table | Picture
"""A plain string is a paragraph; `word` in it is code."""


@dataclass(kw_only=True, slots=True)
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Document:
    title: str
    lead: list[Block]
    """Before the first section."""
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        blocks = [*self.lead, *(block for section in self.sections for block in section.blocks)]
        return [block for block in blocks if isinstance(block, Table)]


# HTML -------------------------------------------------------------------------------------------
def to_html(document: Document) -> str:
    """One page that needs no other file."""
    parts = [_html(block) for block in document.lead]
    links = "".join(
        f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a> ' for s in document.sections
    )
    parts.append(f"<nav>{links}</nav>")
    for section in document.sections:
        parts.append(f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>')
        parts += [_html(block) for block in section.blocks]
    return html_page(document.title, "\n".join(parts))


def html_page(title: str, body: str) -> str:
    """A page with this title and, as HTML, this body."""
    title = html.escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title>'
        f"<style>{CSS}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _html(block: Block) -> str:
    match block:
        case str():
            return f"<p>{_inline(block)}</p>"
        case Code():
            return f"<pre><code>{html.escape(block.text)}</code></pre>"
        case Notice():
            return f'<p class="notice">{_inline(block.text)}</p>'
        case Bullets():
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
        case Table():
            return _html_table(block)
        case Picture():
            kind, path = ("svg+xml", block.svg) if block.svg.exists() else ("png", block.png)
            data = base64.b64encode(path.read_bytes()).decode()
            return (
                f'<figure><img alt="{html.escape(block.title)}" src="data:image/{kind};base64,'
                f'{data}"><figcaption><b>{html.escape(block.title)}.</b> {_inline(block.caption)}'
                "</figcaption></figure>"
            )


def _html_table(table: Table) -> str:
    css = [' class="n"' if number else "" for number in table.numeric]
    head = _html_row("th", table.columns, css)
    body = "\n".join(_html_row("td", row, css) for row in table.rows)
    caption = "" if table.folded else f"<caption>{html.escape(table.title)}</caption>"
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    content = (
        f'<div class="wide"><table>{caption}<thead>{head}</thead>'
        f"<tbody>\n{body}\n</tbody></table></div>{note}"
    )
    if not table.folded:
        return content
    return f"<details><summary>{html.escape(table.title)}</summary>{content}</details>"


def _html_row(tag: str, cells: Sequence[str], css: Sequence[str]) -> str:
    row = (f"<{tag}{c}>{_inline(cell)}</{tag}>" for c, cell in zip(css, cells, strict=True))
    return f"<tr>{''.join(row)}</tr>"


# Markdown ---------------------------------------------------------------------------------------
def to_markdown(document: Document) -> str:
    """The document as Markdown; pictures are files in the folder `figures`."""
    parts = [f"# {document.title}", *map(_markdown, document.lead)]
    for section in document.sections:
        parts += [f"## {section.title}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case str():
            return block
        case Code():
            return f"```\n{block.text}\n```"
        case Notice():
            return f"> **Note.** {block.text}"
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Table():
            lines = [block.columns, ["---"] * len(block.columns), *block.rows]
            cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
            text = "\n".join("| " + " | ".join(row) + " |" for row in cells)
            text += f"\n\n{block.note}" if block.note else ""
            if block.folded:
                summary = html.escape(block.title)
                return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"
            return f"**{block.title}**\n\n{text}"
        case Picture():
            title = block.title.replace("[", "(").replace("]", ")")
            return f"![{title}](figures/{block.png.name})\n\n**{block.title}.** {block.caption}"


# CSV --------------------------------------------------------------------------------------------
def to_csv(table: Table) -> str:
    """The table's numbers, unrounded, or its cells if it has none."""
    out = io.StringIO()
    if table.data is None:
        csv.writer(out).writerows([table.columns, *table.rows])
        return out.getvalue()
    columns = list(dict.fromkeys(key for row in table.data for key in row))
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(table.data)
    return out.getvalue()


# text -------------------------------------------------------------------------------------------
def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def number(value: float | None, *, digits: int = 4) -> str:
    """To `digits` significant digits, with an exponent only outside 1e-4 to 1e7; `-` for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    place = math.floor(math.log10(abs(value)))
    if -4 <= place <= 6:
        return f"{value:,.{max(0, digits - 1 - place)}f}"
    return f"{value:.{digits - 2}e}"


def joined(items: Iterable[str], *, most: int = 12) -> str:
    """Comma-separated, the first `most` of them."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more

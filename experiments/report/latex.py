r"""Tables as LaTeX, for a paper that loads booktabs and graphicx: `\input{tables/arms}`.

Not for: CSV, HTML and Markdown (`document.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from experiments.report.document import Table

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
}
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL)))
_POWER = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?)e([-+]\d+)(?!\w)")
_SIGNED = re.compile(r"(?<![\w.$-])([-+])(?=\d)")
MOST_NARROW = 5
"""Columns of a table that fits one column of a page."""


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return _SPECIAL.sub(lambda match: SPECIAL[match[0]], text)


def to_latex(table: Table, *, label: str) -> str:
    """A float with the table's cells; columns without any text are left out."""
    full = [
        index
        for index in range(len(table.columns))
        if any(row[index] not in ("", "-") for row in table.rows)
    ]
    aligned = table.numeric
    numeric = [aligned[index] for index in full]
    wide = len(full) > MOST_NARROW
    kind = "table*" if wide else "table"
    head = [escape(table.columns[index]) for index in full]
    rows = [[_cell(row[index]) for index in full] for row in table.rows]
    note = f" {escape(table.note.replace('`', ''))}" if table.note else ""
    lines = [
        rf"\begin{{{kind}}}[t]",
        r"\centering\small",
        *([r"\resizebox{\linewidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}",
        r"\toprule",
        _row(head),
        r"\midrule",
        *map(_row, rows),
        r"\bottomrule",
        r"\end{tabular}" + "}" * wide,
        rf"\caption{{{escape(table.title)}.{note}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9-]', '-', label)}}}",
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(text: str) -> str:
    """Escaped, with signs and powers of ten as mathematics; a dash where there is nothing."""
    if text == "-":
        return "--"
    if text.startswith("["):  # after \\ a bracket would be an argument
        return "{}" + _numbers(text)
    return _numbers(text)


def _numbers(text: str) -> str:
    parts, end = [], 0
    for match in _POWER.finditer(text):
        parts.append(_SIGNED.sub(r"$\1$", escape(text[end : match.start()])))
        mantissa, power = match[1], int(match[2])
        parts.append(rf"${mantissa} \times 10^{{{power}}}$")
        end = match.end()
    parts.append(_SIGNED.sub(r"$\1$", escape(text[end:])))
    return "".join(parts)

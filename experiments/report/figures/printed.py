"""A figure as PDF for a paper: two columns wide, and one column where its panels fit below each
other. Letters are 7 points or more at that size; fonts are embedded as TrueType (type 42).

Not for: the figure itself (`canvas.py`).
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure as Canvas
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.text import Text

from relora_core import shared

TWO_COLUMNS, ONE_COLUMN = 6.3, 3.03
"""Inches, as in ACL's template."""
TALLEST = 9.0
"""Inches of a page that a figure may take."""
MOST_SQUEEZED = 1.35
"""Times as high a figure in one column may want to be."""
LEAST = 7.0
"""Points."""
SMALLER = 7.5 / 9.5
"""Of letters in print to those on a screen; lines and dots shrink as much."""
SLACK = 1.12
"""Of heights: letters shrink less than the width."""
MOST_PANELS = 4
"""Below each other."""
NO_METADATA = {"Creator": None, "Producer": None, "CreationDate": None}


def write(figure: Canvas, folder: Path, name: str) -> list[Path]:
    """Print a drawn figure as <name>.pdf and, if it fits, <name>_column.pdf. Changes the figure."""
    paths = folder / f"{name}.pdf", folder / f"{name}_column.pdf"
    width, height = figure.get_size_inches()
    rows = _rows(figure)
    _shrink(figure)
    _print(figure, paths[0], TWO_COLUMNS, height * TWO_COLUMNS / width * SLACK)
    panels = len(figure.axes)
    stacked = height / rows * SMALLER * panels
    if panels > MOST_PANELS or stacked > MOST_SQUEEZED * TALLEST:
        paths[1].unlink(missing_ok=True)
        return [paths[0]]
    _stack(figure)
    _print(figure, paths[1], ONE_COLUMN, min(stacked, TALLEST))
    return list(paths)


def remove(folder: Path, name: str) -> None:
    for path in (folder / f"{name}.pdf", folder / f"{name}_column.pdf"):
        path.unlink(missing_ok=True)


def _rows(figure: Canvas) -> int:
    spec = figure.axes[0].get_subplotspec() if figure.axes else None
    return spec.get_gridspec().nrows if spec else 1


def _shrink(figure: Canvas) -> None:
    for text in figure.findobj(Text):
        text.set_fontsize(max(LEAST, text.get_fontsize() * SMALLER))  # type: ignore[attr-defined]
    for line in figure.findobj(Line2D):
        line.set_linewidth(line.get_linewidth() * SMALLER)  # type: ignore[attr-defined]
        line.set_markersize(line.get_markersize() * SMALLER)  # type: ignore[attr-defined]
    for ax in figure.axes:  # ticks that are made while it is drawn
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_tick_params(labelsize=max(LEAST, 9 * SMALLER))


def _stack(figure: Canvas) -> None:
    """The panels below each other, each with its own labels."""
    grid = GridSpec(len(figure.axes), 1, figure=figure)
    bottom = next((ax.get_xlabel() for ax in reversed(figure.axes) if ax.get_xlabel()), "")
    for index, ax in enumerate(figure.axes):
        ax.set_subplotspec(grid[index])
        ax.tick_params(labelleft=True, labelbottom=True)
        if not ax.get_xlabel():
            ax.set_xlabel(bottom)


def _print(figure: Canvas, path: Path, width: float, height: float) -> None:
    figure.set_size_inches(width, height)
    _fit_legends(figure, width)
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        FigureCanvasPdf(figure).print_pdf(buffer, metadata=NO_METADATA)
    with shared.open_file(path, "wb") as file:
        file.write(buffer.getvalue())


def _fit_legends(figure: Canvas, width: float) -> None:
    """As many columns as fit into the width, and letters of the least size."""
    for legend in list(figure.legends):
        handles, texts = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
        longest = max((len(line) for text in texts for line in text.split("\n")), default=1)
        columns = max(1, min(len(texts), int(width / (LEAST * 0.0083 * (longest + 6)))))
        rows = math.ceil(len(texts) / columns)
        before = math.ceil(len(texts) / legend._ncols)  # type: ignore[attr-defined]
        legend.remove()
        figure.legend(
            handles=[handle for handle in handles if handle is not None],
            labels=texts,
            loc="outside lower center",
            ncols=columns,
            fontsize=LEAST,
            handlelength=2.2,
        )
        figure.set_figheight(figure.get_figheight() + 0.14 * max(0, rows - before))

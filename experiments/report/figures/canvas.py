"""What figures have in common: style, legends, captions, reproducible files.

Not for: curves and their bands (`curves.py`), what a figure shows (`arms.py`, `paper.py`).
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from experiments.colours import STYLES
from experiments.report.data import Arm
from experiments.report.figures import printed
from relora_core import shared

DPI = 150
MOST_CURVES = 24
"""Arms in a figure of curves; more could not be told apart."""
GREY, DARK = "#8a8f94", "#3b4046"
STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DARK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "relora-sweeps",
}
NO_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}
"""Metadata left out: the date and the program, which would change a file's bytes."""


class NoData(Exception):
    """The sweep has no data for a figure; the message is for the reader of the report."""


@dataclass(kw_only=True, slots=True)
class Drawing:
    """A figure in memory."""

    canvas: Canvas
    caption: str


@dataclass(kw_only=True, slots=True)
class Figure:
    """A figure as files, or why there is none."""

    name: str
    title: str
    caption: str = ""
    svg: Path | None = None
    png: Path | None = None
    missing: str | None = None


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib has our style, whatever the machine's matplotlibrc sets."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[call-overload]
        yield


def produce(
    name: str, *, title: str, draw: Callable[[], Drawing], folder: Path, pdf: bool = False
) -> Figure:
    """Draw a figure into `folder` as SVG and PNG, with `pdf` also as PDF; the same data give the
    same bytes."""
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    printed.remove(folder, name)
    with style():
        try:
            drawing = draw()
        except NoData as reason:
            for stale in (svg, png):
                stale.unlink(missing_ok=True)
            return Figure(name=name, title=title, missing=str(reason))
        shared.make_folder(folder)
        drawing.canvas.draw_without_rendering()  # lay it out once for both files
        drawing.canvas.set_layout_engine("none")
        # savefig would lay it out again for each file.
        for path, kind in ((svg, FigureCanvasSVG), (png, FigureCanvasAgg)):
            buffer, metadata = io.BytesIO(), NO_METADATA[path.suffix]
            drawing.canvas.dpi = DPI
            getattr(kind(drawing.canvas), f"print_{path.suffix[1:]}")(buffer, metadata=metadata)
            with shared.open_file(path, "wb") as file:
                file.write(buffer.getvalue())
        if pdf:
            printed.write(drawing.canvas, folder, name)
    return Figure(name=name, title=title, caption=drawing.caption, svg=svg, png=png)


# captions ---------------------------------------------------------------------------------------
RESTART = Line2D([], [], color=DARK, marker="|", linestyle="none", markersize=7, label="restart")


MARKERS: dict[str, str] = dict(zip(STYLES, "oD^v", strict=True))
"""Line style of an arm -> marker of its dots."""


def legend(
    canvas: Canvas, arms: Iterable[Arm], *, extra: Iterable[Line2D] = (), dots: bool = False
) -> None:
    """Add one legend below the figure, in as many columns as fit."""
    lines = []
    for arm in arms:
        line, marker = ("-", MARKERS[arm.style]) if dots else (arm.style, "")
        label = textwrap.fill(arm.name, 44, break_on_hyphens=False)
        lines.append(Line2D([], [], color=arm.colour, linestyle=line, marker=marker, label=label))  # type: ignore[arg-type]
    handles = [*lines, *extra]
    labels = [str(handle.get_label()).split("\n") for handle in handles]
    longest = max((len(line) for lines in labels for line in lines), default=1)
    columns = int(canvas.get_figwidth() * 11.5 / (longest + 7))
    columns = max(1, min(columns, len(handles)))
    tallest = max(map(len, labels), default=1)
    rows = math.ceil(len(handles) / columns) + (tallest - 1)
    canvas.set_figheight(canvas.get_figheight() + 0.2 * rows + 0.1)
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.6)


def few(arms: Sequence[Arm], *, most: int = MOST_CURVES) -> tuple[list[Arm], str]:
    """The arms that fit in a figure, and a sentence on the others."""
    left = len(arms) - most
    if left <= 0:
        return list(arms), ""
    return list(arms[:most]), f" The first {most} arms are drawn, {left} others are in the tables."


def bands(arms: Sequence[Arm]) -> str:
    """A caption on the lines and bands of these arms."""
    ns = {len(arm.finished) for arm in arms}
    many = sorted(n for n in ns if n > 1)
    sentences = []
    if many:
        seeds = f"{many[-1]}" if many[0] == many[-1] else f"{many[0]} to {many[-1]}"
        sentences.append(
            f"Lines are means over finished runs ({seeds} seeds), bands their 95 % t intervals over"
            " seeds, cut where they would set the scale."
        )
    if 1 in ns:
        sentences.append("A thin line is a single finished run: it has no band.")
    odd = sum(not run.finished and bool(run.curves) for arm in arms for run in arm.runs)
    if odd:
        faint = f"Faint lines are the {odd} runs that have not finished; x: it diverged there."
        sentences.append(faint)
    return " ".join(sentences)


def has(arm: Arm, metric: str) -> bool:
    """Whether the arm has a finite value of the metric."""
    return any(math.isfinite(p.value) for run in arm.runs for p in run.curves.get(metric, ()))


def finite(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]

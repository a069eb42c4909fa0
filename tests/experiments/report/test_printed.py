"""Figures for a paper: as wide as its columns, with legible letters and embedded fonts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text

from experiments.report.figures import canvas, printed
from experiments.report.figures.canvas import Drawing


def panels(rows: int, columns: int) -> Drawing:
    figure = Canvas(figsize=(9.2, 3.0 * rows))
    for index in range(rows * columns):
        ax = figure.add_subplot(rows, columns, index + 1)
        ax.plot([1, 2, 3], [1, 4, 9], label=f"arm {index}")
        ax.set_ylabel("perplexity")
        ax.text(1, 5, "small", fontsize=5)
    handles = [line for ax in figure.axes for line in ax.lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=8)
    return Drawing(canvas=figure, caption="")


def size(path: Path) -> tuple[float, float]:
    """Inches."""
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", path.read_bytes())
    assert box
    return float(box[1]) / 72, float(box[2]) / 72


def produce(folder: Path, drawing: Drawing, *, pdf: bool = True) -> None:
    canvas.produce("it", title="It", draw=lambda: drawing, folder=folder, pdf=pdf)


def test_pages_are_as_wide_as_one_and_two_columns(tmp_path: Path) -> None:
    produce(tmp_path, panels(2, 2))
    assert size(tmp_path / "it.pdf")[0] == pytest.approx(6.3, abs=0.01)
    width, height = size(tmp_path / "it_column.pdf")
    assert width == pytest.approx(3.03, abs=0.01)
    assert height <= printed.TALLEST + 0.6  # rows of its legend


@pytest.mark.slow
def test_many_panels_are_not_put_below_each_other(tmp_path: Path) -> None:
    produce(tmp_path, panels(2, 2))
    produce(tmp_path, panels(3, 3))
    assert (tmp_path / "it.pdf").exists()
    assert not (tmp_path / "it_column.pdf").exists()


def test_letters_have_seven_points_and_stay_within_the_page(tmp_path: Path) -> None:
    drawing = panels(2, 2)
    produce(tmp_path, drawing)
    figure = drawing.canvas
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7  # type: ignore[attr-defined]
    edge = figure.bbox
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert edge.x0 <= box.x0
        assert box.x1 <= edge.x1


def test_fonts_are_type_42_and_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        produce(tmp_path / name, panels(1, 2))
    content = (tmp_path / "a" / "it.pdf").read_bytes()
    assert content == (tmp_path / "b" / "it.pdf").read_bytes()
    assert b"/Type3" not in content
    assert b"/CIDFontType2" in content or b"/TrueType" in content


def test_old_pages_go_where_none_are_asked_for(tmp_path: Path) -> None:
    produce(tmp_path, panels(1, 1))
    produce(tmp_path, panels(1, 1), pdf=False)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["it.png", "it.svg"]

"""A report's notebook runs by itself in the report's folder, and draws every figure again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow
import pytest
from pyarrow import parquet
from synthetic import a_sweep, arms, record

from experiments.report import gather, page, redraw, tables
from experiments.report.document import Table, to_csv
from experiments.stats import interval
from relora_core.evals.paloma import PERPLEXITY

matplotlib.use("agg")


def run_cells(folder: Path) -> tuple[dict[str, Any], int]:
    """The names that the cells define, and how many figures they drew."""
    from matplotlib import pyplot

    pyplot.close("all")
    notebook = json.loads((folder / "report.ipynb").read_text())
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], cell["id"], "exec"), names)
    drawn = len(pyplot.get_fignums())
    pyplot.close("all")
    return names, drawn


@pytest.mark.slow
def test_its_cells_draw_each_figure_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in a_sweep(tmp_path, arms(2, 4, 8)):
        record(run)
    folder = page.write(tmp_path, "mine", with_notebook=True).parent
    monkeypatch.chdir(folder)
    names, drawn = run_cells(folder)
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    notebook = json.loads((folder / "report.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    logged = {"schedules"}  # the synthetic runs log no rates
    assert drawn == len(pictures - logged)
    assert {"response_relora_r", "learning_curves", "arms", "differences"} <= pictures
    # The numbers are the report's.
    finals = names["FINALS"]["method=relora relora.r=2"]["eval/paloma/perplexity"]
    mean = redraw.interval(finals.values(), log=True)
    wanted = interval(list(finals.values()), scale="log")
    assert mean == pytest.approx((wanted.mean, wanted.low, wanted.high))


def test_a_curve_over_hours_has_the_steps_that_its_seeds_share(tmp_path: Path) -> None:
    """No two runs take the same time for a step."""
    rows = [(seed, 10 * i, 0.1 * i + 0.003 * i * seed, 9.0 - i) for seed in (0, 1) for i in (1, 2)]
    names = ("seed", "step", "gpu_hours", "value")
    table: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    table |= {"arm": ["a"] * 4, "state": ["finished"] * 4, "metric": ["train/loss"] * 4}
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    curves = redraw.read_curves(tmp_path / "data.parquet", x="gpu_hours")
    look = {"name": "a", "colour": "#000000", "style": "-"}
    figure = redraw.draw_curves(curves, [look], {"train/loss": {}}, x="gpu_hours")
    [line] = figure.axes[0].lines
    assert list(line.get_xdata()) == pytest.approx([0.1015, 0.203])
    assert list(line.get_ydata()) == [8.0, 7.0]


def test_a_finished_seed_without_a_finite_value_is_in_no_mean(tmp_path: Path) -> None:
    """As in the report, whose means these are."""
    for run in a_sweep(tmp_path, arms(2)):
        record(run)
    sweep = gather.gather(tmp_path, "mine")
    for arm in sweep.arms:
        arm.runs[0].metrics[PERPLEXITY.key] = math.inf
    [table] = [block for block in tables.results(sweep) if isinstance(block, Table)]
    (tmp_path / "arms.csv").write_text(to_csv(table))
    (tmp_path / "runs.csv").write_text(to_csv(tables.every_run(sweep)))
    means, finals = redraw.read_means(tmp_path), redraw.read_finals(tmp_path / "runs.csv")
    looks = [{"name": arm.name, "colour": arm.colour} for arm in sweep.arms]
    shown = {PERPLEXITY.key: {"label": "x", "scale": "log", "better": "lower"}}
    dots = redraw.draw_finals(means, finals, looks, shown).axes[0].lines[1::3]
    wanted = [estimate.mean for arm in sweep.arms if (estimate := arm.estimate(PERPLEXITY))]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(wanted)
    assert all(math.isfinite(mean) for mean in wanted)
    cells = [(0.0, float(i), arm.name) for i, arm in enumerate(sweep.arms)]
    figure = redraw.draw_map(means, cells, shown, axes=("a", "b"))
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{mean:.4g}" for mean in wanted]


def test_it_needs_nothing_of_the_project() -> None:
    text = Path(redraw.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE))
    assert imported <= {
        *("__future__", "csv", "math", "statistics", "collections", "pathlib", "typing"),
        *("matplotlib", "pyarrow", "scipy"),
    }

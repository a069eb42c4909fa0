"""What a newcomer sees of a sweep in MLflow's pages: all of it, right, at the first click."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.browser.conftest import Ui, Window

if TYPE_CHECKING:
    from playwright.sync_api import Page

Eventually = Callable[..., None]

TITLES = [
    *("arms", "curves", "curves, mean of each arm", "curves against tokens"),
    *("curves against GPU-hours", "what differs", "runs", "arms side by side", "note"),
]
NAME = "attributes.`Run Name`"
MAIN = ("train/loss", "eval/paloma/perplexity", "eval/blimp/no_bos/accuracy")


def results(out: Path, *, sweep: str) -> dict[str, dict[str, float]]:
    """Name -> final metrics of the sweep's runs, from their own records."""
    cells = json.loads((out / "sweeps" / sweep / "plan.json").read_text())["cells"]
    return {
        cell["name"]: json.loads((out / "runs" / cell["run_id"] / "result.json").read_text())[
            "metrics"
        ]
        for cell in cells
    }


def table(page: Page) -> list[dict[str, str]]:
    """The rows of a runs table: column -> text, of the columns in sight."""
    cells: list[list[str]] = page.evaluate(
        """() => [...document.querySelectorAll('.ag-row [col-id]')].map(cell => [
            cell.closest('.ag-row').getAttribute('row-index'),
            cell.getAttribute('col-id'), cell.innerText.trim()])"""
    )
    rows: dict[int, dict[str, str]] = {}
    for row, column, text in cells:
        rows.setdefault(int(row), {})[column] = text.splitlines()[-1] if text else ""
    return [rows[number] for number in sorted(rows)]


def names(page: Page) -> list[str]:
    return [row.get(NAME, "") for row in table(page)]


def curves(page: Page) -> dict[str, dict[str, list[list[float]]]]:
    """Metric -> run, or arm -> its points, of the charts that have been drawn."""
    return page.evaluate(
        """() => {
            const found = {};
            for (const plot of document.querySelectorAll('.js-plotly-plot'))
                for (const trace of plot.data || [])
                    if (trace.metricKey) {
                        const name = trace.name || trace.uuid.split('arm_name.')[1];
                        (found[trace.metricKey] ??= {})[name] =
                            [...trace.x].map((x, i) => [x, trace.y[i]]);
                    }
            return found;
        }"""
    )


def scales(page: Page) -> dict[str, str]:
    """Metric -> scale of the y axis of its chart."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')]
            .filter(plot => plot.data?.[0]?.metricKey)
            .map(plot => [plot.data[0].metricKey, plot.layout.yaxis.type]))"""
    )


def has(page: Page, text: str) -> None:
    page.get_by_text(text, exact=False).first.wait_for()


# the command ------------------------------------------------------------------------------------
def test_two_processes_serve_and_every_sweep_has_every_link(ui: Ui) -> None:
    assert len(psutil.Process(ui.process.pid).children(recursive=True)) == 2
    assert sorted(ui.links("ranks")) == sorted(ui.links("wide")) == sorted(TITLES)
    assert all(url.startswith(f"{ui.base}/#/") for url in ui.links("ranks").values())


@pytest.mark.parametrize("title", [t for t in TITLES if "against" not in t])
def test_a_printed_link_opens_right_in_a_fresh_browser(
    ui: Ui, fresh_window: Window, eventually: Eventually, title: str
) -> None:
    """No traces page, no folded row: what the title says, beside MLflow's own assistant panel.

    Curves against something are the page of curves with another x-axis.
    """
    page = fresh_window.open(ui.links("ranks")[title])
    if title == "note":
        has(page, "6 of 6 runs finished")
    elif title == "arms side by side":
        has(page, "Comparing 2 Runs from 1 Experiment")
    else:
        rows = 2 if title in ("arms", "what differs") else 6
        has(page, f"{rows} matching runs")
        dots = page.get_by_test_id("experiment-view-table-run-color")
        if title != "curves, mean of each arm":  # there the arms have them
            eventually(dots.count, rows)
    if title.startswith("curves"):
        eventually(lambda: "train/loss" in curves(page), True)


# tables -----------------------------------------------------------------------------------------
def test_the_arms_table_has_mean_and_interval_of_each_arm(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("ranks")["arms"])
    eventually(lambda: names(page), ["relora.r=4 (mean of 3)", "relora.r=8 (mean of 3)"])
    window.shoot(page, "arms")
    found = results(store, sweep="ranks")
    for row, r in zip(table(page), ("4", "8"), strict=True):
        seeds = [found[f"relora.r={r} seed={seed}"] for seed in (0, 1, 2)]
        assert (row["params.`relora.r`"], row["tags.`finished`"]) == (r, "3 of 3")
        for metric, title in zip(MAIN, ("loss", "perplexity", "BLiMP"), strict=True):
            there = math.log if title == "perplexity" else float  # its mean is geometric
            values = [there(seed[metric]) for seed in seeds]
            cell = map(float, re.findall(r"[\d.]+", row[f"tags.`{title}`"]))
            mean, low, high = map(there, cell)
            # t(0.975, 2 degrees of freedom) = 4.3027
            half = 4.3027 * statistics.stdev(values) / 3**0.5
            assert mean == pytest.approx(statistics.mean(values), rel=1e-3)
            assert (high - low) / 2 == pytest.approx(half, rel=1e-2, abs=1e-3 * mean)
    loss = float(table(page)[0]["metrics.`train/loss_mean`"])
    wanted = statistics.mean(found[f"relora.r=4 seed={seed}"]["train/loss"] for seed in (0, 1, 2))
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_the_runs_table_has_every_run_with_its_numbers(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("ranks")["runs"])
    found = results(store, sweep="ranks")
    eventually(lambda: names(page), sorted(found))
    window.shoot(page, "runs")
    for row in table(page):
        assert row["tags.`state`"] == "finished"
        assert f"seed={row['tags.`seed`']}" in row[NAME]
        for metric in MAIN:
            assert float(row[f"metrics.`{metric}`"]) == pytest.approx(found[row[NAME]][metric])


def test_arms_of_a_wide_sweep_are_in_the_order_of_their_numbers(
    ui: Ui, window: Window, eventually: Eventually
) -> None:
    page = window.open(ui.links("wide")["arms"])
    wanted = [f"relora.r={r} (mean of 3)" for r in ("04", "08", "16", "32")]
    eventually(lambda: names(page), wanted)


# charts -----------------------------------------------------------------------------------------
def test_curves_show_all_six_runs_as_they_were_recorded(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("ranks")["curves"])
    found = results(store, sweep="ranks")
    eventually(lambda: sorted(curves(page).get(MAIN[0], {})), sorted(found))
    eventually(lambda: sorted(curves(page).get(MAIN[1], {})), sorted(found))
    window.shoot(page, "curves")
    assert (scales(page)[MAIN[0]], scales(page)[MAIN[1]]) == ("linear", "log")
    for metric in MAIN[:2]:
        for run, points in curves(page)[metric].items():
            assert points[-1] == pytest.approx([30, found[run][metric]])
    evals = [step for step, _ in curves(page)[MAIN[1]]["relora.r=4 seed=0"]]
    assert evals == [0, 10, 20, 30]


def test_curves_show_twelve_runs_where_mlflow_by_itself_shows_ten(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("wide")["curves"])
    eventually(lambda: len(curves(page).get("train/loss", {})), 12)
    window.shoot(page, "curves of twelve runs")


@pytest.mark.parametrize(
    ("title", "metric"),
    [("curves against tokens", "train/tokens"), ("curves against GPU-hours", "train/gpu_hours")],
)
def test_curves_can_be_drawn_against_compute(
    ui: Ui, window: Window, eventually: Eventually, store: Path, title: str, metric: str
) -> None:
    page = window.open(ui.links("wide")[title])
    eventually(lambda: len(curves(page).get("train/loss", {})), 12)
    window.shoot(page, title)
    (found,) = {tuple(x for x, _ in points) for points in curves(page)["train/loss"].values()}
    steps = range(5, 51, 5)
    unit = {"train/tokens": 64, "train/gpu_hours": 0.1 / 3600}[metric]
    assert found == pytest.approx([unit * step for step in steps])


def test_grouped_curves_show_a_line_for_each_arm(
    ui: Ui, window: Window, eventually: Eventually
) -> None:
    page = window.open(ui.links("wide")["curves, mean of each arm"])
    arms = [f"relora.r={r}" for r in ("04", "08", "16", "32")]
    eventually(lambda: sorted(curves(page).get("train/loss", {})), arms)
    window.shoot(page, "curves by arm")


def test_what_differs_is_the_rank(ui: Ui, window: Window) -> None:
    page = window.open(ui.links("ranks")["what differs"])
    has(page, "Show differences only")
    card = page.get_by_test_id("experiment-view-compare-runs-card").first
    card.get_by_text("relora.r", exact=True).wait_for()
    window.shoot(page, "what differs")
    assert "train.steps" not in card.inner_text()


# comparing --------------------------------------------------------------------------------------
def test_selected_runs_are_compared_in_columns(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("ranks")["runs"])
    chosen = ["relora.r=4 seed=1", "relora.r=8 seed=2"]
    eventually(lambda: set(chosen) <= set(names(page)), True)
    for name in chosen:
        row = names(page).index(name)
        box = f'.ag-row[row-index="{row}"] .ag-selection-checkbox input'
        page.locator(box).first.click(force=True)
    page.get_by_test_id("runs-compare-button").click()
    has(page, "Comparing 2 Runs from 1 Experiment")
    for name in chosen:
        has(page, name)
    window.shoot(page, "compare two runs")
    text = page.locator("body").inner_text()
    assert {"relora.r\t4\t8", "seed\t1\t2"} <= set(text.splitlines())
    # A grid that has the rows in sight only: first names, then values, run by run.
    lines = text.partition("\nMetrics\n")[2].partition("\nArtifacts\n")[0].splitlines()
    metric = next(line for line in lines if "/" in line)
    shown = [float(line) for line in lines if re.fullmatch(r"-?[\d.]+", line)][:2]
    found = results(store, sweep="ranks")
    assert shown == pytest.approx([found[name][metric] for name in chosen], abs=1e-3)


def test_arms_side_by_side_are_in_the_order_of_their_numbers(ui: Ui, window: Window) -> None:
    page = window.open(ui.links("wide")["arms side by side"])
    has(page, "Comparing 4 Runs from 1 Experiment")
    has(page, "relora.r=32 (mean of 3)")
    text = page.locator("body").inner_text()
    places = [text.index(f"relora.r={r} (mean of 3)") for r in ("04", "08", "16", "32")]
    assert places == sorted(places)
    window.shoot(page, "arms side by side")


# note -------------------------------------------------------------------------------------------
def test_the_note_tells_the_sweep_and_its_links_work(
    ui: Ui, window: Window, eventually: Eventually, store: Path
) -> None:
    page = window.open(ui.links("ranks")["note"])
    has(page, "6 of 6 runs finished")
    page.get_by_text("Show more").first.click()
    note = page.get_by_test_id("note-editor-preview-content")
    rows: list[Any] = note.locator("tbody tr").all_inner_texts()
    assert [row.split()[:2] for row in rows] == [["relora.r=4", "3/3"], ["relora.r=8", "3/3"]]
    loss = statistics.mean(
        metrics["train/loss"]
        for name, metrics in results(store, sweep="ranks").items()
        if name.startswith("relora.r=4 ")
    )
    assert f"{loss:.4g} [" in rows[0]
    window.shoot(page, "note")
    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0  # nothing pushes the page out of the window
    address = note.get_by_role("link", name="arms", exact=True).get_attribute("href")
    assert address
    arms = window.open(f"{ui.base}/{address.removeprefix('/')}")
    eventually(lambda: len(names(arms)), 2)

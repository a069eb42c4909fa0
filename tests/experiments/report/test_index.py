"""The page over all sweeps says how far each is, and what its report found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic import a_sweep, arms, record

from experiments.report import index, page
from relora_core.config import ConfigError


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw", lambda *arguments: [])


def rows(path: Path) -> dict[str, list[str]]:
    found = re.findall(r"<tr>(<td>.*?)</tr>", path.read_text())
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in found]
    return {row[0]: row[1:] for row in cells}


def test_each_sweep_has_its_progress_and_the_headline_of_its_report(tmp_path: Path) -> None:
    for run in a_sweep(tmp_path, arms(2), name="done"):
        record(run)
    for run in a_sweep(tmp_path, arms(4, seeds=[7, 8]), name="half")[:2]:
        record(run)
    page.write(tmp_path, "done")
    made = rows(index.write(tmp_path))
    assert list(made) == ["done", "half"]
    assert made["done"][:2] == ["2", "6 of 6"]
    assert made["half"][:2] == ["2", "2 of 4"]
    assert made["done"][3].startswith("Lowest Paloma perplexity: method=full_rank, ")
    assert made["done"][4] == '<a href="done/report/report.html">report</a>'
    assert made["half"][3:] == ["", ""]


def test_a_headline_says_something(tmp_path: Path) -> None:
    """Rather than what follows: an answer may begin with a heading of its sentences."""
    path = tmp_path / "report.md"
    path.write_text("# S\n\n## Answer\n\nThe comparisons that a file names:\n\n- a ends above b\n")
    assert index.headline(path) == "a ends above b"
    path.write_text("# S\n\n## Results\n\n- a\n")
    assert index.headline(path) == ""


def test_a_damaged_plan_leaves_the_others(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2), name="good")
    a_sweep(tmp_path, arms(2), name="torn")
    (tmp_path / "sweeps" / "torn" / "plan.json").write_text("{<script>")
    path = index.write(tmp_path)
    assert rows(path)["good"][0] == "2"
    assert "<script" not in path.read_text()


def test_without_a_sweep_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a sweep"):
        index.write(tmp_path)

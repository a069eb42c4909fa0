"""`python -m sweeps report` and `compare`, as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.report import page as report
from relora_core.config import RunConfig
from sweeps.__main__ import main
from sweeps.planning.plan import make_plan, store


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *arguments: [])


@pytest.fixture
def sweeps(make: Callable[..., RunConfig]) -> Path:
    """Sweeps `one` and `two` of two ranks and seeds, all finished."""
    for name, lr in (("one", 1e-3), ("two", 1e-2)):
        points = []
        for r in (2, 4):
            for seed in (0, 1):
                config = make(r=r, seed=seed)
                config.train.lr = lr
                points.append(({"relora.r": str(r), "seed": str(seed)}, config))
        for cell in store(make_plan(points, name=name), output_dir=config.output_dir).cells:
            run = RunDir(runs_folder(config.output_dir) / cell.run_id)
            run.create(cell.config)
            loss = lr + cell.config.relora.r + 0.1 * cell.config.seed
            run.write_result({"state": "finished", "step": 4, "metrics": {"train/loss": loss}})
            run.update_status(state="finished", step=4)
    return Path(config.output_dir)


def test_report_prints_the_page(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output-dir", str(sweeps), "report", "one"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == sweeps / "sweeps" / "one" / "report" / "report.html"
    assert "4 of 4 runs finished" in page.read_text()


def test_report_goes_where_it_is_asked_to(sweeps: Path, tmp_path: Path) -> None:
    words = ["report", "one", "--output-dir", str(sweeps), "--output", str(tmp_path / "x y" / "z")]
    assert main(words) == 0
    assert (tmp_path / "x y" / "z" / "report.md").exists()
    assert not (sweeps / "sweeps" / "one" / "report").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "on"], "Did you mean 'one'?"),
        (["report", "one", "--reference", "relora.r=3"], "--reference must name one arm"),
        (["compare", "one", "tow"], "Did you mean 'two'?"),
        (["compare", "one", "one"], "must be two sweeps"),
    ],
)
def test_a_mistake_is_one_line(
    sweeps: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*words, "--output-dir", str(sweeps)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_compare_takes_names_and_paths(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "two", "--output-dir", str(sweeps)]) == 0
    first = Path(capsys.readouterr().out.strip()).read_text()
    paths = [str(sweeps / "sweeps" / name) for name in ("one", "two")]
    assert main(["compare", *paths]) == 0
    second = Path(capsys.readouterr().out.strip()).read_text()
    assert "2 common arms with 4 pairs" in first
    assert first == second


def test_a_page_over_all_sweeps_needs_no_name(
    sweeps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output-dir", str(sweeps), "report", "--html-index"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == sweeps / "sweeps" / "index.html"
    assert "<td>one</td>" in page.read_text()


def test_without_a_name_it_says_what_it_needs(
    sweeps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output-dir", str(sweeps), "report"]) == 2
    assert "report needs SWEEP" in capsys.readouterr().err

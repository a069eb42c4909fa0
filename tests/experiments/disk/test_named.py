"""A run is named as `sweeps status` shows it: name, arm, job, sweep, or part of its id."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.disk.named import find_run
from experiments.disk.run_dir import RunDir
from relora_core.config import ConfigError
from sweeps.commands.selection import one_run
from sweeps.planning.plan import make_plan, store
from tests.conftest import nano_config


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """A sweep of two ranks, the second with two seeds; all but the last run have been begun."""
    configs = [
        nano_config(relora={"r": r}, seed=seed, output_dir=str(tmp_path))
        for r, seed in ((2, 0), (4, 0), (4, 1))
    ]
    plan = store(make_plan([({}, config) for config in configs], name="ranks"), output_dir=tmp_path)
    for task, cell in enumerate(plan.cells[:2]):
        run = RunDir(tmp_path / "runs" / cell.run_id)
        run.create(cell.config)
        run.update_status(state="queued", job_id=f"12_{task}", host="node")
    store(make_plan([({}, configs[0])], name="alone"), output_dir=tmp_path)
    return [cell.run_id for cell in plan.cells]


@pytest.mark.parametrize(
    ("word", "which"),
    [
        ("relora.r=2 seed=0", 0),
        ("relora.r=2", 0),  # an arm of one run
        ("relora.r=4 seed=1", 2),  # planned, and not begun
        ("12_1", 1),
        ("alone", 0),
    ],
)
def test_every_word_that_status_shows_names_the_run(
    ids: list[str], word: str, which: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_run(tmp_path, word).run_id == ids[which]
    assert main(["show", word, "--json", "--output-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == ids[which]
    folder = str(tmp_path / "exported")
    with pytest.raises(SystemExit, match="2"):
        main(["export", word, folder, "--output-dir", str(tmp_path)])
    assert f"got {ids[which]} (" in capsys.readouterr().err  # it has no checkpoint


@pytest.mark.parametrize("word", ["relora.r=4", "12", "ranks"])
def test_of_several_runs_one_line_lists_the_candidates(
    ids: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"relora.r=4": ids[1:], "12": ids[:2], "ranks": ids}[word]
    line = f"RUN must name one run, got {word!r} that {len(wanted)} match: {', '.join(wanted)}"
    for command in (["show", word], ["export", word, str(tmp_path / "exported")]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--output-dir", str(tmp_path)])
        assert capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        one_run(tmp_path, word)


def test_a_word_that_names_nothing_is_one_line(ids: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RUN must be the name, arm or job of a run, or "):
        find_run(tmp_path, word="relora.r=9")
    assert find_run(tmp_path, word=ids[0][:-4]).run_id == ids[0]

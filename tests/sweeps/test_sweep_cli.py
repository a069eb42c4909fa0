"""`python -m sweeps`: what scripts rely on, what people see, and what is never loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from experiments.run_dir import STATES, RunDir
from sweeps.__main__ import main
from sweeps.launch import ROOT
from sweeps.plan import make_plan, store


@pytest.fixture
def out(make, tmp_path):
    """One sweep of two runs, one of which is finished, and a single run."""
    folder = tmp_path / "out"
    plan = store(
        make_plan([({"seed": str(s)}, make(seed=s)) for s in (0, 1)], command="run -m seed=0,1"),
        output_dir=folder,
    )
    for cell in plan.cells:
        RunDir(folder / "runs" / cell.run_id).create(cell.config)
    first = RunDir(folder / "runs" / plan.cells[0].run_id)
    first.write_result({"state": "finished", "metrics": {}})
    first.update_status(state="finished", attempts=2, step=4, loss=1.25)
    RunDir(folder / "runs" / "alone").create(make(seed=2))
    return folder


def test_status_json_has_one_entry_per_run(out, capsys):
    assert main(["status", "--json", "--output-dir", str(out)]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == 3
    for run in runs:
        assert run.keys() >= {"run_id", "state", "attempts", "step", "steps", "loss", "name"}
        assert run["state"] in STATES
    told = {run["name"]: run for run in runs}
    assert told["seed=0"]["state"] == "finished"
    assert (told["seed=0"]["attempts"], told["seed=0"]["step"], told["seed=0"]["loss"]) == (
        2,
        4,
        1.25,
    )
    assert told["seed=1"]["state"] == "planned"
    assert told["seed=1"]["sweep"] == "seed"
    assert told["alone"]["sweep"] is None


def test_status_of_one_sweep_shows_its_runs_only(out, capsys):
    assert main(["status", "seed", "--output-dir", str(out)]) == 0
    text = capsys.readouterr().out
    assert "seed: 1 finished, 1 planned" in text
    assert "alone" not in text


def test_no_runs_is_no_error(tmp_path, capsys):
    assert main(["status", "--output-dir", str(tmp_path / "none")]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["status", "--json", "--output-dir", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["status", "sed"], "Did you mean 'seed'?"),
        (["plan", "sed"], "Did you mean 'seed'?"),
        (["logs", "alon"], "no log yet"),
        (["logs", "nobody"], "got 'nobody'"),
        (["sync", "--tracking-uri", "ftp://x"], "tracking.uri must begin with one of"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(out, capsys, command, line):
    assert main([*command, "--output-dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_the_stored_plan_is_shown_with_states(out, capsys):
    assert main(["plan", "seed", "--output-dir", str(out)]) == 0
    text = capsys.readouterr().out
    assert "done" in text
    assert "run -m seed=0,1" in text


def test_logs_shows_an_attempt_and_the_newest_by_default(out, capsys):
    run = RunDir(out / "runs" / "alone")
    run.log_path(1).write_text("first\n")
    run.log_path(2).write_text("second\n")
    assert main(["logs", "alone", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "second\n"
    assert main(["logs", "alo", "--attempt", "1", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "first\n"
    assert main(["logs", "alone", "--attempt", "5", "--output-dir", str(out)]) == 2
    assert "nearest valid: 2" in capsys.readouterr().err


def test_following_a_log_ends_with_the_run_and_misses_nothing(out, capsys):
    run = RunDir(out / "runs" / "alone")
    run.log_path(1).write_text("a\n")
    run.update_status(state="running", host="elsewhere")

    def go_on():
        time.sleep(0.3)
        with open(run.log_path(1), "a") as log:
            log.write("b\n")
        run.update_status(state="failed", error="x")

    thread = threading.Thread(target=go_on)
    thread.start()
    assert main(["logs", "alone", "-f", "--output-dir", str(out)]) == 0
    thread.join()
    assert capsys.readouterr().out == "a\nb\n"


@pytest.mark.parametrize("command", [["status", "--json"], ["plan", "seed"], ["--help"]])
def test_looking_loads_neither_torch_nor_mlflow_nor_hydra(out, command):
    where = [] if command == ["--help"] else ["--output-dir", str(out)]
    code = (
        "import sys; from sweeps.__main__ import main\n"
        f"try: main({command + where!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'hydra', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr

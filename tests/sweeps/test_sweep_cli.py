"""`python -m sweeps`: what scripts rely on, what people see, and what is never loaded."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments.disk.output_dir import all_runs, jobs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.identity import arm_id
from sweeps import display, launch
from sweeps.__main__ import main
from sweeps.planning.plan import make_plan, store
from sweeps.slurm import cluster
from sweeps.slurm.submission import Submission
from tests.sweeps.records import store_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(make, tmp_path):
    """One sweep of two runs, one of which is finished, and a single run."""
    folder = tmp_path / "out"
    points = [({"seed": str(s)}, make(seed=s)) for s in (0, 1)]
    first, _ = store_runs(points, command="run -m seed=0,1", output_dir=folder)
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
        assert run["state"] in list(State)
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


def test_status_json_tells_arm_seed_and_job(out, make, capsys):
    alone = RunDir(out / "runs" / "alone")
    alone.update_status(state="failed", job_id="12_3")
    tasks = [["others"]] * 3 + [["alone"]]
    ours = Submission(submission="aa", name="s.aa", job_id="12", tasks=tasks, state="submitted")
    ours.write(jobs_folder(out, name="s") / "aa")
    RunDir(next(out.glob("runs/*-s1-*"))).update_status(state="failed", job_id="77")  # not ours
    main(["status", "--json", "--output-dir", str(out)])
    runs = {run["run_id"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert {run["arm_id"] for run in runs.values()} == {arm_id(make())}  # seeds of one setting
    assert sorted(run["seed"] for run in runs.values()) == [0, 1, 2]
    assert [run["job_id"] for run in runs.values() if run["job_id"]] == ["12_3"]
    assert runs["alone"]["job_id"] == "12_3"


@pytest.fixture
def many(make, tmp_path):
    """A sweep of 8 arms with 2 seeds; the first arm is finished, one run of the second failed."""
    folder = tmp_path / "out"
    grid = [({"r": str(r), "seed": str(s)}, make(r=r, seed=s)) for r in range(1, 9) for s in (0, 1)]
    first, second, failed, *_ = store_runs(grid, name="many", output_dir=folder)
    for run, loss in ((first, 1.0), (second, 2.0)):
        metrics = {"train/loss": loss, "eval/paloma/perplexity": 10 * loss}
        run.write_result({"state": "finished", "metrics": metrics})
        run.update_status(state="finished", step=4, loss=9.0)
    failed.update_status(state="failed", error="RuntimeError: [boom]")
    failed.error_path.write_text("Traceback")
    return folder


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_few_runs_have_a_line_each_and_many_are_told_by_arm(many, make, capsys):
    main(["status", "--output-dir", str(many)])
    assert len(lines(capsys.readouterr().out, "relora.r=")) == 16
    more = [({"seed": str(s)}, make(r=1, seed=s)) for s in range(2, 12)]
    store(make_plan(more, name="many"), output_dir=many)
    main(["status", "--output-dir", str(many)])
    arms = lines(capsys.readouterr().out, "relora.r=")
    assert len(arms) == 8
    first, second = arms[:2]
    assert first.split()[:2] == ["relora.r=1", "12"]  # seeds
    assert "2 finished, 10 planned" in first
    assert "1.5 ± 0.71" in first  # of 1 and 2: the result's losses, not the last ones logged
    assert " 14.14 " in first  # of 10 and 20 the geometric mean, as in reports and MLflow
    assert "0/4" in second
    assert "1 failed, 1 planned" in second
    assert "[boom]" in second
    main(["status", "--runs", "--output-dir", str(many)])
    assert len(lines(capsys.readouterr().out, "relora.r=")) == 26


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_seed_without_a_finite_value_leaves_an_arm_its_mean(make, tmp_path, capsys, lost):
    """Which says of how many seeds it is."""
    grid = [({"seed": str(seed)}, make(seed=seed)) for seed in range(21)]
    runs = store_runs(grid, name="s", output_dir=tmp_path / "out")
    for run, loss, perplexity in zip(runs, (1.0, 2.0, 3.0), (10.0, 20.0, lost), strict=False):
        metrics = {"train/loss": loss, "eval/paloma/perplexity": perplexity}
        run.write_result({"state": "finished", "metrics": metrics})
        run.update_status(state="finished", step=4, loss=loss)
    main(["status", "--output-dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "3 finished" in text
    assert " 2 ± 1 " in text  # losses of all three
    assert " 14.14 (n = 2)" in text


def test_failures_are_told_with_the_file_that_says_more(many, capsys):
    main(["status", "--output-dir", str(many)])
    (line,) = lines(capsys.readouterr().out.replace("\n(", " ("), "failed relora.r=2 seed=0")
    assert "RuntimeError: [boom]" in line


def test_columns_without_a_word_are_left_out(out, capsys):
    main(["status", "--output-dir", str(out)])
    text = capsys.readouterr().out
    assert "loss" in text
    assert "tokens/s" not in text
    assert "job" not in text


@pytest.mark.parametrize("mfus", [{"mfu": 0.123, "mfu_6n": 0.14}, {}], ids=["gpu", "earlier"])
def test_a_running_run_has_its_mfu_by_both_conventions(out, capsys, mfus):
    """Without it, as on CPUs and in status files of earlier versions, there are no columns."""
    fields = {"state": "running", "host": "elsewhere", "step": 1, "steps": 4, "tokens_per_s": 2e6}
    (out / "runs" / "alone" / "status.json").write_text(json.dumps(fields | mfus))
    main(["status", "--output-dir", str(out)])
    text = capsys.readouterr().out
    assert ("MFU by 6N" in text) == bool(mfus)
    assert lines(text, "alone")[0].split()[4:] == [
        "2M",
        *(("12.3", "%", "14", "%") if mfus else ()),
    ]
    main(["status", "--json", "--output-dir", str(out)])
    runs = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert (runs["alone"]["mfu"], runs["alone"]["mfu_6n"]) == tuple(mfus.values() or (None, None))
    assert runs["seed=1"]["mfu"] is None


@pytest.mark.parametrize("mfu", [0.25, None])
def test_the_closing_table_has_mfus_where_a_run_has(make, tmp_path, mfu):
    points = [({"seed": str(s)}, make(seed=s)) for s in (0, 1)]
    runs = store_runs(points, output_dir=tmp_path)
    rate = {"perf/tokens_per_s": 2e6}
    more = {} if mfu is None else {"perf/mfu": mfu, "perf/mfu_6n": mfu / 2}
    for run, metrics in zip(runs, (rate | more, rate), strict=True):
        run.write_result({"state": "finished", "step": 4, "metrics": metrics})
    console = Console(file=io.StringIO(), width=160)
    states = {run.run_id: State.FINISHED for run in runs}
    plan = make_plan(points)
    console.print(display.closing_table(plan.cells, states=states, output_dir=tmp_path))
    rows = [line.split() for line in console.file.getvalue().splitlines() if "seed=" in line]
    assert [row[-6:] for row in rows] == (
        [["2M", "25", "%", "12.5", "%", "-"], ["-", "-", "2M", "-", "-", "-"]]
        if mfu
        else [["0/4", "-", "-", "-", "2M", "-"]] * 2
    )


def test_looking_changes_nothing_on_disk(many):
    def image():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in many.rglob("*")}

    before = image()
    for command in (["status"], ["status", "--json"], ["plan", "many"]):
        assert main([*command, "--output-dir", str(many)]) == 0
    assert image() == before


def test_a_broken_plan_is_named(out, capsys):
    for text in ("{", '{"cells": [{"run_id": "x"}]}', "[]"):
        (out / "sweeps" / "seed" / "plan.json").write_text(text)
        assert main(["status", "--output-dir", str(out)]) == 2
        assert "plan.json" in capsys.readouterr().err


def test_a_run_whose_config_is_unreadable_is_told_all_the_same(out, capsys):
    (out / "runs" / "alone" / "config.json").write_text('{"from": "the future"}')
    assert main(["status", "--json", "--output-dir", str(out)]) == 0
    assert "alone" in capsys.readouterr().out


def test_status_of_one_sweep_shows_its_runs_only(out, capsys):
    assert main(["status", "seed", "--output-dir", str(out)]) == 0
    text = capsys.readouterr().out
    assert "seed: 1 finished, 1 planned" in text
    assert "alone" not in text


SHOWN = [("relora.r=2 seed=1", 1), ("relora.r=2", 2), ("77_1", 1), ("77", 2)]
"""What status shows of runs, and how many of `many` it names."""


@pytest.fixture
def shown(many, monkeypatch):
    """`many` with two runs as tasks of one array, where SLURM says nothing."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(launch, "relaunch", lambda plan, run_ids, output_dir: 0)
    runs = [run for run in all_runs(many) if run.config().relora.r == 3]
    for index, run in enumerate(runs):
        run.update_status(state="queued", job_id=f"77_{index}", host="login")
        run.log_path(1).parent.mkdir(exist_ok=True)
    for run in all_runs(many):
        run.log_path(1).parent.mkdir(exist_ok=True)
        run.log_path(1).write_text("said\n")
    return many


@pytest.mark.parametrize(("word", "count"), SHOWN)
def test_what_status_shows_names_runs_in_every_command(shown, capsys, word, count):
    where = ["--output-dir", str(shown)]
    assert main(["status", word, "--json", *where]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == count
    assert main(["watch", word, "--once", *where]) in (0, 1)
    assert main(["logs", word, *where]) == (0 if count == 1 else 2)
    assert ("said" if count == 1 else f"{word!r} that 2 match") in "".join(capsys.readouterr())
    assert main(["retry", word, *where]) == 0
    assert main(["gc", word, *where]) == 0
    capsys.readouterr()
    assert main(["cancel", word, *where]) in (0, 2)  # asks first, where something is at work
    assert "must be" not in capsys.readouterr().err.replace("--yes must be", "")
    main(["eval", word, *where])
    assert f"among {count}" in capsys.readouterr().err
    assert main(["diff", word, "relora.r=2 seed=0", *where]) == (0 if count == 1 else 2)
    capsys.readouterr()
    for command in ("plan", "report", "sync"):  # of whole sweeps
        main([command, word, *where])  # a report needs results, and has none
        assert f"{word} is of the sweep many: all of it\n" in capsys.readouterr().err
    assert main(["plan", word, *where]) == 0
    assert "relora.r=4" in capsys.readouterr().out


def test_a_name_of_several_runs_is_not_guessed_at(out, make, capsys):
    points = [({"seed": str(s)}, make(r=3, seed=s)) for s in (0, 1)]
    store(make_plan(points, name="other"), output_dir=out)
    assert main(["logs", "seed=0", "--output-dir", str(out)]) == 2
    assert "'seed=0' names different runs" in capsys.readouterr().err


def test_no_runs_is_no_error(tmp_path, capsys):
    assert main(["status", "--output-dir", str(tmp_path / "none")]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["status", "--json", "--output-dir", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [], "notes": {}}


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["status", "sed"], "Did you mean 'seed'?"),
        (["plan", "sed"], "Did you mean 'seed'?"),
        (["logs", "alon"], "no log yet"),
        (["logs", "nobody"], "got 'nobody'"),
        (["logs", "sed"], "Did you mean 'seed'?"),
        (["logs", "seed"], "RUN must name one run, got 'seed' that 2 match"),
        (["logs", "alone", "--slurm"], "alone is planned"),
        (["logs", "alone", "--slurm", "--attempt", "1"], "--attempt must be left out"),
        (["cancel", "sed"], "Did you mean 'seed'?"),
        (["retry", "nano"], "RUN must name one run"),
        (["watch", "sed"], "Did you mean 'seed'?"),
        (["watch", "--interval", "0"], "nearest valid: 1"),
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


@pytest.fixture
def between_looks(monkeypatch):
    """Sets what happens while `logs -f` waits, once each in turn."""

    def go(*works):
        left = iter(works)
        wait = SimpleNamespace(sleep=lambda seconds: next(left)())
        monkeypatch.setattr("sweeps.commands.logs.time", wait)

    return go


def test_following_a_log_ends_with_the_run_and_misses_nothing(out, between_looks, capsys):
    run = RunDir(out / "runs" / "alone")
    run.log_path(1).write_text("a\n")
    run.update_status(state="running", host="elsewhere")

    def go_on():
        with open(run.log_path(1), "a") as log:
            log.write("b\n")
        run.update_status(state="failed", error="x")

    between_looks(go_on)
    assert main(["logs", "alone", "-f", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "a\nb\n"


def test_following_goes_on_with_the_next_attempt(out, between_looks, capsys):
    run = RunDir(out / "runs" / "alone")
    run.log_path(1).write_text("a\n")
    run.update_status(state="running", host="elsewhere", attempts=1)

    def requeued():
        run.update_status(state="queued", host="elsewhere", job_id=None)
        run.log_path(2).write_text("b\n")
        run.update_status(state="running", host="elsewhere", attempts=2)

    between_looks(requeued, lambda: run.update_status(state="cancelled"))
    assert main(["logs", "alone", "-f", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "a\n==> 002.log <==\nb\n"


@pytest.mark.parametrize(
    ("tasks", "name"),
    [([["alone"]], "12_0_log.out"), ([["x"], ["y", "alone"]], "12_1_0_log.out")],
)
def test_logs_of_slurm_are_those_of_the_runs_newest_job(
    out, make, capsys, monkeypatch, tasks, name
):
    """SLURM's file while there is no attempt's, or when asked for."""
    monkeypatch.setattr(cluster, "available", lambda: False)
    plan = make_plan([({}, make(seed=2))], name="jobs")
    plan.cells[0].run_id = "alone"
    store(plan, output_dir=out)
    folder = jobs_folder(out, name="jobs")
    for created, job_id in ((1.0, "11"), (2.0, "12"), (3.0, None)):
        one = Submission(submission=f"s{created:.0f}", name="n", created=created, job_id=job_id)
        one.tasks = tasks
        one.write(folder / one.submission)
    (folder / "s1" / name.replace("12", "11")).write_text("old\n")
    (folder / "s2" / name).write_text("from SLURM\n")
    run = RunDir(out / "runs" / "alone")
    run.update_status(state="failed", job_id=name.removesuffix("_0_log.out"))
    assert main(["logs", "alone", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "from SLURM\n"
    run.log_path(1).write_text("its own\n")
    assert main(["logs", "alone", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "its own\n"
    assert main(["logs", "alone", "--slurm", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "from SLURM\n"


def test_what_the_job_of_a_searchs_run_printed_is_found(out, make, capsys):
    [run] = store_runs([({}, make())], name="s", output_dir=out)
    run.update_status(state="running", host="n1", job_id="77_1")
    one = Submission(submission="bb", name="s.bb", tasks=[["sweeps/s/study"]] * 2, kind="search")
    one.job_id, one.state = "77", "submitted"
    one.write(jobs_folder(out, name="s") / "bb")
    for task, text in enumerate(("trial 2\n", "trial 3\n")):
        (jobs_folder(out, name="s") / "bb" / f"77_{task}_0_log.out").write_text(text)
    assert main(["logs", run.run_id, "--slurm", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().out == "trial 3\n"


@pytest.mark.parametrize("command", ["status", "watch", "logs", "cancel", "retry", "plan", "sync"])
def test_help_of_each_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"python -m sweeps {command}" in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.slow
def test_status_costs_the_same_for_each_run_of_a_larger_sweep(make, tmp_path, capsys, calls):
    def look(size):
        assert main(["status", "--output-dir", str(tmp_path / str(size))]) == 0
        assert f"{size} planned" in capsys.readouterr().out

    sizes = (32, 64, 128)  # all too many for a line each: 8 arms are shown
    for size in sizes:
        grid = [({}, make(r=1 + i % 8, seed=i // 8)) for i in range(size)]
        store_runs(grid, name="big", output_dir=tmp_path / str(size))
    look(32)  # what is imported on first use
    small, middle, large = (calls(look, size) for size in sizes)
    assert (large - middle) / 64 <= 1.1 * (middle - small) / 32


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

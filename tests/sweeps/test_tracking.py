"""Whoever brings MLflow up to date, it shows the same: the plan, its runs, and how they stand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.disk.output_dir import runs_folder
from experiments.disk.plans import axes_of_older
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from experiments.labels import spell
from experiments.report.gather import gather
from experiments.tracking import tracker as track
from experiments.tracking.tracker import display_axes
from relora_core.config import ModelConfig, RunConfig, SweepConfig, TrackingConfig
from sweeps import display, tracking
from sweeps.__main__ import main
from sweeps.planning.plan import Cell, Plan, make_plan, store
from sweeps.slurm import launcher
from sweeps.tracking import bring_up_to_date
from tests.sweeps.records import end_run


@pytest.fixture
def out(tmp_path: Path, migrated: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(migrated, folder / "mlflow.db")
    return folder


@pytest.fixture
def plan(make: Callable[..., RunConfig], out: Path) -> Callable[..., Plan]:
    """Plan, store and create runs of a sweep, as a launcher does."""

    def plan(*, name: str = "ranks", ranks: Sequence[int] = (8, 16), seeds: int = 2, **kw: Any):
        points = [
            (
                {"relora.r": str(r), "seed": str(seed)},
                make(
                    r=r,
                    seed=seed,
                    model=ModelConfig(name="wide", d_model=384, d_ff=768, vocab_size=64),
                    tracking=TrackingConfig(**{"enabled": True, **kw}),
                    sweep=SweepConfig(name=name),
                ),
            )
            for r in ranks
            for seed in range(seeds)
        ]
        made = store(make_plan(points, command="python run.py -m ..."), output_dir=out)
        for cell in made.cells:
            RunDir(runs_folder(out) / cell.run_id).create(cell.config)
        return made

    return plan


def run_of(out: Path, cell: Cell) -> RunDir:
    return RunDir(runs_folder(out) / cell.run_id)


def client(out: Path) -> Any:
    from experiments.addresses import default_uri
    from experiments.tracking.store import connect

    return connect(default_uri(out))


def shown(out: Path, experiment: str, kind: str) -> list[Any]:
    mlflow = client(out)
    found = mlflow.get_experiment_by_name(experiment)
    return list(
        mlflow.search_runs([found.experiment_id], f"tags.kind = '{kind}'", order_by=["run_name"])
    )


def everything(out: Path, experiment: str = "ranks") -> Any:
    return [
        (r.info.run_id, r.info.run_name, r.info.status, r.info.end_time, r.data.to_dictionary())
        for kind in ("sweep", "arm", "run")
        for r in shown(out, experiment, kind)
    ]


@pytest.mark.slow
def test_a_planned_sweep_is_there_before_its_runs_begin(out: Path, plan: Any) -> None:
    plan(ranks=(8, 16))
    (done,) = bring_up_to_date(out)
    runs, (parent,) = shown(out, "ranks", "run"), shown(out, "ranks", "sweep")
    assert [run.info.status for run in (*runs, parent)] == ["SCHEDULED"] * 5
    assert [run.info.run_name for run in runs] == [
        f"relora.r={r} seed={s}" for r in ("08", "16") for s in (0, 1)
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}
    assert done.parent == parent.info.run_id
    assert len(shown(out, "ranks", "arm")) == 2
    assert done.problem is None


def test_an_arm_has_one_colour_in_mlflow_and_report_and_keeps_it(out: Path, plan: Any) -> None:
    before: dict[str, str] = {}
    for ranks in ((16, 8), (4,)):  # the second command widens the plan
        plan(ranks=ranks)
        bring_up_to_date(out)
        tags = [r.data.tags for kind in ("arm", "run") for r in shown(out, "ranks", kind)]
        shown_as = {(tag["arm"], tag["mlflow.runColor"]) for tag in tags}
        reported = {arm.arm_id: arm.colour for arm in gather(out, "ranks").arms}
        assert shown_as == set(reported.items())
        assert before.items() < reported.items()
        assert len(set(reported.values())) == len(reported)
        before = reported


def test_repeating_it_changes_nothing(out: Path, plan: Any) -> None:
    made = plan()
    end_run(run_of(out, made.cells[0]), loss=1.5)
    bring_up_to_date(out)
    before = everything(out)
    bring_up_to_date(out)
    tracker = tracking.make_tracker(out)
    for _ in range(2):
        tracker.bring_up_to_date()
    assert everything(out) == before


def test_a_tracker_that_stays_shows_what_ended_meanwhile(out: Path, plan: Any) -> None:
    made = plan(ranks=(8,), seeds=2)
    tracker = tracking.make_tracker(out)
    tracker.bring_up_to_date()
    for cell, loss in zip(made.cells, (1.0, 2.0), strict=True):
        end_run(run_of(out, cell), loss=loss)
        tracker.bring_up_to_date()
    (arm,), (parent,) = shown(out, "ranks", "arm"), shown(out, "ranks", "sweep")
    assert arm.data.metrics["train/loss_mean"] == 1.5
    assert parent.info.status == "FINISHED"


def test_it_says_what_the_scheduler_says(out: Path, plan: Any) -> None:
    made = plan(ranks=(8,), seeds=2)
    lost = made.cells[0].run_id
    reason = "no heartbeat for 20 min and SLURM does not know job 7"
    states = {lost: RunState(run_id=lost, state="lost", reason=reason, job_id="7")}
    bring_up_to_date(out, ["ranks"], states=states)
    (run,) = [r for r in shown(out, "ranks", "run") if r.data.tags["run_id"] == lost]
    assert run.info.status == "FAILED"
    assert (run.data.tags["state"], run.data.tags["reason"]) == ("lost", reason)
    (parent,) = shown(out, "ranks", "sweep")
    assert reason in parent.data.tags["mlflow.note.content"]


def test_a_killed_run_is_shown_as_failed_although_it_said_nothing(out: Path, plan: Any) -> None:
    made = plan(ranks=(8,), seeds=1)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    run = RunDir(runs_folder(out) / made.cells[0].run_id)
    run.update_status(state="running", pid=child.pid)
    bring_up_to_date(out)
    assert [r.info.status for r in shown(out, "ranks", "run")] == ["FAILED"]
    assert [r.info.status for r in shown(out, "ranks", "sweep")] == ["FAILED"]


def test_a_run_of_two_sweeps_is_in_both(out: Path, plan: Any) -> None:
    plan(name="first", ranks=(8,), seeds=1)
    plan(name="second", ranks=(8, 16), seeds=1)
    bring_up_to_date(out)
    for name, count in (("first", 1), ("second", 2)):
        (parent,) = shown(out, name, "sweep")
        runs = shown(out, name, "run")
        assert [r.data.tags["mlflow.parentRunId"] for r in runs] == [parent.info.run_id] * count


def test_a_wider_sweep_keeps_its_parent_and_gets_its_new_arm(out: Path, plan: Any) -> None:
    plan(ranks=(8,))
    (before,) = bring_up_to_date(out)
    plan(ranks=(8, 128))
    (after,) = bring_up_to_date(out)
    assert before.parent == after.parent
    names = [run.info.run_name for run in shown(out, "ranks", "arm")]
    assert [name.partition(" (")[0] for name in names] == ["relora.r=008", "relora.r=128"]


def test_runs_without_a_sweep_are_shown_too(out: Path, make: Callable[..., RunConfig]) -> None:
    from experiments.identity import run_id

    config = make(tracking=TrackingConfig(enabled=True))
    RunDir(runs_folder(out) / run_id(config)).create(config)
    (done,) = bring_up_to_date(out)
    assert (done.sweep, done.parent) == (None, None)
    assert len(shown(out, "test", "run")) == 1


def test_what_is_not_tracked_is_not_shown_unless_asked_for(out: Path, plan: Any) -> None:
    plan(enabled=False)
    assert bring_up_to_date(out) == []
    (done,) = bring_up_to_date(out, tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    assert done.runs == 4


def test_a_dead_server_is_one_line_and_the_other_stores_are_served(out: Path, plan: Any) -> None:
    plan(name="far", uri="http://127.0.0.1:9")
    plan(name="near", ranks=(4,), seeds=1)
    done = {one.sweep: one for one in bring_up_to_date(out)}
    assert "unreachable; nothing is lost" in (done["far"].problem or "")
    assert done["near"].problem is None
    assert len(shown(out, "near", "run")) == 1


def test_watching_leaves_servers_alone(out: Path, plan: Any) -> None:
    plan(uri="http://127.0.0.1:9")
    assert tracking.make_tracker(out, servers=False).bring_up_to_date() == []


@pytest.mark.slow
def test_reading_a_plan_costs_the_same_for_each_run_of_a_larger_one(
    tmp_path: Path, make: Callable[..., RunConfig], calls: Callable[..., int]
) -> None:
    def look(size: int) -> None:
        (group,) = tracking.make_tracker(tmp_path / str(size))._groups(None)
        states = {run.run_id: RunState(run_id=run.run_id) for run in group.members}
        view = track.sweep_view(group, states)
        assert sum(len(arm.runs) for arm in view.arms) == size

    sizes = (16, 32, 64)
    for size in sizes:
        configs = [
            make(r=1 + i % 8, seed=i // 8, tracking=TrackingConfig(enabled=True))
            for i in range(size)
        ]
        made = make_plan([({}, c) for c in configs], name="large")
        store(made, output_dir=tmp_path / str(size))
    look(16)  # what is imported on first use
    small, middle, large = (calls(look, size) for size in sizes)
    assert (large - middle) / 32 <= 1.1 * (middle - small) / 16


# names ------------------------------------------------------------------------------------------
numbers = st.one_of(st.integers(0, 10**6), st.floats(1e-6, 1e6).map(lambda x: float(f"{x:.4g}")))


@given(st.lists(numbers, min_size=1, max_size=12, unique=True))
def test_names_are_in_the_order_of_their_numbers(values: list[float]) -> None:
    rows = [{"model": "tiny", "train.lr": f"{value:.12g}", "seed": "0"} for value in values]
    shown_as = [spell(axes) for axes in display_axes(rows)]
    assert len(set(shown_as)) == len({spell(axes) for axes in rows})
    ordered = [name for _, name in sorted(zip(values, shown_as, strict=True))]
    assert ordered == sorted(shown_as)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([{"relora.r": "8"}, {"relora.r": "16"}], ["relora.r=08", "relora.r=16"]),
        ([{"lr": "3e-05"}, {"lr": "0.001"}], ["lr=0.00003", "lr=0.001"]),
        ([{"r": "8"}, {"method": "full_rank"}], ["r=8", "method=full_rank"]),
        (
            [{"data.path": "/a b", "r": "8"}, {"data.path": "/a b", "r": "16"}],
            ["data.path=/a b r=08", "data.path=/a b r=16"],
        ),
        ([{"model": "8"}, {"model": "08"}], ["model=8", "model=08"]),  # labels, not numbers
        ([{}], [""]),
    ],
)
def test_only_numbers_are_padded(before: list[dict[str, str]], after: list[str]) -> None:
    assert [spell(axes) for axes in display_axes(before)] == after


def test_a_name_is_taken_apart_where_keys_begin() -> None:
    axes = axes_of_older("model=tiny data.path=/my data/x seed=0")
    assert axes == {"model": "tiny", "data.path": "/my data/x", "seed": "0"}


def test_a_plan_of_another_version_is_one_line(out: Path, plan: Any) -> None:
    from relora_core.config import ConfigError

    plan()
    (out / "sweeps" / "ranks" / "plan.json").write_text('{"cells": [{"run_id": "x"}]}')
    with pytest.raises(ConfigError, match=r"plan\.json must be a plan as this version writes it"):
        bring_up_to_date(out)


def test_everything_is_shown_again_after_the_database_is_lost(
    out: Path, plan: Any, migrated: Path
) -> None:
    made = plan(ranks=(8,), seeds=2)
    for cell in made.cells:
        end_run(run_of(out, cell), loss=1.5)
    bring_up_to_date(out)
    before = [(r.info.run_name, r.data.metrics) for r in shown(out, "ranks", "arm")]
    (out / "mlflow.db").write_bytes(migrated.read_bytes())
    bring_up_to_date(out)
    assert [(r.info.run_name, r.data.metrics) for r in shown(out, "ranks", "arm")] == before
    assert [r.data.metrics["train/loss"] for r in shown(out, "ranks", "run")] == [1.5, 1.5]


def test_a_first_sync_says_how_far_it_is(
    out: Path, plan: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(ranks=(8,), seeds=3)
    with monkeypatch.context() as patch:
        patch.setattr(display, "PLAIN_EVERY_S", 0)
        assert main(["sync", "--output-dir", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "synced to" in line]
    assert [line.partition(",")[0] for line in said] == [
        f"synced to ranks: {n} of 3 runs" for n in (1, 2, 3)
    ]
    assert main(["sync", "--output-dir", str(out)]) == 0  # too soon over for a word
    assert capsys.readouterr().out.startswith("ranks: 3 runs, 0 created, 0 points sent to sqlite")


@pytest.mark.slow
def test_a_sweep_is_shown_by_a_process_of_its_own(out: Path, plan: Any) -> None:
    plan(ranks=(8,))
    log = launcher.sync_in_background(out, "ranks")
    assert launcher._BACKGROUND.pop().wait(120) == 0, log.read_text()
    assert "points sent" in log.read_text()
    runs, (parent,) = shown(out, "ranks", "run"), shown(out, "ranks", "sweep")
    assert [run.info.status for run in (*runs, parent)] == ["SCHEDULED"] * 3
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}


# what goes wrong at a store costs no sweep ------------------------------------------------------
def closing(plan: Plan, out: Path) -> str:
    """What a local sweep prints when its runs have ended; without pictures, which take seconds."""
    import io

    from rich.console import Console

    from experiments.report import page as report
    from sweeps import launch

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: [])
        launch._report(plan, output_dir=out, console=Console(file=said, width=1000))
    return said.getvalue()


@pytest.mark.slow
def test_files_that_cannot_be_written_cost_a_finished_sweep_one_hint(
    out: Path, plan: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.__main__ import main

    monkeypatch.setattr(tracking, "_REPORTED", set())
    made = plan(ranks=(8,), seeds=2)
    client(out).create_experiment("ranks", artifact_location=f"file://{out}/mlflow.db/x")
    for cell in made.cells:
        end_run(run_of(out, cell), loss=1.5)
    page, hint = closing(made, out).splitlines()
    assert page.startswith("report: ")
    assert hint.startswith(f"tracking: files (tables, configs) cannot be written to file://{out}")
    assert closing(made, out).splitlines() == [page]
    (parent,) = shown(out, "ranks", "sweep")
    runs = shown(out, "ranks", "run")
    assert [run.info.status for run in (*runs, parent)] == ["FINISHED"] * 3
    assert [run.data.metrics["train/loss"] for run in runs] == [1.5, 1.5]
    here = out / "mlartifacts" / parent.info.run_id / "artifacts"
    assert (here / "tables" / "arms.json").is_file()
    assert (here / "report" / "report.html").is_file()
    assert main(["sync", "--output-dir", str(out)]) == 0
    assert capsys.readouterr().err.strip() == hint


def test_any_error_of_a_store_is_one_line_at_a_sweeps_end(
    out: Path, plan: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.tracking import store as mlflow_store
    from sweeps.__main__ import main

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Could not determine home directory.\nand more")

    monkeypatch.setattr(tracking, "_REPORTED", set())
    monkeypatch.setattr(mlflow_store, "open_store", fails)
    made = plan(ranks=(8,), seeds=2)
    for cell in made.cells:
        end_run(run_of(out, cell), loss=1.5)
    _, line = closing(made, out).splitlines()
    assert "(RuntimeError: Could not determine home directory.); nothing is lost" in line
    assert main(["sync", "--output-dir", str(out)]) == 1
    assert capsys.readouterr().err.strip() == line
    assert "Traceback" in (out / "logs" / "mlflow-sync.log").read_text()

"""A sweep's parent, arms, note and views say what its runs say, however often they are written."""

from __future__ import annotations

import base64
import csv
import json
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from mlflow_runs import Store
from scipy import stats as scipy_stats

from experiments.disk.plans import read_sweep
from experiments.disk.state import RunState, state_of
from experiments.tracking import links, saved_views, sweeps
from experiments.tracking.note import MAX_NOTE, note
from experiments.tracking.sweep_view import ArmView, RunView, SweepView, summary
from experiments.tracking.sweeps import mlflow_status
from experiments.tracking.tracker import Group, sweep_view

T0 = 1_700_000_000.0
LOSS = "train/loss"


def a_run(arm: str, seed: int, *, state: str = "finished", **metrics: float) -> RunView:
    done = state in ("finished", "diverged")
    return RunView(
        run_id=f"{arm}-s{seed}",
        name=f"{arm} seed={seed}",
        seed=seed,
        state=RunState(
            run_id=f"{arm}-s{seed}",
            state=state,
            step=100 if done else 10,
            heartbeat=T0 + 60 * seed,
            reason="CUDA out of memory" if state == "failed" else None,
        ),
        metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )


def an_arm(r: int, *runs: RunView, model: str = "tiny") -> ArmView:
    axes = {"model.name": model, "relora.r": str(r)}
    return ArmView(
        arm_id=f"{model}-r{r}",
        name=f"model={model} relora.r={r:02d}",
        axes=axes,
        colour=f"#0000{r:02x}",
        runs=list(runs),
    )


def a_sweep(*arms: ArmView, **changes: Any) -> SweepView:
    return SweepView(
        name="model-relora.r",
        question="does the rank matter?",
        commands=["python run.py -m relora.r=8,16 seed=0,1,2"],
        created=T0 - 100,
        collapsed=["4 points -> 3 runs: relora.r does not apply to method=full_rank"],
        arms=list(arms),
        **changes,
    )


def two_arms() -> SweepView:
    return a_sweep(
        an_arm(8, *(a_run("r8", s, train__loss=2.0 + s, train__lr=1e-9) for s in range(3))),
        an_arm(16, a_run("r16", 0, train__loss=1 / 3), a_run("r16", 1, state="running")),
    )


@pytest.fixture
def show(store: Store) -> Callable[[SweepView], str]:
    def show(view: SweepView) -> str:
        parent, problem = sweeps.update(store.opened(), view, wait_s=600)
        assert problem is None
        return parent

    return show


def shown(store: Store, kind: str) -> list[Any]:
    runs = store.client.search_runs(
        [store.experiment_id], filter_string=f"tags.kind = '{kind}'", order_by=["run_name ASC"]
    )
    return list(runs)


def everything(store: Store) -> Any:
    """All that is shown, with every point that was ever sent."""
    runs = {
        run.info.run_id: (
            *(run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
            *(run.data.tags, run.data.params),
            {key: len(history(store, run, key)) for key in run.data.metrics},
        )
        for kind in ("sweep", "arm")
        for run in shown(store, kind)
    }
    return runs, store.client.get_experiment(store.experiment_id).tags


def history(store: Store, run: Any, key: str) -> list[float]:
    return [m.value for m in store.client.get_metric_history(run.info.run_id, key)]


def artifact(store: Store, run: str, path: str) -> str:
    return (store.folder / "mlartifacts" / run / "artifacts" / path).read_text()


def test_an_arm_shows_mean_and_interval_of_its_finished_runs(store: Store, show: Any) -> None:
    show(two_arms())
    full, part = sorted(shown(store, "arm"), key=lambda run: -run.data.metrics["n_finished"])
    low, high = scipy_stats.t.interval(0.95, 2, loc=3.0, scale=scipy_stats.sem([2.0, 3.0, 4.0]))
    metrics = full.data.metrics
    assert metrics["train/loss_mean"] == 3.0
    assert metrics["train/loss_ci_low"] == pytest.approx(low, rel=1e-5)
    assert metrics["train/loss_ci_high"] == pytest.approx(high, rel=1e-5)
    assert (metrics["n"], metrics["n_finished"], metrics["n_planned"]) == (3, 3, 3)
    assert full.info.run_name == "model=tiny relora.r=08 (mean of 3)"
    assert part.data.metrics["train/loss_mean"] == 0.333333  # six digits, not sixteen
    assert "train/loss_ci_low" not in part.data.metrics
    assert part.info.run_name == "model=tiny relora.r=16 (mean of 1 of 2)"
    assert part.data.tags["finished"] == "1 of 2"


def test_axes_are_params_and_numbers_are_metrics_too(store: Store, show: Any) -> None:
    show(two_arms())
    for run in shown(store, "arm"):
        assert set(run.data.params) == {"model.name", "relora.r"}
        assert run.data.metrics["axis/relora_r"] == float(run.data.params["relora.r"])
        assert "axis/model_name" not in run.data.metrics


def test_no_rate_is_averaged() -> None:
    assert set(summary(two_arms().arms[0])) == {LOSS}
    shares = {"perf__mfu": 0.2, "perf__mfu_6n": 0.3, "perf__tokens_per_s": 10.0}
    assert set(summary(an_arm(8, a_run("a", 0, train__loss=1.0, **shares)))) == {LOSS}


def test_a_perplexity_has_the_mean_and_interval_of_reports() -> None:
    runs = [a_run(f"a{s}", s, eval__paloma__perplexity=p) for s, p in enumerate((10.0, 20.0, 40.0))]
    mean = summary(an_arm(8, *runs))["eval/paloma/perplexity"]
    # t(0.975, 2) = 4.30265; the logarithms' standard deviation is log 2.
    assert mean.mean == pytest.approx(20.0)
    assert mean.high == pytest.approx(20.0 * 2 ** (4.30265 / 3**0.5), rel=1e-5)


def test_only_finished_runs_with_finite_numbers_count() -> None:
    runs = [
        a_run("a", 0, train__loss=1.0, eval__x=1.0),
        a_run("a", 1, train__loss=3.0, eval__x=float("inf")),
        a_run("a", 2, train__loss=99.0, eval__x=1.0, state="diverged"),
    ]
    means = summary(an_arm(8, *runs))
    assert means[LOSS].mean == 2.0
    assert "eval/x" not in means  # a mean of some of the finished seeds would look like all


def test_evaluations_with_other_settings_have_no_mean(tmp_path: Path) -> None:
    """As in reports."""
    configs = [synthetic.a_config(seed=seed) for seed in (0, 1)]
    runs = synthetic.a_sweep(tmp_path, configs)
    for run, digest, value in zip(runs, "de", (0.25, 0.75), strict=True):
        synthetic.record(run)
        for name, own in (("later", digest), ("alike", "d")):
            content = {"name": name, "section": "blimp", "step": synthetic.STEPS, "digest": own}
            content |= {"metrics": {f"{name}/blimp/no_bos/accuracy": value}, "tables": {}}
            path = run.evals / name / f"step-{synthetic.STEPS:08d}-blimp.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content | {"finished": 1.0}))
    sweep = read_sweep(tmp_path, "mine")
    group = Group(uri="", experiment="", sweep=sweep, members=sweep.runs)
    (arm,) = sweep_view(group, {run.run_id: state_of(run) for run in runs}).arms
    means = summary(arm)
    assert means["alike/blimp/no_bos/accuracy"].mean == 0.5
    assert "later/blimp/no_bos/accuracy" not in means


def test_repeating_it_changes_nothing(store: Store, show: Any) -> None:
    first = show(two_arms())
    before = everything(store)
    assert show(two_arms()) == first
    assert everything(store) == before


def test_another_seed_that_finishes_changes_the_mean(store: Store, show: Any) -> None:
    show(a_sweep(an_arm(8, a_run("r8", 0, train__loss=2.0), a_run("r8", 1, state="running"))))
    show(a_sweep(an_arm(8, a_run("r8", 0, train__loss=2.0), a_run("r8", 1, train__loss=4.0))))
    (arm,) = shown(store, "arm")
    assert arm.data.metrics["train/loss_mean"] == 3.0
    assert arm.info.status == "FINISHED"


def test_a_mean_that_is_no_more_is_not_shown_as_a_number(store: Store, show: Any) -> None:
    show(a_sweep(an_arm(8, *(a_run("r8", s, train__loss=2.0) for s in range(2)))))
    show(a_sweep(an_arm(8, a_run("r8", 0, train__loss=2.0), a_run("r8", 1, state="failed"))))
    again = everything(store)
    (arm,) = shown(store, "arm")
    assert np.isnan(arm.data.metrics["train/loss_ci_low"])
    show(a_sweep(an_arm(8, a_run("r8", 0, train__loss=2.0), a_run("r8", 1, state="failed"))))
    assert everything(store) == again


def test_it_is_rebuilt_from_nothing_and_arms_nest_under_the_parent(store: Store, show: Any) -> None:
    first = show(two_arms())
    for kind in ("sweep", "arm"):
        for run in shown(store, kind):
            store.client.delete_run(run.info.run_id)
    second = show(two_arms())
    assert second != first
    (parent,) = shown(store, "sweep")
    assert parent.info.run_id == second
    assert [run.data.tags["mlflow.parentRunId"] for run in shown(store, "arm")] == [second] * 2


def test_of_two_hosts_parents_the_oldest_stays(store: Store, show: Any) -> None:
    made = [
        store.client.create_run(
            store.experiment_id,
            start_time=int(T0) - age,
            tags={"kind": "sweep", "sweep": "model-relora.r"},
        )
        for age in (1, 5, 3)
    ]
    assert show(two_arms()) == made[1].info.run_id
    assert [run.info.run_id for run in shown(store, "sweep")] == [made[1].info.run_id]


def test_an_arm_that_left_the_plan_is_removed(store: Store, show: Any) -> None:
    show(two_arms())
    show(a_sweep(two_arms().arms[0]))
    assert [run.data.tags["arm"] for run in shown(store, "arm")] == ["tiny-r8"]


@pytest.mark.parametrize("place", ["theirs", "ours"], ids=["folder", "machine"])
def test_a_sweep_of_its_name_in_another_folder_keeps_its_arms(
    store: Store, tmp_path: Path, place: str
) -> None:
    """Folders of two machines may have one path."""

    def show(view: SweepView, folder: str) -> None:
        sweeps.update(store.opened(output_dir=tmp_path / folder), view, wait_s=600)

    theirs = a_sweep(an_arm(32, a_run("r32", 0, train__loss=9.0)))
    theirs.created += 500
    for _ in range(2):
        show(two_arms(), "ours")
        show(theirs, place)
    show(two_arms(), "moved")
    assert len(shown(store, "sweep")) == 2
    arms = sorted(run.data.tags["arm"] for run in shown(store, "arm"))
    assert arms == ["tiny-r16", "tiny-r32", "tiny-r8"]


def test_a_plan_made_anew_keeps_its_parent_in_its_folders_own_store(
    store: Store, show: Any
) -> None:
    view = two_arms()
    first = show(view)
    view.created += 500
    assert show(view) == first
    assert len(shown(store, "arm")) == 2


@pytest.mark.parametrize(
    ("states", "word"),
    [
        (["planned", "queued"], "SCHEDULED"),
        (["finished", "running", "failed"], "RUNNING"),
        (["finished", "planned"], "SCHEDULED"),  # nothing is at work
        (["finished", "finished"], "FINISHED"),
        (["finished", "lost"], "FAILED"),
        (["finished", "diverged"], "FAILED"),
        (["failed", "cancelled"], "FAILED"),
        (["finished", "cancelled"], "KILLED"),
    ],
)
def test_the_parents_status_is_that_of_its_runs(states: list[str], word: str) -> None:
    assert mlflow_status([RunState(run_id="x", state=state) for state in states]) == word


def test_a_sweep_that_is_over_ends_when_its_last_run_was_heard(store: Store, show: Any) -> None:
    show(a_sweep(an_arm(8, *(a_run("r8", s, train__loss=2.0) for s in range(3)))))
    (parent,) = shown(store, "sweep")
    assert parent.info.start_time == int((T0 - 100) * 1000)
    assert parent.info.end_time == int((T0 + 120) * 1000)


# the note ---------------------------------------------------------------------------------------
def test_the_note_says_what_is_known(store: Store, show: Any) -> None:
    view = two_arms()
    view.arms[1].runs.append(a_run("r16", 2, state="failed"))
    parent = show(view)
    text = store.client.get_run(parent).data.tags["mlflow.note.content"]
    assert text.startswith("does the rank matter?")
    assert "python run.py -m relora.r=8,16 seed=0,1,2" in text
    assert "4 of 6 runs finished, 1 running, 1 failed" in text
    assert (
        "| model=tiny relora.r=08 &nbsp; | 3/3 &nbsp; | 3 [0.5159, 5.484] |" in text
    )  # t(0.975, 2) = 4.303
    assert "| model=tiny relora.r=16 &nbsp; | 1/3 &nbsp; | 0.3333 |" in text
    assert "does not apply to method=full_rank" in text
    assert "CUDA out of memory" in text
    assert f"#/experiments/{store.experiment_id}/runs?viewStateShareKey=model-relora.r.arms" in text


def test_the_note_of_a_large_sweep_fits_and_says_what_is_left_out() -> None:
    arms = [an_arm(r, a_run(f"r{r}", 0, state="failed")) for r in range(400)]
    text = note(a_sweep(*arms), experiment_id="1", output_dir="out", summaries={})
    assert len(text) <= MAX_NOTE
    rows = text.count("| model=tiny relora.r=")
    assert f"{400 - rows} more arms are in `arms.csv`" in text
    assert "Records:" in text


def test_the_arms_are_a_table_too(store: Store, show: Any) -> None:
    parent = show(two_arms())
    table = json.loads(artifact(store, parent, "tables/arms.json"))
    assert not [column for column in table["columns"] if "." in column]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["train/loss_mean"] for row in rows] == [3.0, 0.333333]
    read = list(csv.reader(artifact(store, parent, "arms.csv").splitlines()))
    assert read[0] == table["columns"]
    assert store.client.get_run(parent).data.tags["plan"].endswith("model-relora.r/plan.json")


def test_a_note_that_a_person_wrote_on_the_experiment_stays(store: Store, show: Any) -> None:
    store.client.set_experiment_tag(store.experiment_id, "mlflow.note.content", "mine")
    show(two_arms())
    tags = store.client.get_experiment(store.experiment_id).tags
    assert tags["mlflow.note.content"] == "mine"


# saved views ------------------------------------------------------------------------------------
def test_the_views_are_in_the_format_of_this_mlflow(store: Store, show: Any) -> None:
    assert version("mlflow").startswith("3."), "look whether the UI still reads these views"
    parent = show(two_arms())
    tags = store.client.get_experiment(store.experiment_id).tags
    views = {k: json.loads(v) for k, v in tags.items() if k.startswith("mlflow.sharedViewState.")}
    assert len(views) == 6
    assert len({view["createdAt"] for view in views.values()}) == 6  # the menu's order
    for view in views.values():
        assert set(view) == {"name", "createdAt", "state"}
        head, _, packed = view["state"].partition(";")
        assert head == "deflate"
        state = json.loads(zlib.decompress(base64.b64decode(packed)))
        assert state["runsHiddenMode"] == "SHOW_ALL"  # else the UI draws ten runs
        assert state["orderByKey"] == "tags.`mlflow.runName`"  # by creation it folds them
        assert f"tags.`mlflow.parentRunId` = '{parent}'" in state["searchFilter"]
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
        # The filter finds what it is meant to.
        query = state["searchFilter"]
        listed = store.client.search_runs([store.experiment_id], filter_string=query)
        assert len(listed) == (2 if "kind = 'arm'" in query else 0)


def test_curves_can_be_drawn_against_tokens_and_gpu_hours() -> None:
    views = saved_views.saved_views(two_arms(), parent="p")
    for name, metric in (("tokens", "train/tokens"), ("gpu_hours", "train/gpu_hours")):
        packed = json.loads(views[f"mlflow.sharedViewState.model-relora.r.{name}"])["state"]
        state = json.loads(zlib.decompress(base64.b64decode(packed.partition(";")[2])))
        for place in (state["globalLineChartConfig"], *state["compareRunCharts"]):
            assert (place["xAxisKey"], place["selectedXAxisMetricKey"]) == ("metric", metric)


def test_perplexity_has_a_log_axis_and_the_loss_has_not() -> None:
    for name in ("curves", "by_arm", "tokens", "gpu_hours"):
        tag = saved_views.saved_views(two_arms(), parent="p")[
            f"mlflow.sharedViewState.model-relora.r.{name}"
        ]
        packed = json.loads(tag)["state"]
        state = json.loads(zlib.decompress(base64.b64decode(packed.partition(";")[2])))
        scales = {chart["metricKey"]: chart["scaleType"] for chart in state["compareRunCharts"]}
        assert scales["eval/paloma/perplexity"] == "log"
        assert scales["train/loss"] == "linear"


def test_views_fit_into_a_tag_for_a_large_sweep() -> None:
    arms = [an_arm(r, a_run(f"r{r}", 0)) for r in range(400)]
    views = saved_views.saved_views(a_sweep(*arms), parent="p" * 32)
    assert max(map(len, views.values())) < 5000


def test_what_goes_wrong_with_views_fails_nothing(
    store: Store, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> dict[str, str]:
        raise KeyError("an MLflow of tomorrow")

    monkeypatch.setattr(saved_views, "saved_views", broken)
    show(two_arms())
    assert len(shown(store, "arm")) == 2


def test_a_views_key_is_one_that_mlflow_takes(store: Store, show: Any) -> None:
    view = two_arms()
    view.name = "a=b_c"  # `=` may be in a sweep's name and not in a tag's
    show(view)
    tags = store.client.get_experiment(store.experiment_id).tags
    assert "mlflow.sharedViewState.a-b_c.curves" in tags
    addresses = links.links("7", sweep=view.name)
    assert any("viewStateShareKey=a-b_c.curves" in link for link in addresses.values())


def test_no_step_of_an_arm_or_a_parent_has_two_values(store: Store, show: Any) -> None:
    for finished in range(4):
        states = ["finished"] * finished + ["running"] * (3 - finished)
        runs = [a_run("r8", s, state=state, train__loss=1.0 + s) for s, state in enumerate(states)]
        show(a_sweep(an_arm(8, *runs)))
    show(a_sweep(an_arm(8, *runs[:2])))  # one is gone, and no step is larger
    seen = 0
    for run in (*shown(store, "arm"), *shown(store, "sweep")):
        for key in run.data.metrics:
            steps = [m.step for m in store.client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), (key, steps)
            seen += len(steps)
    assert seen > 15
    (arm,) = shown(store, "arm")
    assert (arm.data.metrics["n_finished"], arm.data.metrics["train/loss_mean"]) == (2, 1.5)

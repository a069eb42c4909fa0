"""A sweep in MLflow: its parent run, a summary run for each arm, its note and its saved views.

Not for: the runs themselves (`runs.py`), nor for reading plans (`tracker.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.stats import Interval
from experiments.tracking import note, saved_views
from experiments.tracking.artifacts import Artifacts
from experiments.tracking.content import Content, Shown, apply, differences
from experiments.tracking.note import significant
from experiments.tracking.run_view import MAX_PARAM, MAX_TAG, table_json
from experiments.tracking.store import Store, is_outage
from experiments.tracking.sweep_view import ArmView, SweepView, summary

NOTE = "mlflow.note.content"
Summaries = Mapping[str, Mapping[str, Interval]]
"""arm_id -> metric -> mean over its runs."""


def parent_run(store: Store, view: SweepView, *, wait_s: float) -> str:
    """MLflow's id of the sweep's parent run, made if there is none; `update` fills it.

    It is made before the runs, so that they can be nested.
    """
    with store.writing(wait_s=wait_s):
        return _parent(store, view).run


def update(store: Store, view: SweepView, *, wait_s: float) -> tuple[str, str | None]:
    """Show the sweep as it is now. MLflow's id of its parent run, and a line if files of it did not
    reach MLflow. Raises what `Store.writing` does.
    """
    with store.writing(wait_s=wait_s):
        files, parent = Artifacts(store), _parent(store, view)
        summaries = {arm.arm_id: summary(arm) for arm in view.arms}
        arms = _show_arms(store, view, parent, summaries)
        text = note.note(
            view,
            experiment_id=store.experiment_id,
            output_dir=store.output_dir,
            summaries=summaries,
            arm_runs=arms,
        )
        apply(store.client, parent, _parent_content(store, view, parent, text))
        _show_experiment(store, view, parent)
        _show_table(store, view, parent, summaries, files)
        return parent.run, files.problem


SHOWN = (".png", ".svg", ".html", ".csv", ".json", ".yaml", ".md", ".parquet")
"""Files of a report or a search that are shown in MLflow."""


def attach(store: Store, parent: str, folder: Path, *, wait_s: float) -> str | None:
    """Add changed files of reports and searches in the sweep's `folder` to its parent run.

    A line if they did not reach MLflow.
    """
    problem = None
    for place in ("study", "report"):
        files = [p for p in sorted((folder / place).rglob("*")) if p.suffix in SHOWN]
        if not files:
            continue
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
        with store.writing(wait_s=wait_s):
            if store.client.get_run(parent).data.tags.get(f"files.{place}") == digest:
                continue
            artifacts = Artifacts(store)
            for file in files:
                artifacts.file(parent, file, str(file.parent.relative_to(folder)))
            if artifacts.problem is None:
                store.client.set_tag(parent, f"files.{place}", digest)
            problem = problem or artifacts.problem
    return problem


def mlflow_status(states: Sequence[RunState]) -> str:
    """MLflow's status for several runs: that of runs in flight, else the worst."""
    present = {state.state for state in states}
    if State.RUNNING in present:
        return "RUNNING"
    if present & {State.PLANNED, State.QUEUED}:
        return "SCHEDULED"
    if any(state.bad for state in present - {State.CANCELLED}):
        return "FAILED"
    return "KILLED" if State.CANCELLED in present else "FINISHED"


# its runs; the caller has locked the store --------------------------------------------------------
def _parent(store: Store, view: SweepView) -> Shown:
    """The sweep's parent run; of several, made by several hosts, all but the oldest are removed."""
    runs = _search(store, view, "sweep")
    for run in runs[1:]:
        store.client.delete_run(run.run)
    start = int(view.created * 1000)
    return runs[0] if runs else _create(store, view.name, _tags(store, view, "sweep"), start=start)


def _search(store: Store, view: SweepView, kind: str) -> list[Shown]:
    """The sweep's, without those of a sweep of this name in another output folder."""
    own = _tags(store, view, kind)
    runs = store.search(f"tags.kind = '{kind}' and tags.sweep = '{view.name}'")
    return [
        Shown.of(run)
        for run in runs
        if run.data.tags.get("created") in (None, own["created"])  # None: of an earlier version
        or (store.own and run.data.tags.get("plan") == own["plan"])
    ]


def _create(store: Store, name: str, tags: dict[str, str], *, start: int | None) -> Shown:
    id_ = store.experiment_id
    return Shown.of(store.client.create_run(id_, start_time=start, tags=tags, run_name=name))


def _show_arms(store: Store, view: SweepView, parent: Shown, summaries: Summaries) -> list[str]:
    """A run for each arm, nested under `parent`; their ids in the view's order."""
    by_arm: dict[str, Shown] = {}
    arm_ids = {arm.arm_id for arm in view.arms}
    for run in _search(store, view, "arm"):
        arm_id = run.tags.get("arm", "")
        if arm_id not in arm_ids or arm_id in by_arm:
            store.client.delete_run(run.run)
        else:
            by_arm[arm_id] = run
    ids = []
    for arm in view.arms:
        means = summaries[arm.arm_id]
        tags = {
            **_tags(store, view, "arm"),
            **_arm_tags(arm, means),
            "mlflow.runColor": arm.colour,
            "mlflow.parentRunId": parent.run,
        }
        run = by_arm.get(arm.arm_id) or _create(store, _arm_name(arm), tags, start=None)
        apply(store.client, run, _arm_content(arm, run, means, tags=tags))
        ids.append(run.run)
    return ids


# what they are to show ----------------------------------------------------------------------------
def _tags(store: Store, view: SweepView, kind: str) -> dict[str, str]:
    """`created` tells sweeps of one name apart, also once their folder was moved."""
    plan = store.output_dir.absolute() / "sweeps" / view.name / "plan.json"
    source = {"mlflow.source.name": "run.py", "mlflow.source.type": "LOCAL"}
    own = {"plan": str(plan), "created": repr(view.created)}
    return {"kind": kind, "sweep": view.name, **own, **source}


def _arm_name(arm: ArmView) -> str:
    n, m = arm.finished, len(arm.runs)
    return f"{arm.name} (mean of {n if n == m else f'{n} of {m}'})"


def _arm_tags(arm: ArmView, means: Mapping[str, Interval]) -> dict[str, str]:
    cells = {
        title: note.cell(means[metric])
        for title, metric in saved_views.MAIN.items()
        if metric in means
    }
    return {
        "arm": arm.arm_id,
        "arm_name": arm.name[:MAX_TAG],
        "finished": f"{arm.finished} of {len(arm.runs)}",
        **cells,
    }


def _arm_content(
    arm: ArmView, run: Shown, means: Mapping[str, Interval], *, tags: dict[str, str]
) -> Content:
    step = max((one.state.step for one in arm.runs), default=0)
    return _content(
        run,
        [one.state for one in arm.runs],
        name=_arm_name(arm),
        tags=tags,
        params={key: value[:MAX_PARAM] for key, value in arm.axes.items()},
        metrics=_arm_metrics(arm, means),
        step=step,
    )


def _arm_metrics(arm: ArmView, means: Mapping[str, Interval]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for key, interval in means.items():
        metrics[f"{key}_mean"] = significant(interval.mean)
        if interval.low is not None and interval.high is not None:
            metrics[f"{key}_ci_low"] = significant(interval.low)
            metrics[f"{key}_ci_high"] = significant(interval.high)
    if means:
        metrics["n"] = float(arm.finished)
    metrics |= {"n_finished": float(arm.finished), "n_planned": float(len(arm.runs))}
    # As metrics, too: MLflow's params are strings, which it cannot sort or plot as numbers.
    for key, value in arm.axes.items():
        if (number := _number(value)) is not None:
            metrics[f"axis/{key.replace('.', '_')}"] = number
    return metrics


def _parent_content(store: Store, view: SweepView, run: Shown, text: str) -> Content:
    finished, planned = sum(s.state is State.FINISHED for s in view.states), len(view.states)
    tags = {
        **_tags(store, view, "sweep"),
        "finished": f"{finished} of {planned}",
        NOTE: text,
    }
    metrics = {"n_finished": float(finished), "n_planned": float(planned)}
    return _content(run, view.states, name=view.name, tags=tags, metrics=metrics)


def _content(
    run: Shown,
    states: Sequence[RunState],
    *,
    name: str,
    tags: dict[str, str],
    metrics: dict[str, float],
    params: dict[str, str] | None = None,
    step: int = 0,
) -> Content:
    newest = max((int(state.heartbeat * 1000) for state in states), default=0)
    return Content(
        name=name,
        status=mlflow_status(states),
        ended=max(newest, run.started),  # a summary may be made after its runs have ended
        tags=tags,
        removable=tuple(saved_views.MAIN),  # the text of a mean that no longer exists
        params=params or {},
        points=differences(run, metrics, step=step),
    )


def _show_table(
    store: Store, view: SweepView, parent: Shown, summaries: Summaries, files: Artifacts
) -> None:
    rows = note.table(view, summaries)
    text = table_json(rows)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if parent.tags.get("table") == digest:
        return
    path = "tables/arms.json"
    arrived = files.text(parent.run, text, path)
    arrived &= files.text(parent.run, note.table_csv(rows), "arms.csv")
    if not arrived:
        return
    listed = json.dumps([{"path": path, "type": "table"}])
    store.client.set_tag(parent.run, "mlflow.loggedArtifacts", listed)
    store.client.set_tag(parent.run, "table", digest)


def _show_experiment(store: Store, view: SweepView, parent: Shown) -> None:
    """Write the saved views, and a note if the experiment is this sweep's alone.

    A failure is only logged: the format of views is internal to MLflow.
    """
    try:
        experiment = store.client.get_experiment(store.experiment_id)
        wanted = saved_views.saved_views(view, parent=parent.run)
        before = experiment.tags.get(NOTE, "")
        ours = not before or before.startswith(("Runs of ", "Sweep "))
        if ours and experiment.name == view.name:
            wanted[NOTE] = note.sentence(view)
        for key, value in wanted.items():
            if experiment.tags.get(key) != value:
                store.client.set_experiment_tag(store.experiment_id, key, value)
    except Exception as error:
        if is_outage(error):
            raise
        logging.getLogger(__name__).warning("saved views of %s: %s", view.name, error)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None

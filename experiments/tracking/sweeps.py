"""A sweep in MLflow: its parent run, a summary run for each arm, its note and its saved views.

All of it is derived: found by tags, refreshed or made anew, and never read back. Not for: the runs
themselves (`mlflow_sync.py`), nor for reading plans (`experiments/tracking/tracker.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.stats import Interval
from experiments.tracking import note, saved_views
from experiments.tracking.artifacts import Artifacts
from experiments.tracking.note import significant
from experiments.tracking.run_view import MAX_PARAM, MAX_TAG
from experiments.tracking.store import connect, is_outage, lock, reachable
from experiments.tracking.sweep_view import ArmView, SweepView, summary

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NOTE = "mlflow.note.content"
WAIT_S = 600.0
"""Longest wait for another process that writes into the same store."""


def parent_run(
    view: SweepView,
    *,
    uri: str,
    experiment_id: str,
    output_dir: Path | str,
    wait_s: float = WAIT_S,
) -> str:
    """MLflow's id of the sweep's parent run, which is made where there is none.

    Made before the runs, so that they can be nested; `update` fills it.
    """
    with lock(uri, Path(output_dir)).acquire(timeout=wait_s), reachable(uri):
        return _Sweep(connect(uri), experiment_id, view).parent().info.run_id


def update(
    view: SweepView,
    *,
    uri: str,
    experiment_id: str,
    output_dir: Path | str,
    wait_s: float = WAIT_S,
) -> tuple[str, str | None]:
    """Show the sweep as it is now; MLflow's id of its parent run, and a line where files of it are
    not where MLflow shows them. Repeating it changes nothing.

    Raises TrackingUnreachable where the store does not answer, filelock's Timeout where another
    process writes into it for longer than `wait_s`.
    """
    with lock(uri, Path(output_dir)).acquire(timeout=wait_s), reachable(uri):
        sweep = _Sweep(connect(uri), experiment_id, view)
        place = {"uri": uri, "experiment_id": experiment_id, "output_dir": output_dir}
        files = Artifacts(sweep.client, **place)
        parent = sweep.parent().info.run_id
        summaries = {arm.arm_id: summary(arm) for arm in view.arms}
        arm_runs = sweep.show_arms(parent, summaries)
        sweep.show_parent(summaries, arm_runs, output_dir=output_dir)
        sweep.show_experiment(parent)
        sweep.show_table(summaries, files)
        return parent, files.problem


SHOWN = (".png", ".svg", ".html", ".csv", ".json", ".yaml", ".md", ".parquet")
"""Files of a report or a search that are worth a look in MLflow."""


def attach(
    parent: str,
    folder: Path,
    *,
    uri: str,
    experiment_id: str,
    output_dir: Path | str,
    wait_s: float,
) -> str | None:
    """Put what reports and searches have left in the sweep's `folder` on its parent run, where it
    has changed since; a line where MLflow cannot show it.
    """
    problem = None
    for place in ("study", "report"):
        files = [p for p in sorted((folder / place).rglob("*")) if p.suffix in SHOWN]
        if not files:
            continue
        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
        with lock(uri, Path(output_dir)).acquire(timeout=wait_s), reachable(uri):
            client = connect(uri)
            if client.get_run(parent).data.tags.get(f"files.{place}") == digest:
                continue
            there = Artifacts(client, uri=uri, experiment_id=experiment_id, output_dir=output_dir)
            for file in files:
                there.file(parent, file, str(file.parent.relative_to(folder)))
            if there.problem is None:
                client.set_tag(parent, f"files.{place}", digest)
            problem = problem or there.problem
    return problem


def mlflow_status(states: Sequence[RunState]) -> str:
    """MLflow's word for several runs: of those still to come first, then the worst."""
    present = {state.state for state in states}
    if State.RUNNING in present:
        return "RUNNING"
    if present & {State.PLANNED, State.QUEUED}:
        return "SCHEDULED"
    if any(state.bad for state in present - {State.CANCELLED}):
        return "FAILED"
    return "KILLED" if State.CANCELLED in present else "FINISHED"


@dataclass(kw_only=True, slots=True)
class _Content:
    """What an MLflow run is to show."""

    name: str
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    states: Sequence[RunState]


class _Sweep:
    """A sweep's derived runs in one MLflow experiment; the caller holds the store's lock."""

    def __init__(self, client: MlflowClient, experiment_id: str, view: SweepView) -> None:
        self.client, self.experiment_id, self.view = client, experiment_id, view
        self._parent: Run | None = None

    def parent(self) -> Run:
        """The oldest run that says it is this sweep; others, of another host, are removed."""
        if self._parent is None:
            found = list(self._search("sweep"))
            for run in found[1:]:
                self.client.delete_run(run.info.run_id)
            self._parent = (
                found[0]
                if found
                else self._create(
                    self.view.name, self._tags("sweep"), start=int(self.view.created * 1000)
                )
            )
        return self._parent

    def show_arms(self, parent: str, summaries: Mapping[str, Mapping[str, Interval]]) -> list[str]:
        """A run for each arm, nested under `parent`; their ids in the view's order."""
        known: dict[str, Run] = {}
        wanted = {arm.arm_id for arm in self.view.arms}
        for run in self._search("arm"):
            arm_id = run.data.tags.get("arm", "")
            if arm_id not in wanted or arm_id in known:
                self.client.delete_run(run.info.run_id)
            else:
                known[arm_id] = run
        shown = []
        for arm in self.view.arms:
            content = self._arm(arm, parent, summaries[arm.arm_id])
            run = known.get(arm.arm_id) or self._create(content.name, content.tags, start=None)
            self._show(run, content)
            shown.append(run.info.run_id)
        return shown

    def _arm(self, arm: ArmView, parent: str, found: Mapping[str, Interval]) -> _Content:
        n, m = arm.finished, len(arm.runs)
        metrics: dict[str, float] = {}
        for key, interval in found.items():
            metrics[f"{key}_mean"] = significant(interval.mean)
            if interval.low is not None and interval.high is not None:
                metrics[f"{key}_ci_low"] = significant(interval.low)
                metrics[f"{key}_ci_high"] = significant(interval.high)
        if found:
            metrics["n"] = float(n)
        metrics |= {"n_finished": float(n), "n_planned": float(m)}
        # MLflow's params are strings: sorted and plotted as numbers only where they are metrics.
        for key, value in arm.axes.items():
            if (number := _number(value)) is not None:
                metrics[f"axis/{key.replace('.', '_')}"] = number
        tags = {
            **self._tags("arm"),
            "arm": arm.arm_id,
            "arm_name": arm.name[:MAX_TAG],
            "finished": f"{n} of {m}",
            **{
                title: note.cell(found[metric])
                for title, metric in saved_views.MAIN.items()
                if metric in found
            },
            "mlflow.runColor": arm.colour,
            "mlflow.parentRunId": parent,
        }
        return _Content(
            name=f"{arm.name} (mean of {n if n == m else f'{n} of {m}'})",
            tags=tags,
            params={key: value[:MAX_PARAM] for key, value in arm.axes.items()},
            metrics=metrics,
            step=max((run.state.step for run in arm.runs), default=0),
            states=[run.state for run in arm.runs],
        )

    def show_parent(
        self,
        summaries: Mapping[str, Mapping[str, Interval]],
        arm_runs: Sequence[str],
        *,
        output_dir: Path | str,
    ) -> None:
        view, states = self.view, self.view.states
        text = note.note(
            view,
            experiment_id=self.experiment_id,
            output_dir=output_dir,
            summaries=summaries,
            arm_runs=arm_runs,
        )
        finished = sum(state.state is State.FINISHED for state in states)
        plan = Path(output_dir).absolute() / "sweeps" / view.name / "plan.json"
        tags = {
            **self._tags("sweep"),
            "finished": f"{finished} of {len(states)}",
            "plan": str(plan),
            NOTE: text,
        }
        metrics = {"n_finished": float(finished), "n_planned": float(len(states))}
        content = _Content(name=view.name, tags=tags, metrics=metrics, states=states)
        self._show(self.parent(), content)

    def show_table(self, summaries: Mapping[str, Mapping[str, Interval]], files: Artifacts) -> None:
        run = self.parent()
        columns, rows = note.table(self.view, summaries)
        text = note.table_json(columns, rows)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if run.data.tags.get("table") == digest:
            return
        path, id_ = "tables/arms.json", run.info.run_id
        there = files.text(id_, text, path)
        there &= files.text(id_, note.table_csv(columns, rows), "arms.csv")
        if not there:
            return
        listed = json.dumps([{"path": path, "type": "table"}])
        self.client.set_tag(id_, "mlflow.loggedArtifacts", listed)
        self.client.set_tag(id_, "table", digest)

    def show_experiment(self, parent: str) -> None:
        """Saved views, and a note where the experiment is this sweep's alone.

        The format of views is internal to MLflow: nothing else may depend on writing them.
        """
        try:
            experiment = self.client.get_experiment(self.experiment_id)
            wanted = saved_views.saved_views(self.view, parent=parent)
            before = experiment.tags.get(NOTE, "")
            ours = not before or before.startswith(("Runs of ", "Sweep "))
            if ours and experiment.name == self.view.name:
                wanted[NOTE] = note.sentence(self.view)
            for key, value in wanted.items():
                if experiment.tags.get(key) != value:
                    self.client.set_experiment_tag(self.experiment_id, key, value)
        except Exception as error:
            if is_outage(error):
                raise
            logging.getLogger(__name__).warning("saved views of %s: %s", self.view.name, error)

    # MLflow -------------------------------------------------------------------------------------
    def _tags(self, kind: str) -> dict[str, str]:
        source = {"mlflow.source.name": "run.py", "mlflow.source.type": "LOCAL"}
        return {"kind": kind, "sweep": self.view.name, **source}

    def _search(self, kind: str) -> Iterator[Run]:
        """Its runs of one kind, oldest first, in an order that every host sees alike."""
        token, found = None, []
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                filter_string=f"tags.kind = '{kind}' and tags.sweep = '{self.view.name}'",
                max_results=1000,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return iter(sorted(found, key=lambda r: (r.info.start_time, r.info.run_id)))

    def _create(self, name: str, tags: dict[str, str], *, start: int | None) -> Run:
        return self.client.create_run(
            self.experiment_id, start_time=start, tags=tags, run_name=name
        )

    def _show(self, run: Run, content: _Content) -> None:
        """Write what differs; a metric that is no longer there becomes NaN, as none can go.

        Each value has a step of its own: of a step with two values MLflow's charts show both.
        """
        from mlflow.entities import Metric, Param, RunTag

        id_, data, now = run.info.run_id, run.data, int(time.time() * 1000)
        gone = {key: math.nan for key in data.metrics if key not in content.metrics}
        last = {metric.key: metric.step for metric in data.to_proto().metrics}
        metrics = [
            Metric(key, value, now, max(content.step, last.get(key, -1) + 1))
            for key, value in {**content.metrics, **gone}.items()
            if not _same(data.metrics.get(key), value)
        ]
        tags = [RunTag(k, v) for k, v in content.tags.items() if data.tags.get(k) != v]
        params = [Param(k, v) for k, v in content.params.items() if k not in data.params]
        if tags or params:
            self.client.log_batch(id_, tags=tags, params=params)
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(id_, metrics=metrics[start : start + 1000])
        for title in saved_views.MAIN:  # the text of a mean that is no more
            if title in data.tags and title not in content.tags:
                self.client.delete_tag(id_, title)
        if run.info.run_name != content.name:
            self.client.update_run(id_, name=content.name)
        self._set_status(run, content.states)

    def _set_status(self, run: Run, states: Sequence[RunState]) -> None:
        id_, wanted = run.info.run_id, mlflow_status(states)
        if wanted in ("RUNNING", "SCHEDULED"):
            if run.info.status != wanted:
                self.client.update_run(id_, status=wanted)
            return
        heard = max((int(state.heartbeat * 1000) for state in states), default=0)
        ended = max(heard, run.info.start_time)  # a summary may be made after its runs
        if (run.info.status, run.info.end_time) != (wanted, ended):
            self.client.set_terminated(id_, status=wanted, end_time=ended)


def _same(shown: float | None, value: float) -> bool:
    return shown is not None and (shown == value or (math.isnan(shown) and math.isnan(value)))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None

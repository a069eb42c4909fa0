"""MLflow as a view of events.jsonl that can be thrown away and rebuilt at any time.

    sync        brings runs in MLflow up to date with their run directories, each point once
    Syncer      the same, repeated

MLflow's params are immutable and it does not know that two attempts overlap, so RUN_DIR/mlflow.json
keeps, per store and MLflow experiment, how far the record was acknowledged. Not for: deciding a
run's state, or what is shown of a whole sweep (`mlflow_sweep.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.addresses import redacted, sqlite_path, sqlite_uri
from experiments.colours import least_used
from experiments.disk.run_dir import RunDir, Status
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.identity import config_to_json
from experiments.tracking import run_view as record
from experiments.tracking.artifacts import Artifacts
from experiments.tracking.run_view import News, Point, Position
from experiments.tracking.store import connect, is_outage, lock, reachable
from relora_core.config import RunConfig

if TYPE_CHECKING:
    from mlflow.entities import Run

MLFLOW_STATUS = {
    State.PLANNED: "SCHEDULED",
    State.QUEUED: "SCHEDULED",
    State.RUNNING: "RUNNING",
    State.FINISHED: "FINISHED",
    State.FAILED: "FAILED",
    State.DIVERGED: "FAILED",
    State.LOST: "FAILED",
    State.CANCELLED: "KILLED",
    State.PRUNED: "KILLED",
}
TERMINAL = ("FINISHED", "FAILED", "KILLED")

SUPERSEDED = "superseded"
"""State of what showed a run before it began anew."""
MAX_METRICS = 800  # per log_batch call, of 1000 in all with at most 100 params and 100 tags
LISTED = "mlflow.loggedArtifacts"
PASSING = ("reason", "job_id", "checkpoint", "error")
"""Tags that go when there is no more to say."""


@dataclass(kw_only=True, slots=True)
class SyncReport:
    """What one pass over the runs did."""

    created: int = 0
    points: int = 0
    tables: int = 0
    busy: bool = False
    """Another process is syncing into this store; nothing was done."""
    errors: dict[str, str] = field(default_factory=dict)
    """run_id -> one line; the other runs were synced."""
    files: str | None = None
    """One line where files of runs are not where MLflow shows them; all else was synced."""


@dataclass(kw_only=True, slots=True)
class _View:
    """What MLflow shows of a run, as far as we know."""

    run: str
    place: str | None
    """Of its files."""
    name: str | None
    status: str
    end_time: int | None
    tags: dict[str, str]
    params: set[str]
    last: dict[str, int]


def sync(
    runs: Sequence[RunDir],
    *,
    uri: str,
    experiment_id: str,
    output_dir: Path | str,
    names: Mapping[str, str] | None = None,
    parent: str | None = None,
    final: bool = False,
    states: Mapping[str, RunState] | None = None,
) -> SyncReport:
    """Bring `runs` in MLflow up to date with their run directories; repeating it changes nothing.

    `names` (run_id -> name) renames; `parent` is MLflow's id of the run to nest under; `states`
    overrides the runs' own word. While another process syncs into the same store nothing is done
    (`busy`), unless `final`: then it is awaited. A run that cannot be synced is in `errors`; a
    store that does not answer raises TrackingUnreachable.
    """
    syncer = Syncer(uri, experiment_id=experiment_id, output_dir=output_dir)
    syncer.names, syncer.parent = dict(names or {}), parent
    return syncer.sync(runs, final=final, states=states)


class Syncer:
    """`sync`, repeated: remembers what MLflow shows, so that no news costs no request."""

    def __init__(self, uri: str, *, experiment_id: str, output_dir: Path | str) -> None:
        self.names: dict[str, str] = {}
        self.parent: str | None = None
        self.varying: Sequence[str] | None = None
        """Keys shown as params of every run; None: what varies between the runs of a pass."""
        self.colours: Mapping[str, str] = {}
        """arm_id -> colour, where the sweep says."""
        self.progress: Callable[[int, int], None] = lambda done, total: None
        """Hears of each run of a pass that has news: how many are done, of how many."""
        self._uri = uri
        self._experiment_id = experiment_id
        self._output_dir = Path(output_dir)
        self._lock = lock(uri, self._output_dir)
        database = sqlite_path(uri)
        self._key = f"{sqlite_uri(database) if database else redacted(uri)}#{experiment_id}"
        self._client = connect(uri)
        self._views: dict[str, _View] | None = None
        self._ids: dict[str, list[str]] = {}
        """run_id -> all that claims to show it: restoring an experiment restores every run."""
        self._colours: dict[str, str] = {}
        self._configs: dict[str, RunConfig] = {}
        self._varies: tuple[int, list[str]] = (0, [])
        """Of so many runs."""
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._failed: set[str] = set()
        """Runs that are not shown as they should be."""
        self._files = self._artifacts()

    def _artifacts(self) -> Artifacts:
        return Artifacts(
            self._client,
            uri=self._uri,
            experiment_id=self._experiment_id,
            output_dir=self._output_dir,
        )

    def sync(
        self,
        runs: Sequence[RunDir],
        *,
        final: bool = False,
        states: Mapping[str, RunState] | None = None,
    ) -> SyncReport:
        """One pass; see the function of the same name."""
        from filelock import Timeout

        report, states = SyncReport(), states or {}
        if final:  # a run that failed is tried again only with news, or now
            for name in self._failed:
                self._seen.pop(name, None)
        marks = {run.run_id: self._mark(run, states.get(run.run_id)) for run in runs}
        news = [run for run in runs if marks[run.run_id] != self._seen.get(run.run_id)]
        if not news:
            return report
        self._files = self._artifacts()  # its place may be back
        varying = self.varying if self.varying is not None else self._varying(runs)
        try:
            with self._lock.acquire(timeout=600 if final else 0), reachable(self._uri):
                for done, run in enumerate(news, start=1):
                    self._try_run(run, report, state=states.get(run.run_id), varying=varying)
                    self._seen[run.run_id] = marks[run.run_id]
                    self.progress(done, len(news))
        except Timeout:
            report.busy = True
        report.files = self._files.problem
        return report

    def _mark(self, run: RunDir, state: RunState | None) -> tuple[Any, ...]:
        """Changes when the run has news."""
        judged = (state.state, state.reason) if state else ()
        colours = tuple(self.colours.items())
        return (*record.mark(run), *judged, self.names.get(run.run_id), self.parent, colours)

    def _varying(self, runs: Sequence[RunDir]) -> list[str]:
        configs = []
        for run in runs:
            try:
                configs.append(self._config(run))
            except (OSError, ValueError, TypeError):  # said when its turn comes
                continue
        if len(configs) != self._varies[0]:  # a thousand runs take a while to compare
            self._varies = (len(configs), record.varying(configs))
        return self._varies[1]

    def _config(self, run: RunDir) -> RunConfig:
        if run.run_id not in self._configs:
            self._configs[run.run_id] = run.config()
        return self._configs[run.run_id]

    def _try_run(self, run: RunDir, report: SyncReport, **settings: Any) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._sync_run(run, report, **settings)
            self._failed.discard(run.run_id)
            if self._files.problem:
                self._failed.add(run.run_id)
        except Exception as error:
            if is_outage(error) or isinstance(error, MlflowException):
                self._views = None  # a request may have arrived although it failed: look again
            if is_outage(error):
                raise
            line = next(iter(str(error).splitlines()), "")
            report.errors[run.run_id] = f"{type(error).__name__}: {line}"[:300]
            self._failed.add(run.run_id)

    def _sync_run(
        self, run: RunDir, report: SyncReport, *, state: RunState | None, varying: Sequence[str]
    ) -> None:
        config = self._config(run)
        status = state or run.status()  # before the events: what it says is in them
        view, position = self._open(run, config, report)
        news = record.news(run, position)
        if news.anew:
            self._remove(run, view)
            view, position = self._open(run, config, report)
            news = record.news(run, position)
        self._add_evaluated(run, view, news, before=position)
        tables = self._with_waiting(run, news)
        if news.points:
            life = {"attempt": news.position.attempt, "began": news.position.began}
            sending = dataclasses.replace(position, sending=True, **life)
            record.save(run, self._key, sending)
        elif record.position(run, self._key) is None:
            record.save(run, self._key, position)
        tags = self._tags(run, config, status, view, news.position)
        self._log(
            view,
            params=record.params(config, varying=varying),
            tags=tags | self._listed(view, tables),
            points=news.points,
        )
        self._set_status(view, status, news.position)
        name = self.names.get(run.run_id)
        if name and name != view.name:
            self._client.update_run(view.run, name=name)
            view.name = name
        if not position.described:
            self._log_inputs(view, config)
            text = config_to_json(config)
            described = self._files.text(view.run, text, "config.json", place=view.place)
            news.position.described = described
        news.position.waiting = self._log_tables(view, tables)
        if news.position != position:
            record.save(run, self._key, news.position)
            view.last |= news.position.last
        report.points += len(news.points)
        report.tables += len(tables) - len(news.position.waiting)

    # the run in MLflow --------------------------------------------------------------------------
    def _open(self, run: RunDir, config: RunConfig, report: SyncReport) -> tuple[_View, Position]:
        """The run in MLflow, made where there is none, and how much of the record it has."""
        position = record.position(run, self._key)
        view = self._find(run, position)
        if view is None:
            view = self._create(run, config)
            position = Position(run=view.run)
            report.created += 1
        elif position is None or position.run != view.run:
            attempt = int(view.tags.get("first_attempt", 0))
            position = Position(run=view.run, attempt=attempt, last=dict(view.last))
        elif position.sending:
            position.last = {**position.last, **_view(self._client.get_run(view.run)).last}
        self._known()[run.run_id] = view
        for other in self._ids.pop(run.run_id, []):
            if other != view.run:
                self._client.delete_run(other)
        return view, position

    def _find(self, run: RunDir, position: Position | None) -> _View | None:
        from mlflow.exceptions import MlflowException

        known = self._known().get(run.run_id)
        if position is None or (known and known.run == position.run):
            return known
        try:  # made by another process since we looked, or of a store that is no more
            found = self._client.get_run(position.run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return known
        counts = found.data.tags.get("state") != SUPERSEDED
        return _view(found) if found.info.lifecycle_stage == "active" and counts else known

    def _known(self) -> dict[str, _View]:
        """run_id -> what MLflow shows of it. The oldest one counts where there are several."""
        if self._views is None:
            self._views, self._ids = {}, {}
            for run in self._search():
                tags = run.data.tags
                self._ids.setdefault(tags.get("run_id", ""), []).append(run.info.run_id)
                if tags.get("state") != SUPERSEDED:
                    self._views.setdefault(tags.get("run_id", ""), _view(run))
                if "arm" in tags and "mlflow.runColor" in tags:
                    self._colours.setdefault(tags["arm"], tags["mlflow.runColor"])
        return self._views

    def _search(self) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string="tags.kind = 'run'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, run: RunDir, config: RunConfig) -> _View:
        # MLflow never changes a start: made while planned, a run's duration includes its wait.
        started = next((int(event["time"] * 1000) for event in run.events()), None)
        made = self._client.create_run(
            self._experiment_id,
            start_time=started,
            tags={"kind": "run", "run_id": run.run_id},
            run_name=self.names.get(run.run_id) or record.default_name(config),
        )
        return _view(made)

    def _remove(self, run: RunDir, view: _View) -> None:
        """Take away what is shown of a run that has begun anew: MLflow cannot forget points.

        It stays in MLflow's trash; a kill after this leaves nothing that shows the run, so that the
        next pass makes it.
        """
        self._client.set_tag(view.run, "state", SUPERSEDED)
        self._client.delete_run(view.run)
        self._known().pop(run.run_id, None)

    # what is shown of it ------------------------------------------------------------------------
    def _tags(
        self, run: RunDir, config: RunConfig, status: Status, view: _View, position: Position
    ) -> dict[str, str]:
        name = self.names.get(run.run_id) or view.name or record.default_name(config)
        tags = record.tags(run, config, status, name=name)
        tags["first_attempt"] = str(position.attempt)
        tags["mlflow.runColor"] = self._colour(tags["arm"])
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent
        return tags

    def _colour(self, arm: str) -> str:
        """The arm's colour in this experiment; a new arm takes the one least used."""
        if arm in self.colours:
            return self.colours[arm]
        if arm not in self._colours:
            self._colours[arm] = least_used(self._colours.values())
        return self._colours[arm]

    def _log(
        self,
        view: _View,
        *,
        params: dict[str, str],
        tags: dict[str, str],
        points: Sequence[Point],
    ) -> None:
        """What is new of it, in as few calls as MLflow takes: the first points bring the labels."""
        from mlflow.entities import Metric, Param, RunTag

        labels = {
            "params": [Param(k, v) for k, v in params.items() if k not in view.params],
            "tags": [RunTag(k, v) for k, v in tags.items() if view.tags.get(k) != v],
        }
        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        if metrics or any(labels.values()):
            self._client.log_batch(view.run, metrics=metrics[:MAX_METRICS], **labels)
        for start in range(MAX_METRICS, len(metrics), MAX_METRICS):
            self._client.log_batch(view.run, metrics=metrics[start : start + MAX_METRICS])
        for key in PASSING:
            if key in view.tags and key not in tags:
                self._client.delete_tag(view.run, key)
                del view.tags[key]
        view.params |= set(params)
        view.tags |= tags

    def _add_evaluated(self, run: RunDir, view: _View, news: News, *, before: Position) -> None:
        """Add evaluations apart from training, without the points that training has shown."""
        apart = record.evaluated(run, news.position)
        there = {(point.key, point.step) for point in news.points}
        for key in {point.key for point in apart.points} & set(before.last):
            there |= {(key, m.step) for m in self._client.get_metric_history(view.run, key)}
        news.points += [p for p in apart.points if (p.key, p.step) not in there]
        news.tables |= apart.tables
        news.position = apart.position

    def _with_waiting(self, run: RunDir, news: News) -> dict[str, list[dict[str, Any]]]:
        """The new tables, and older ones that MLflow does not have yet."""
        waiting = [name for name in news.position.waiting if name not in news.tables]
        older = record.tables(run, news.position) if waiting else {}
        return {name: older[name] for name in waiting if name in older} | news.tables

    def _log_inputs(self, view: _View, config: RunConfig) -> None:
        """What the run reads, as MLflow's datasets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name=d.name, digest=d.digest, source_type=d.source_type, source=d.source),
                [InputTag("mlflow.data.context", d.context)],
            )
            for d in record.datasets(config)
        ]
        if inputs:  # those that are there already are not doubled
            self._client.log_inputs(view.run, datasets=inputs)

    def _listed(self, view: _View, tables: Iterable[str]) -> dict[str, str]:
        """The tag by which MLflow's pages know the run's tables, these among them."""
        if not tables or self._files.problem:
            return {}
        listed = json.loads(view.tags.get(LISTED, "[]"))
        listed += [{"path": _path(name), "type": "table"} for name in tables]
        return {LISTED: json.dumps(list({entry["path"]: entry for entry in listed}.values()))}

    def _log_tables(self, view: _View, tables: Mapping[str, list[dict[str, Any]]]) -> list[str]:
        """Each table as an artifact in the place of its predecessor, to which log_table appends;
        those that are not in MLflow, of which the tag then says nothing."""
        waiting = []
        for name, rows in tables.items():
            text = record.table_json(rows)
            if not self._files.text(view.run, text, _path(name), place=view.place):
                waiting.append(name)
        listed = json.loads(view.tags.get(LISTED, "[]"))
        paths = {_path(name) for name in waiting}
        there = json.dumps([entry for entry in listed if entry["path"] not in paths])
        if waiting and there != view.tags.get(LISTED, "[]"):
            self._client.set_tag(view.run, LISTED, there)
            view.tags[LISTED] = there
        return waiting

    def _set_status(self, view: _View, status: Status, position: Position) -> None:
        wanted = MLFLOW_STATUS[status.state]
        if wanted not in TERMINAL:
            if view.status != wanted:
                self._client.update_run(view.run, status=wanted)
                view.status = wanted
            return
        ended = record.ended_ms(status, position)
        if (view.status, view.end_time) != (wanted, ended):
            self._client.set_terminated(view.run, status=wanted, end_time=ended)
            view.status, view.end_time = wanted, ended


def _path(table: str) -> str:
    """Of a table among the run's files."""
    return f"tables/{record.metric_key(table)}.json"


def _view(run: Run) -> _View:
    latest = run.data.to_proto().metrics  # of each key the point with the largest step
    return _View(
        run=run.info.run_id,
        place=run.info.artifact_uri,
        name=run.info.run_name,
        status=run.info.status,
        end_time=run.info.end_time,
        tags=dict(run.data.tags),
        params=set(run.data.params),
        last={metric.key: metric.step for metric in latest},
    )

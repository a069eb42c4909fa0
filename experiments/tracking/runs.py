"""Runs brought up to date in MLflow: `Syncer(store).sync(runs)`.

Each point is sent once: RUN_DIR/mlflow.json has, for each store and MLflow experiment, how much of
the record MLflow has. Not for: deciding a run's state, or what is shown of a sweep (`sweeps.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.colours import least_used
from experiments.disk.run_dir import RunDir, Status
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.identity import config_to_json
from experiments.tracking import run_view
from experiments.tracking.artifacts import Artifacts
from experiments.tracking.content import Content, Shown, apply
from experiments.tracking.run_view import Position, Unsent
from experiments.tracking.store import Store, is_outage
from relora_core.config import RunConfig

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

SUPERSEDED = "superseded"
"""State of an MLflow run that a newer one has replaced, since its run began anew at step 0."""
LISTED = "mlflow.loggedArtifacts"
REMOVABLE = ("reason", "job_id", "checkpoint", "error")
"""Tags that are removed once they no longer apply."""
WAIT_S = 600.0
"""Longest wait of a last pass for another process that writes into the same store."""


@dataclass(kw_only=True, slots=True)
class InSweep:
    """How a sweep has its runs shown."""

    names: Mapping[str, str] = field(default_factory=dict)
    """run_id -> name."""
    parent: str | None = None
    """MLflow's id of the run to nest under."""
    colours: Mapping[str, str] = field(default_factory=dict)
    """arm_id -> colour; other arms take the one that is least used."""


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
    """A line if files of runs did not reach MLflow; all else was synced."""


@dataclass(kw_only=True, slots=True)
class _Pass:
    """What all runs of one pass share, and its report."""

    sweep: InSweep
    states: Mapping[str, RunState]
    varying: Sequence[str]
    """Keys that are shown as params of every run."""
    files: Artifacts
    report: SyncReport


class Syncer:
    """Brings runs up to date, repeatedly; unchanged runs cost no request."""

    def __init__(self, store: Store) -> None:
        self._store, self._client = store, store.client
        self._index = _Index(store)
        self._configs: dict[str, RunConfig] = {}
        self._varies: tuple[int, list[str]] = (0, [])
        """Number of runs that were compared, and the keys that differ."""
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._failed: set[str] = set()
        """Runs to sync again: they failed, or files of theirs did not arrive."""

    def sync(
        self,
        runs: Sequence[RunDir],
        *,
        sweep: InSweep | None = None,
        states: Mapping[str, RunState] | None = None,
        final: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> SyncReport:
        """Bring `runs` in MLflow up to date with their folders.

        `states` overrides the runs' own files. While another process writes into the store nothing
        is done (`busy`), unless `final`: then it is waited for. A run that cannot be synced is in
        `errors`; a store that does not answer raises TrackingUnreachable. `progress` is called with
        the number of changed runs that are done, and of all changed runs.
        """
        from filelock import Timeout

        sweep, states, report = sweep or InSweep(), states or {}, SyncReport()
        if final:  # otherwise a run that failed is tried again only once it has changed
            for name in self._failed:
                self._seen.pop(name, None)
        marks = {run.run_id: _mark(run, states.get(run.run_id), sweep) for run in runs}
        changed = [run for run in runs if marks[run.run_id] != self._seen.get(run.run_id)]
        if not changed:
            return report
        files, varying = Artifacts(self._store), self._varying(runs)
        this = _Pass(sweep=sweep, states=states, varying=varying, files=files, report=report)
        try:
            with self._store.writing(wait_s=WAIT_S if final else 0):
                for done, run in enumerate(changed, start=1):
                    self._try_run(run, this)
                    self._seen[run.run_id] = marks[run.run_id]
                    progress(done, len(changed))
        except Timeout:
            report.busy = True
        report.files = files.problem
        return report

    def _varying(self, runs: Sequence[RunDir]) -> list[str]:
        configs = []
        for run in runs:
            try:
                configs.append(self._config(run))
            except (OSError, ValueError, TypeError):  # _try_run reports it
                continue
        if len(configs) != self._varies[0]:  # comparing a thousand runs takes a while
            self._varies = (len(configs), run_view.varying(configs))
        return self._varies[1]

    def _config(self, run: RunDir) -> RunConfig:
        if run.run_id not in self._configs:
            self._configs[run.run_id] = run.config()
        return self._configs[run.run_id]

    def _try_run(self, run: RunDir, this: _Pass) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._sync_run(run, this)
            self._failed.discard(run.run_id)
            if this.files.problem:
                self._failed.add(run.run_id)
        except Exception as error:
            if is_outage(error) or isinstance(error, MlflowException):
                self._index.forget()  # a request may have arrived although it failed: look again
            if is_outage(error):
                raise
            line = next(iter(str(error).splitlines()), "")
            this.report.errors[run.run_id] = f"{type(error).__name__}: {line}"[:300]
            self._failed.add(run.run_id)

    def _sync_run(self, run: RunDir, this: _Pass) -> None:
        config, files, key = self._config(run), this.files, self._store.key
        status = this.states.get(run.run_id) or run.status()  # before its events: they may be newer
        shown, position = self._open(run, config, this)
        new = run_view.read_unsent(run, position)
        if new.restarted:
            self._index.remove(run, shown)
            shown, position = self._open(run, config, this)
            new = run_view.read_unsent(run, position)
        self._add_evaluated(run, shown, new, before=position)
        tables = _with_waiting(run, new)
        if new.points:
            attempt = {"attempt": new.position.attempt, "began": new.position.began}
            run_view.save_position(run, key, dataclasses.replace(position, sending=True, **attempt))
        wanted = self._wanted(run, config, status, shown, new, this)
        if not files.problem:
            wanted.tags |= _listed(shown, tables)
        apply(self._client, shown, wanted)
        if not position.described:
            self._log_inputs(shown, config)
            text = config_to_json(config)
            described = files.text(shown.run, text, "config.json", place=shown.place)
            new.position.described = described
        new.position.waiting = self._log_tables(shown, tables, files)
        if new.position != position:
            run_view.save_position(run, key, new.position)
            shown.last |= new.position.last
        this.report.points += len(new.points)
        this.report.tables += len(tables) - len(new.position.waiting)

    def _open(self, run: RunDir, config: RunConfig, this: _Pass) -> tuple[Shown, Position]:
        """The run in MLflow, made if there is none, and how much of the record it has."""
        position = run_view.read_position(run, self._store.key)
        shown = self._index.find(run, position)
        if shown is None:
            name = this.sweep.names.get(run.run_id) or run_view.default_name(config)
            claim = uuid.uuid4().hex
            # Before the request, whose answer a kill or a server may keep from us.
            run_view.save_position(run, self._store.key, Position(run=claim))
            shown = self._index.create(run, name=name, claim=claim)
            position = Position(run=shown.run)
            this.report.created += 1
        elif position is None or position.run != shown.run:
            position = _position_of(shown)
        elif position.sending:
            now = Shown.of(self._client.get_run(shown.run))
            position.last = {**position.last, **now.last}
        self._index.keep(run, shown)
        return shown, position

    # what is shown of it ------------------------------------------------------------------------
    def _wanted(
        self,
        run: RunDir,
        config: RunConfig,
        status: Status | RunState,
        shown: Shown,
        new: Unsent,
        this: _Pass,
    ) -> Content:
        given = this.sweep.names.get(run.run_id)
        name = given or shown.name or run_view.default_name(config)
        tags = run_view.tags(run, config, status, name=name)
        tags["first_attempt"] = str(new.position.attempt)
        tags["record"] = str(run.path.absolute())
        if new.position.began:
            tags["began"] = repr(new.position.began)
        arm = tags["arm"]
        tags["mlflow.runColor"] = this.sweep.colours.get(arm) or self._index.colour(arm)
        if this.sweep.parent:
            tags["mlflow.parentRunId"] = this.sweep.parent
        return Content(
            name=given,
            status=MLFLOW_STATUS[status.state],
            ended=run_view.ended_ms(status, new.position),
            tags=tags,
            removable=REMOVABLE,
            params=run_view.params(config, varying=this.varying),
            points=new.points,
        )

    def _add_evaluated(self, run: RunDir, shown: Shown, new: Unsent, *, before: Position) -> None:
        """Add evaluations apart from training, without points that training has sent."""
        apart = run_view.read_unsent_evaluations(run, new.position)
        sent = {(point.key, point.step) for point in new.points}
        for key in {point.key for point in apart.points} & set(before.last):
            sent |= {(key, m.step) for m in self._client.get_metric_history(shown.run, key)}
        new.points += [p for p in apart.points if (p.key, p.step) not in sent]
        new.tables |= apart.tables
        new.position = apart.position

    def _log_inputs(self, shown: Shown, config: RunConfig) -> None:
        """What the run reads, as MLflow's datasets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name=d.name, digest=d.digest, source_type=d.source_type, source=d.source),
                [InputTag("mlflow.data.context", d.context)],
            )
            for d in run_view.datasets(config)
        ]
        if inputs:  # MLflow does not add those that it has
            self._client.log_inputs(shown.run, datasets=inputs)

    def _log_tables(
        self, shown: Shown, tables: Mapping[str, list[dict[str, Any]]], files: Artifacts
    ) -> list[str]:
        """Write each table as a file of the run, in place of an earlier one.

        The names of those that did not reach MLflow; the tag that lists tables leaves them out.
        """
        waiting = []
        for name, rows in tables.items():
            text = run_view.table_json(rows)
            if not files.text(shown.run, text, _path(name), place=shown.place):
                waiting.append(name)
        listed = json.loads(shown.tags.get(LISTED, "[]"))
        paths = {_path(name) for name in waiting}
        left = json.dumps([entry for entry in listed if entry["path"] not in paths])
        if waiting and left != shown.tags.get(LISTED, "[]"):
            self._client.set_tag(shown.run, LISTED, left)
            shown.tags[LISTED] = left
        return waiting


def _mark(run: RunDir, state: RunState | None, sweep: InSweep) -> tuple[Any, ...]:
    """A value that changes when the run has something new to show."""
    judged = (state.state, state.reason) if state else ()
    colours = tuple(sweep.colours.items())
    return (*run_view.mark(run), *judged, sweep.names.get(run.run_id), sweep.parent, colours)


def _with_waiting(run: RunDir, new: Unsent) -> dict[str, list[dict[str, Any]]]:
    """The new tables, and older ones that did not reach MLflow."""
    waiting = [name for name in new.position.waiting if name not in new.tables]
    older = run_view.tables(run, new.position) if waiting else {}
    return {name: older[name] for name in waiting if name in older} | new.tables


def _listed(shown: Shown, tables: Iterable[str]) -> dict[str, str]:
    """The tag that lists the run's tables for MLflow's pages, with these added."""
    if not tables:
        return {}
    listed = json.loads(shown.tags.get(LISTED, "[]"))
    listed += [{"path": _path(name), "type": "table"} for name in tables]
    return {LISTED: json.dumps(list({entry["path"]: entry for entry in listed}.values()))}


def _position_of(shown: Shown) -> Position:
    """How much an MLflow run has of a record whose own Position is lost."""
    tags = shown.tags
    attempt, began = int(tags.get("first_attempt", 0)), float(tags.get("began", 0))
    return Position(run=shown.run, attempt=attempt, began=began, last=dict(shown.last))


def _shows(shown: Shown, run: RunDir, store: Store) -> bool:
    """Whether it shows this record, rather than another of the same run_id.

    That is one of a folder that was moved aside, or of another output folder. A record that has not
    begun is recognised by the ids in its `mlflow.json`, a file that is moved with the folder.
    """
    if "began" in shown.tags:
        return float(shown.tags["began"]) in run_view.beginnings(run)
    named = run_view.named(run)
    return shown.run in named or shown.tags.get("claim") in named or _replaced(shown, run, store)


def _replaced(shown: Shown, run: RunDir, store: Store) -> bool:
    """Whether it shows a record that was in the place where this one is now."""
    return store.own and shown.tags.get("record") == str(run.path.absolute())


def find_own(
    shown: Iterable[Shown], run: RunDir, *, store: Store, position: Position | None
) -> Shown | None:
    """Of MLflow runs of its run_id, oldest first, the one that shows this record.

    Those of earlier versions do not tell what they show; one is taken if no other shows it.
    """
    current = [one for one in shown if one.tags.get("state") != SUPERSEDED]
    if position and (known := [one for one in current if one.run == position.run]):
        return known[0]
    own = (one for one in current if _shows(one, run, store))
    older = (one for one in current if not {"claim", "record", "began"} & one.tags.keys())
    return next(itertools.chain(own, older), None)


def _path(table: str) -> str:
    """Path of a table among the run's files."""
    return f"tables/{run_view.metric_key(table)}.json"


class _Index:
    """What a store shows of each run; read once, and again after `forget`."""

    def __init__(self, store: Store) -> None:
        self._store, self._client = store, store.client
        self._shown: dict[str, list[Shown]] | None = None
        """run_id -> all MLflow runs of it, oldest first: restoring an experiment restores deleted
        ones, and other output folders may have the same run."""
        self._colours: dict[str, str] = {}

    def forget(self) -> None:
        self._shown = None

    def find(self, run: RunDir, position: Position | None) -> Shown | None:
        from mlflow.exceptions import MlflowException

        shown = self._all().get(run.run_id, [])
        listed = find_own(shown, run, store=self._store, position=position)
        if position is None or (listed and listed.run == position.run):
            return listed
        try:  # another process may have made it since we read, or the store was deleted
            named = self._client.get_run(position.run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return listed
        superseded = named.data.tags.get("state") == SUPERSEDED
        active = named.info.lifecycle_stage == "active" and not superseded
        return Shown.of(named) if active else listed

    def _all(self) -> dict[str, list[Shown]]:
        if self._shown is None:
            self._shown = {}
            for run in self._store.search("tags.kind = 'run'"):
                tags = run.data.tags
                self._shown.setdefault(tags.get("run_id", ""), []).append(Shown.of(run))
                if "arm" in tags and "mlflow.runColor" in tags:
                    self._colours.setdefault(tags["arm"], tags["mlflow.runColor"])
        return self._shown

    def create(self, run: RunDir, *, name: str, claim: str) -> Shown:
        # Of a run that has not begun it is now, for good: its duration will include its wait.
        started = next((int(event["time"] * 1000) for event in run.events()), None)
        tags = {"kind": "run", "run_id": run.run_id, "claim": claim}
        tags["record"] = str(run.path.absolute())
        id_ = self._store.experiment_id
        return Shown.of(self._client.create_run(id_, start_time=started, tags=tags, run_name=name))

    def keep(self, run: RunDir, shown: Shown) -> None:
        """Remove all MLflow runs of the run but this one, and those of other output folders.

        In the folder's own database also that of a record that was moved aside.
        """
        others = [one for one in self._all().get(run.run_id, []) if one.run != shown.run]
        for other in others:
            if _replaced(other, run, self._store) or _shows(other, run, self._store):
                self._client.delete_run(other.run)
        self._all()[run.run_id] = [shown]

    def remove(self, run: RunDir, shown: Shown) -> None:
        """Delete the MLflow run of a run that began anew at step 0: MLflow cannot remove points.

        It stays in MLflow's trash. After a kill here the next pass finds none and makes one.
        """
        self._client.set_tag(shown.run, "state", SUPERSEDED)
        self._client.delete_run(shown.run)
        self._all().pop(run.run_id, None)

    def colour(self, arm: str) -> str:
        """The arm's colour in this experiment; a new arm takes the one that is least used."""
        if arm not in self._colours:
            self._colours[arm] = least_used(self._colours.values())
        return self._colours[arm]

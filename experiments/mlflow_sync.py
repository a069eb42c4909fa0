"""MLflow as a view of events.jsonl that can be thrown away and rebuilt at any time.

    sync        brings runs in MLflow up to date with their run directories, each point once
    Follower    a child process that syncs while runs are at work; never slows or harms them

MLflow's params are immutable and it does not know that two attempts overlap, so RUN_DIR/mlflow.json
keeps, per store and MLflow experiment, how far the record was acknowledged. The only file that
imports MLflow, and only inside functions. Not for: deciding a run's state, or the sweep's summary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from experiments.identity import arm_id, label, scientific
from experiments.run_dir import RunDir, Status
from relora_core import atomic
from relora_core.config import ConfigError, RunConfig, TrackingConfig, nearest

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow import MlflowClient
    from mlflow.entities import Run

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}
"""What SQLAlchemy imports for a dialect where the URI names no driver."""

MLFLOW_STATUS = {
    "planned": "SCHEDULED",
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "cancelled": "KILLED",
}
TERMINAL = ("FINISHED", "FAILED", "KILLED")

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),  # Okabe and Ito
    *("#332288", "#882255", "#117733", "#999933", "#AA4499", "#44AA99", "#CC6677"),  # Tol, muted
)
"""Colours that colour-blind readers tell apart; the first six best of all."""

MAX_METRICS = 1000  # per log_batch call
MAX_PARAM = 6000
MAX_TAG = 5000


class TrackingUnreachable(RuntimeError):
    """The store does not answer; one line that says that nothing is lost."""

    def __init__(self, uri: str) -> None:
        super().__init__(
            f"tracking: {redacted(uri)} unreachable; nothing is lost, "
            "run `python -m sweeps sync` later"
        )


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


def check_uri(tracking: TrackingConfig) -> None:
    """Raise ConfigError where `tracking.uri` cannot be a store. Contacts none, loads no MLflow."""
    uri = tracking.uri
    if not tracking.enabled or uri is None:
        return
    scheme, separator, _ = uri.partition("://")
    dialect, _, driver = scheme.partition("+")
    if not separator or scheme == "file":
        path = re.sub(r"^(file:(//)?|sqlite:/*)", "", uri)
        path = path if path.endswith(".db") else f"{path}/mlflow.db"
        raise ConfigError(
            f"tracking.uri must be a database or a server (MLflow's file store is closed), got "
            f"{uri!r}; nearest valid: sqlite:///{path}"
        )
    if dialect not in SCHEMES:
        raise ConfigError(
            f"tracking.uri must begin with one of {', '.join(s + '://' for s in SCHEMES)}, "
            f"got {redacted(uri)!r}.{nearest(dialect, SCHEMES)}"
        )
    if dialect == "sqlite":
        _check_sqlite(uri)
    elif dialect in ("http", "https") and not urlsplit(uri).hostname:
        raise ConfigError(
            f"tracking.uri must name a host, as in http://127.0.0.1:5000, got {uri!r}"
        )
    elif dialect in DRIVERS and not importlib.util.find_spec(driver or DRIVERS[dialect]):
        raise ConfigError(
            f"tracking.uri needs the Python package {driver or DRIVERS[dialect]} for {dialect}, "
            f"which is not installed, got {redacted(uri)!r}"
        )


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        raise ConfigError(
            f"tracking.uri must name a database file, as in sqlite:///mlflow.db, got {uri!r}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"tracking.uri must name a file in an existing folder, got {uri!r} and "
            f"{path.parent} does not exist"
        )
    if path.is_dir():
        raise ConfigError(
            f"tracking.uri must name a file, got the folder {path}; nearest valid: "
            f"sqlite:///{path}/mlflow.db"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"tracking.uri must be writable, got {uri!r}")


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a sqlite URI's file; None for other stores and databases in memory."""
    if not re.match(r"sqlite(\+\w+)?:///", uri):
        return None
    name = uri.split(":///", 1)[1].split("?", 1)[0]
    return Path(name).absolute() if name and name != ":memory:" else None


def redacted(uri: str) -> str:
    """`uri` without its password."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def default_uri(output_dir: Path | str) -> str:
    return f"sqlite:///{Path(output_dir).absolute() / 'mlflow.db'}"


def store_uri(config: RunConfig) -> str:
    """The store that a run is tracked in."""
    return config.tracking.uri or default_uri(config.output_dir)


def experiment_name(config: RunConfig) -> str:
    """The MLflow experiment that holds the run."""
    return config.tracking.experiment or config.sweep.name or config.experiment


def ui_command(uri: str, output_dir: Path | str) -> str:
    """The shell command that shows the store in a browser: 2 processes, on loopback only.

    Of a tracking server it is the address itself. `output_dir` stands in where `uri` is empty.
    """
    uri = uri or default_uri(output_dir)
    if uri.startswith(("http://", "https://")):
        return uri
    return (
        "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "
        f"python -m mlflow server --backend-store-uri {shlex.quote(redacted(uri))} "
        "--no-serve-artifacts --host 127.0.0.1 --port 5000 --workers 1"
    )


def ui_link(base: str, experiment_id: str) -> str:
    """The experiment's runs as a table.

    Without these parameters a fresh browser lands on a traces page, and the order by creation folds
    all runs of a parent into one row.
    """
    order = quote("tags.`mlflow.runName`")
    return (
        f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?searchFilter=&orderByKey={order}"
        "&orderByAsc=true&workflowType=machine_learning"
    )


def ensure_store(uri: str, *, experiment: str, output_dir: Path | str) -> str:
    """Create database and MLflow experiment where they are missing; the experiment's id.

    Safe for any number of processes of this host: MLflow's own migration of a fresh sqlite crashes
    when two do it at once, so it runs under a file lock. Raises TrackingUnreachable, and
    ConfigError for a database that another MLflow version wrote.
    """
    from mlflow.exceptions import MlflowException

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _lock(uri, output_dir).acquire(timeout=300), _reachable(uri):
        try:
            client = _client(uri)
            return _ensure_experiment(client, experiment, uri=uri, output_dir=output_dir)
        except MlflowException as error:
            if "out-of-date database schema" in str(error):
                raise ConfigError(
                    f"tracking.uri must hold a database of the installed MLflow's version, got "
                    f"{redacted(uri)!r}; back it up, then run `mlflow db upgrade`, or name another"
                ) from None
            raise


def _ensure_experiment(client: MlflowClient, name: str, *, uri: str, output_dir: Path) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        server = uri.startswith(("http://", "https://"))
        artifacts = None if server else (output_dir.absolute() / "mlartifacts").as_uri()
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": f"Runs of {name}; rebuilt at any time from their events.jsonl.",
        }
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)
        except MlflowException as error:  # another host was faster
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _client(uri: str) -> MlflowClient:
    """A client of `uri`, with MLflow's telemetry, progress bars and chatter switched off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # A refused connection is retried for minutes by default; the follower has its own back-off.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _lock(uri: str, output_dir: Path) -> BaseFileLock:
    """One writer per store and host; beside a sqlite file, which two output folders may share."""
    from filelock import FileLock

    database = sqlite_path(uri)
    return FileLock(f"{database}.lock" if database else output_dir / "mlflow.lock")


@contextlib.contextmanager
def _reachable(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_outage(error):
            raise
        raise TrackingUnreachable(uri) from error


def _is_outage(error: BaseException) -> bool:
    """Whether the store is to blame, so that trying again later may help."""
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    codes = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED")
    return (
        isinstance(error, (RequestException, OperationalError, ConnectionError))
        or getattr(error, "error_code", None) in (*codes, "PERMISSION_DENIED")
        or str(error).startswith("API request to")
    )


@dataclass(kw_only=True, slots=True)
class _Position:
    """How much of a run one MLflow run has; a value in RUN_DIR/mlflow.json."""

    run: str
    """MLflow's id of the run."""
    offset: int = 0
    """Bytes of events.jsonl that were acknowledged."""
    time: float = 0.0
    """Of the newest event before `offset`."""
    last: dict[str, int] = field(default_factory=dict)
    """Metric key -> newest step logged. Steps of a key only grow within an attempt, and a resumed
    attempt repeats its predecessor's values, so a point at or before it is there already."""
    sending: bool = False
    """A batch was on its way when this was written: ask MLflow what arrived."""


@dataclass(kw_only=True, slots=True)
class _View:
    """What MLflow shows of a run, as far as we know."""

    run: str
    name: str | None
    status: str
    end_time: int | None
    tags: dict[str, str]
    params: set[str]
    last: dict[str, int]


@dataclass(kw_only=True, slots=True)
class _News:
    """What events.jsonl says that a position does not cover."""

    points: list[tuple[str, float, int, int]]
    """(key, value, timestamp in ms, step)."""
    tables: dict[str, list[dict[str, Any]]]
    position: _Position


def _positions(run: RunDir) -> dict[str, Any]:
    try:
        return json.loads(run.mlflow_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # damaged counts as missing: MLflow is asked
        return {}


def _save(run: RunDir, key: str, position: _Position) -> None:
    atomic.write_json(run.mlflow_path, {**_positions(run), key: dataclasses.asdict(position)})


def _events_after(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind it, event) of each complete line; a damaged line is passed over."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        file.seek(offset if offset <= path.stat().st_size else 0)
        offset = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with contextlib.suppress(ValueError):
                yield offset, json.loads(line)


def _news(run: RunDir, position: _Position) -> _News:
    after = dataclasses.replace(position, last=dict(position.last), sending=False)
    news = _News(points=[], tables={}, position=after)
    for after.offset, event in _events_after(run.events_path, position.offset):
        after.time = max(after.time, event["time"])
        for name, value in event["metrics"].items():
            key = _metric_key(name)
            if event["step"] > after.last.get(key, -1):
                after.last[key] = event["step"]
                news.points.append((key, float(value), int(event["time"] * 1000), event["step"]))
        if event["kind"] == "table":
            news.tables[event["data"]["name"]] = event["data"]["rows"]
    return news


def _metric_key(name: str) -> str:
    """`name` with what MLflow refuses in a key replaced: one odd key would block its whole run."""
    key = re.sub(r"[^\w/.\- :]", "_", name)
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))[:250]


def _table_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the UI's table view reads them; it leaves columns with a dotted name blank."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    finite = [[_json_cell(row.get(column)) for column in columns] for row in rows]
    return json.dumps({"columns": [c.replace(".", "_") for c in columns], "data": finite})


def _json_cell(value: Any) -> Any:
    """A browser refuses the NaN that Python writes."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _params(config: RunConfig) -> dict[str, str]:
    values = {"model.name": config.model.name, **scientific(config)}
    text = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in values.items()}
    return {k: v[:MAX_PARAM] for k, v in text.items() if values[k] is not None}


def _tags(run: RunDir, config: RunConfig, status: Status) -> dict[str, str]:
    records = run.attempt_records()
    tags: dict[str, Any] = {
        "kind": "run",
        "run_id": run.run_id,
        "arm": arm_id(config),
        "seed": config.seed,
        "method": config.method,
        **({"mode": config.relora.name} if config.method == "relora" else {}),
        "model": config.model.name,
        "state": status.state,
        "attempts": status.attempts,
        "host": status.host,
        "job_id": status.job_id,
        "error": status.error,
        "mlflow.source.name": "run.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": records[-1].get("commit") if records else None,
    }
    return {k: str(v)[:MAX_TAG] for k, v in tags.items() if v is not None and v != ""}


def _ended(status: Status, position: _Position) -> int:
    """When a run that is over ended, in ms: its last event, or the word that it failed after it."""
    seconds = position.time
    if status.state not in ("finished", "diverged") or not seconds:
        seconds = max(seconds, status.heartbeat) or time.time()
    return int(seconds * 1000)


def sync(
    runs: Sequence[RunDir],
    *,
    uri: str,
    experiment_id: str,
    output_dir: Path | str,
    names: Mapping[str, str] | None = None,
    parent: str | None = None,
    final: bool = False,
) -> SyncReport:
    """Bring `runs` in MLflow up to date with their run directories; repeating it changes nothing.

    `names` (run_id -> name) renames; `parent` is MLflow's id of the run to nest under. While
    another process syncs into the same store nothing is done (`busy`), unless `final`: then it is
    awaited. A run that cannot be synced is in `errors`; a store that does not answer raises
    TrackingUnreachable.
    """
    syncer = Syncer(uri, experiment_id=experiment_id, output_dir=output_dir)
    syncer.names, syncer.parent = dict(names or {}), parent
    return syncer.sync(runs, final=final)


class Syncer:
    """`sync`, repeated: remembers what MLflow shows, so that no news costs no request."""

    def __init__(self, uri: str, *, experiment_id: str, output_dir: Path | str) -> None:
        self.names: dict[str, str] = {}
        self.parent: str | None = None
        self._uri = uri
        self._experiment_id = experiment_id
        self._lock = _lock(uri, Path(output_dir))
        database = sqlite_path(uri)
        self._key = f"{f'sqlite:///{database}' if database else redacted(uri)}#{experiment_id}"
        self._client = _client(uri)
        self._views: dict[str, _View] | None = None
        self._colours: dict[str, str] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._failed: set[str] = set()

    def sync(self, runs: Sequence[RunDir], *, final: bool = False) -> SyncReport:
        """One pass; see the function of the same name."""
        from filelock import Timeout

        report = SyncReport()
        if final:  # a run that failed is tried again only with news, or now
            for name in self._failed:
                self._seen.pop(name, None)
        news = [(run, mark) for run in runs if (mark := _mark(run)) != self._seen.get(run.run_id)]
        if not news:
            return report
        try:
            with self._lock.acquire(timeout=600 if final else 0), _reachable(self._uri):
                for run, mark in news:
                    self._try_run(run, mark, report)
        except Timeout:
            report.busy = True
        return report

    def _try_run(self, run: RunDir, mark: tuple[int, ...], report: SyncReport) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._sync_run(run, report)
            self._failed.discard(run.run_id)
        except Exception as error:
            if _is_outage(error) or isinstance(error, MlflowException):
                self._views = None  # a request may have arrived although it failed: look again
            if _is_outage(error):
                raise
            line = next(iter(str(error).splitlines()), "")
            report.errors[run.run_id] = f"{type(error).__name__}: {line}"[:300]
            self._failed.add(run.run_id)
        self._seen[run.run_id] = mark

    def _sync_run(self, run: RunDir, report: SyncReport) -> None:
        config, status = run.config(), run.status()  # before the events: what it says is in them
        tags = _tags(run, config, status)
        view, position = self._open(run, tags, report)
        tags["mlflow.runColor"] = self._colour(tags["arm"])
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent
        news = _news(run, position)
        if news.points:
            _save(run, self._key, dataclasses.replace(position, sending=True))
        self._log_batches(view, news.points, params=_params(config), tags=tags)
        self._log_tables(view, news.tables)
        if news.position != position:
            _save(run, self._key, news.position)
            view.last = dict(news.position.last)
        self._set_status(view, status, news.position)
        name = self.names.get(run.run_id)
        if name and name != view.name:
            self._client.update_run(view.run, name=name)
            view.name = name
        report.points += len(news.points)
        report.tables += len(news.tables)

    def _open(
        self, run: RunDir, tags: dict[str, str], report: SyncReport
    ) -> tuple[_View, _Position]:
        """The run in MLflow, made where there is none, and how much of the record it has."""
        raw = _positions(run).get(self._key)
        position = _Position(**raw) if raw else None
        view = self._find(run, position)
        if view is None:
            view = self._create(run, tags)
            position = _Position(run=view.run)
            _save(run, self._key, position)
            report.created += 1
        elif position is None or position.run != view.run:
            position = _Position(run=view.run, last=dict(view.last))
        elif position.sending:
            position.last = {**position.last, **_view(self._client.get_run(view.run)).last}
        self._known()[run.run_id] = view
        return view, position

    def _find(self, run: RunDir, position: _Position | None) -> _View | None:
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
        return _view(found) if found.info.lifecycle_stage == "active" else known

    def _known(self) -> dict[str, _View]:
        """run_id -> what MLflow shows of it. The oldest one counts where there are several."""
        if self._views is None:
            self._views = {}
            for run in self._search():
                self._views.setdefault(run.data.tags.get("run_id", ""), _view(run))
                tags = run.data.tags
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

    def _create(self, run: RunDir, tags: dict[str, str]) -> _View:
        # MLflow never changes a start: made while planned, a run's duration includes its wait.
        first = next(run.raw_events(), None)
        started = int(first["time"] * 1000) if first else None
        config = run.config()
        name = self.names.get(run.run_id) or f"{label(config)}-s{config.seed}"
        made = self._client.create_run(
            self._experiment_id, start_time=started, tags=tags, run_name=name
        )
        return _view(made)

    def _colour(self, arm: str) -> str:
        """The arm's colour in this experiment; a new arm takes the one least used."""
        if arm not in self._colours:
            used = Counter(self._colours.values())
            self._colours[arm] = min(PALETTE, key=lambda colour: used[colour])
        return self._colours[arm]

    def _log_batches(
        self,
        view: _View,
        points: Sequence[tuple[str, float, int, int]],
        *,
        params: dict[str, str],
        tags: dict[str, str],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        new_params = [Param(k, v) for k, v in params.items() if k not in view.params]
        new_tags = [RunTag(k, v) for k, v in tags.items() if view.tags.get(k) != v]
        if new_params or new_tags:
            self._client.log_batch(view.run, params=new_params, tags=new_tags)
        for key in ("error", "job_id"):  # of an attempt before this one
            if key in view.tags and key not in tags:
                self._client.delete_tag(view.run, key)
                del view.tags[key]
        view.params |= set(params)
        view.tags |= tags
        for start in range(0, len(points), MAX_METRICS):
            chunk = [Metric(*point) for point in points[start : start + MAX_METRICS]]
            self._client.log_batch(view.run, metrics=chunk)

    def _log_tables(self, view: _View, tables: Mapping[str, list[dict[str, Any]]]) -> None:
        """Each table as an artifact in the place of its predecessor, to which log_table appends."""
        if not tables:
            return
        listed = json.loads(view.tags.get("mlflow.loggedArtifacts", "[]"))
        for name, rows in tables.items():
            path = f"tables/{_metric_key(name)}.json"
            self._client.log_text(view.run, _table_json(rows), path)
            listed.append({"path": path, "type": "table"})
        unique = json.dumps(list({entry["path"]: entry for entry in listed}.values()))
        if unique != view.tags.get("mlflow.loggedArtifacts"):
            self._client.set_tag(view.run, "mlflow.loggedArtifacts", unique)
            view.tags["mlflow.loggedArtifacts"] = unique

    def _set_status(self, view: _View, status: Status, position: _Position) -> None:
        wanted = MLFLOW_STATUS[status.state]
        if wanted not in TERMINAL:
            if view.status != wanted:
                self._client.update_run(view.run, status=wanted)
                view.status = wanted
            return
        ended = _ended(status, position)
        if (view.status, view.end_time) != (wanted, ended):
            self._client.set_terminated(view.run, status=wanted, end_time=ended)
            view.status, view.end_time = wanted, ended


def _mark(run: RunDir) -> tuple[int, ...]:
    """Changes when the run has news."""
    mark = []
    for path in (run.events_path, run.status_path):
        try:
            stat = path.stat()
            mark += [stat.st_size, stat.st_mtime_ns]
        except FileNotFoundError:
            mark += [-1, -1]
    return tuple(mark)


def _view(run: Run) -> _View:
    latest = run.data.to_proto().metrics  # of each key the point with the largest step
    return _View(
        run=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        end_time=run.info.end_time,
        tags=dict(run.data.tags),
        params=set(run.data.params),
        last={metric.key: metric.step for metric in latest},
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Follower:
    """Keeps MLflow up to date from a child process while the body of its `with` block runs.

    The child ends after a last pass when the block ends or this process dies. Nothing that MLflow
    or its server does raises here: `warn` gets at most one line, and `python -m sweeps sync` can
    repair all of it later. The child's own words are in <output_dir>/logs/mlflow-sync.log.
    """

    def __init__(
        self,
        runs: Sequence[RunDir],
        *,
        uri: str,
        experiment: str,
        output_dir: Path | str,
        names: Mapping[str, str] | None = None,
        parent: str | None = None,
        every_s: float = 3.0,
        final_timeout_s: float = 120.0,
        warn: Callable[[str], None] = _to_stderr,
    ) -> None:
        self._uri = uri
        self._output_dir = Path(output_dir).absolute()
        self._spec = {
            "runs": [str(run.path.absolute()) for run in runs],
            "names": dict(names or {}),
            "uri": uri,
            "experiment": experiment,
            "output_dir": str(self._output_dir),
            "parent": parent,
            "every_s": every_s,
        }
        self._final_timeout_s = final_timeout_s
        self._warn = warn
        self._child: subprocess.Popen[str] | None = None
        self._settled = threading.Event()
        self._experiment_id: str | None = None
        self._problem: str | None = None

    def __enter__(self) -> Follower:
        logs = self._output_dir / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / "mlflow-sync.log", "a", encoding="utf-8") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "experiments.mlflow_sync"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_child_environment(),
                    start_new_session=True,  # Ctrl-C is for the runs; a last pass follows
                )
        except OSError as error:
            self._problem = f"tracking: the sync could not start ({error})"
            self._settled.set()
            return self
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        with contextlib.suppress(BrokenPipeError):
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(self._spec) + "\n")
            self._child.stdin.flush()
        return self

    def wait_ready(self, timeout: float) -> str | None:
        """The MLflow experiment's id once the store stands.

        None where the first try failed (later ones go on) or nothing came within `timeout` s.
        """
        self._settled.wait(timeout)
        return self._experiment_id

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._finish(self._child)
        if self._problem:
            self._warn(self._problem)

    def _finish(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        try:
            code = child.wait(self._final_timeout_s)
            self._listener.join(5)
            if code and not self._problem:
                log = self._output_dir / "logs" / "mlflow-sync.log"
                self._problem = (
                    f"tracking: the sync ended with code {code} (see {log}); nothing is lost, "
                    "run `python -m sweeps sync` later"
                )
        except subprocess.TimeoutExpired:
            self._problem = str(TrackingUnreachable(self._uri))
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            self._listener.join(5)
            child.stdout.close()

    def _listen(self) -> None:
        """Take the child's words: `ready ID` or `waiting`, and at its end `problem LINE`."""
        assert self._child is not None
        assert self._child.stdout is not None
        for line in self._child.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "ready":
                self._experiment_id = rest
            elif word == "problem":
                self._problem = rest
            self._settled.set()
        self._settled.set()


def follow(
    runs: Sequence[RunDir], *, config: RunConfig, names: Mapping[str, str] | None = None
) -> Follower:
    """A Follower of runs that are tracked as `config` says."""
    return Follower(
        runs,
        names=names,
        uri=store_uri(config),
        experiment=experiment_name(config),
        output_dir=config.output_dir,
    )


def _child_environment() -> dict[str, str]:
    """Ours, with this checkout first on the path, so that the child runs the same code anywhere."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def main() -> int:
    """The Follower's child: a spec on stdin's first line, then passes until stdin is closed."""
    spec = json.loads(sys.stdin.readline())
    os.nice(10)
    words, sys.stdout = sys.stdout, sys.stderr  # stdout speaks to the parent; libraries print too
    closed = threading.Event()

    def until_eof() -> None:
        sys.stdin.read()
        closed.set()

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is dead; the last pass still counts
            print(line, file=words, flush=True)

    threading.Thread(target=until_eof, daemon=True).start()
    problem = _follow(spec, closed=closed, say=say)
    if problem:
        say(f"problem {problem}")
    return 1 if problem else 0


def _follow(
    spec: dict[str, Any], *, closed: threading.Event, say: Callable[[str], None]
) -> str | None:
    """Pass after pass until `closed`, then a last one, tried twice; what is wrong after that."""
    runs = [RunDir(path) for path in spec["runs"]]
    syncer: Syncer | None = None
    pause, tries = spec["every_s"], 0
    while True:
        final = closed.is_set()
        tries += final
        try:
            if syncer is None:
                syncer = _start(spec, say)
            report = syncer.sync(runs, final=final)
            problem = _complaint(report, total=len(runs))
            pause = spec["every_s"]
        except Exception as error:  # whatever it is: the runs go on, and the next pass may succeed
            print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            known = isinstance(error, (TrackingUnreachable, ConfigError))
            problem = str(error) if known else str(TrackingUnreachable(spec["uri"]))
            pause = min(60.0, 2 * pause)
            if syncer is None:
                say("waiting")
        if final and (problem is None or tries == 2):
            return problem
        if final:
            time.sleep(1.0)
        closed.wait(pause)


def _start(spec: dict[str, Any], say: Callable[[str], None]) -> Syncer:
    uri, output_dir = spec["uri"], spec["output_dir"]
    experiment_id = ensure_store(uri, experiment=spec["experiment"], output_dir=output_dir)
    syncer = Syncer(uri, experiment_id=experiment_id, output_dir=output_dir)
    syncer.names, syncer.parent = spec["names"], spec["parent"]
    say(f"ready {experiment_id}")
    return syncer


def _complaint(report: SyncReport, *, total: int) -> str | None:
    if report.busy:
        return "tracking: another sync holds the store, run `python -m sweeps sync` later"
    if not report.errors:
        return None
    for name, line in report.errors.items():
        print(f"{name}: {line}", file=sys.stderr)
    name, line = next(iter(report.errors.items()))
    return f"tracking: {len(report.errors)} of {total} runs not synced ({name}: {line})"


if __name__ == "__main__":
    raise SystemExit(main())

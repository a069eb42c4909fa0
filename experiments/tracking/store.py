"""Tracking stores: opening, migrating, locking and moving them, and when they do not answer.

Loads MLflow only to connect. Not for: addresses (`experiments/addresses.py`), nor for what is
written (`content.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import re
import shlex
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from experiments.addresses import (
    LOGIN,
    PASSWORD,
    check_uri,
    default_uri,
    experiment_name,
    misplaced_note,
    read_only,
    redacted,
    relative_database,
    rooted,
    sqlite_path,
    sqlite_uri,
    store_uri,
    with_password,
)
from relora_core import shared
from relora_core.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow import MlflowClient
    from mlflow.entities import Run


ARTIFACTS = {"experiments": "artifact_location", "runs": "artifact_uri"}
ARTIFACTS |= {"logged_models": "artifact_location"}
"""Tables of MLflow's database -> their column with locations of files."""
DAMAGED = re.compile(
    r"file is not a database|disk image is malformed|no such (table|column): [\w.]+|"
    r"has no column named \w+|Can't locate revision identified by '\w+'"
)
"""Messages of databases that are damaged, or that a newer MLflow wrote."""
REFUSED = re.compile(
    r"error code (40[13])|(password authentication failed|no password supplied|Access denied for "
    r"user|Login failed for user)"
)
"""Messages of servers and databases that refuse a login."""
VARIABLES = {"uri": "MLFLOW_TRACKING_URI", "experiment": "MLFLOW_EXPERIMENT_NAME"}
"""Key of `tracking` -> MLflow's own variable, which is used if the key is not set."""
MAX_NAME = 500
"""Characters of an MLflow experiment's name."""


class TrackingUnreachable(RuntimeError):
    """The store cannot be used; the message says why, that nothing is lost, and what to do."""

    def __init__(self, why: str, *, then: str = "run `python -m sweeps sync` later") -> None:
        super().__init__(f"tracking: {why}; nothing is lost, {then}")

    @classmethod
    def silent(cls, uri: str) -> TrackingUnreachable:
        """Of a store that does not answer."""
        return cls(f"{redacted(uri)} unreachable")


def fill_from_environment(config: RunConfig, *, notes: list[str] | None = None) -> RunConfig:
    """The config, with gaps in its `tracking` filled from MLflow's environment variables.

    Appends to `notes` what they set, and whether the store is of another MLflow version.
    """
    tracking, lines = config.tracking, []
    if not tracking.enabled:
        return config
    for key, variable in VARIABLES.items():
        value = os.environ.get(variable, "").strip()
        if not value or getattr(tracking, key) is not None:
            continue
        tracking = dataclasses.replace(tracking, **{key: value})
        try:
            check_uri(tracking)
        except ConfigError as error:
            line = str(error).replace("tracking.uri", variable)
            raise ConfigError(f"{line}; or unset it, tracking.uri goes before it") from None
        lines.append(f"tracking.{key}={value} (the environment's {variable})")
    config = dataclasses.replace(config, tracking=tracking)
    if notes is not None:
        lines += filter(None, [schema_note(sqlite_path(store_uri(config)))])
        notes += [line for line in lines if line not in notes]
    return config


def schema_note(database: Path | None) -> str | None:
    """A line if a database has the schema of another MLflow version; loads no MLflow."""
    if database is None or not database.is_file():
        return None
    try:
        address = f"file:{quote(str(database))}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as there:
            (revision,) = there.execute("select version_num from alembic_version").fetchone()
    except (sqlite3.Error, TypeError):  # not made yet, or damaged: opening it reports that
        return None
    revisions, newest = _revisions()
    if not revisions or revision == newest:
        return None
    older, here = revision in revisions, shlex.quote(sqlite_uri(database))
    way = f"`mlflow db upgrade {here}` (keep a copy)" if older else "MLflow is upgraded"
    return (
        f"tracking: {database} was written by {'an older' if older else 'a newer'} MLflow (schema "
        f"{revision}, this one's is {newest}) and shows nothing new until {way}, or tracking.uri "
        "names another; the runs' records lose nothing"
    )


@functools.cache
def _revisions() -> tuple[set[str], str]:
    """All schemas that the installed MLflow can migrate, and its current one."""
    spec = importlib.util.find_spec("mlflow")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    before: dict[str, str] = {}
    for file in folder.glob("store/db_migrations/versions/*.py"):
        text = file.read_text(encoding="utf-8")
        named = dict(re.findall(r"^(revision|down_revision) = [\"'](\w+)[\"']", text, re.MULTILINE))
        if "revision" in named:
            before[named["revision"]] = named.get("down_revision", "")
    newest = set(before) - set(before.values())
    return (set(before), newest.pop()) if len(newest) == 1 else (set(), "")


def check(config: RunConfig) -> None:
    """ConfigError if MLflow would refuse the store or the experiment's name."""
    check_uri(config.tracking)
    name = experiment_name(config)
    if config.tracking.enabled and len(name) > MAX_NAME:
        key = "tracking.experiment" if config.tracking.experiment else "sweep.name"
        raise ConfigError(
            f"{key} must be at most {MAX_NAME} characters for MLflow, got {len(name)}; nearest "
            f"valid: tracking.experiment={name[:40].strip()!r}"
        )


def move_artifacts(output_dir: Path | str, *, database: Path | None = None) -> None:
    """Correct the paths in an output folder's database after the folder was moved or copied.

    MLflow stores absolute paths of runs' folders and has no call to change them. `database`: a copy
    of the folder's own.
    """
    folder = rooted(Path(output_dir))
    database, new = database or folder / "mlflow.db", folder / "mlartifacts"
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as db, db:
        try:
            rows = db.execute(
                "SELECT artifact_location FROM experiments UNION SELECT DISTINCT "
                "substr(artifact_uri, 1, length(artifact_uri) - length(run_uuid) - 11) FROM runs"
            ).fetchall()
        except sqlite3.Error:  # damaged, or not MLflow's: opening it reports that
            return
        for (old,) in rows:
            place = Path(unquote(urlsplit(old or "").path))
            if (
                not str(old).startswith("file:///")
                or place.name != "mlartifacts"
                or _same(place, new)
            ):
                continue
            ours = _OURS if os.path.exists(place) else "1"
            _mark_ours(db, folder)
            for table, column in ARTIFACTS.items():
                run = {"runs": "run_uuid", "logged_models": "source_run_id"}.get(table)
                db.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE ({column} = ? OR substr({column}, 1, ?) = ?)"
                    + (f" AND {ours.format(run=run)}" if run else ""),
                    (new.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


_OURS = "{run} IN (SELECT run_uuid FROM tags JOIN ours USING (key, value))"
"""Condition for the folder's own runs: a copied database may hold another folder's, too."""


def _mark_ours(db: sqlite3.Connection, folder: Path) -> None:
    """Make a table of the tags that runs, and summaries of sweeps, of this folder have."""
    db.execute("CREATE TEMP TABLE IF NOT EXISTS ours (key, value, PRIMARY KEY (key, value))")
    for key, place in (("run_id", "runs"), ("sweep", "sweeps")):
        names = [(key, path.name) for path in (folder / place).glob("*")]
        db.executemany("INSERT OR IGNORE INTO ours VALUES (?, ?)", names)


def _same(one: Path, other: Path) -> bool:
    """Whether both are in one folder; they themselves need not exist."""
    with contextlib.suppress(OSError):
        return one.parent.samefile(other.parent)
    return False


@contextlib.contextmanager
def readable(uri: str, *, output_dir: Path | str) -> Iterator[str]:
    """The store's address, or that of a copy if we may only read it.

    MLflow opens no database that it cannot write to.
    """
    database = sqlite_path(uri)
    line = read_only(database) if database else None
    if database is None or line is None:
        yield uri
        return
    print(f"note: {line}; these pages show a copy as it is now", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="relora-ui-") as scratch:
        copy = Path(scratch) / "mlflow.db"
        with reachable(uri):
            _copy(database, copy)
        if uri == default_uri(output_dir):
            move_artifacts(output_dir, database=copy)
        yield sqlite_uri(copy)


def _copy(database: Path, copy: Path) -> None:
    """Copy a database as it is now, even from a folder where SQLite can make no file."""
    for how in ("mode=ro", "immutable=1"):
        address = f"file:{quote(str(database))}?{how}"
        try:
            with (
                contextlib.closing(sqlite3.connect(address, uri=True)) as old,
                contextlib.closing(sqlite3.connect(copy)) as new,
            ):
                old.backup(new)
                return
        except sqlite3.OperationalError:
            if how == "immutable=1":
                raise


@dataclass(kw_only=True, slots=True)
class Store:
    """One MLflow experiment of a tracking store, as an output folder writes to it."""

    uri: str
    experiment_id: str
    output_dir: Path
    client: MlflowClient

    @property
    def key(self) -> str:
        """The key in a run's `mlflow.json` under which its Position in this store is."""
        database = sqlite_path(self.uri)
        address = sqlite_uri(database) if database else redacted(self.uri)
        return f"{address}#{self.experiment_id}"

    @property
    def own(self) -> bool:
        """Whether it is the output folder's own database: only there a path tells whose a run is.

        Into another store several machines may write from folders at one path.
        """
        return self.uri == default_uri(self.output_dir)

    @contextlib.contextmanager
    def writing(self, *, wait_s: float) -> Iterator[None]:
        """Keep other writers of this host out, see `lock`.

        Raises filelock's Timeout if another one writes for longer than `wait_s` seconds, and
        TrackingUnreachable if the store does not answer.
        """
        with lock(self.uri, self.output_dir).acquire(timeout=wait_s), reachable(self.uri):
            yield

    def search(self, filter_string: str) -> list[Run]:
        """Its runs, oldest first; the order is the same on every host."""
        token, runs = None, []
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                filter_string=filter_string,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def open_store(uri: str, *, experiment: str, output_dir: Path | str) -> Store:
    """Open a store; database and MLflow experiment are made if they are missing.

    Under a file lock: MLflow crashes if two processes migrate one SQLite file. Raises
    TrackingUnreachable, filelock's Timeout if another process holds the lock for long, and
    ConfigError for a database of another MLflow version.
    """
    from mlflow.exceptions import MlflowException

    if relative_database(uri):  # from an earlier version; today's configs hold absolute addresses
        raise TrackingUnreachable(
            f"tracking.uri={uri} was written down as it was typed, and {sqlite_path(uri)} does not "
            "exist",
            then="`python -m sweeps sync --tracking-uri sqlite:////FOLDER/FILE.db` names the "
            "database, or makes it anew",
        )
    output_dir = Path(output_dir)
    shared.make_folder(output_dir)
    if line := misplaced_note(uri):
        print(f"note: {line}", file=sys.stderr)
    with lock(uri, output_dir).acquire(timeout=300), reachable(uri):
        if uri == default_uri(output_dir):
            move_artifacts(output_dir)
        try:
            _prepare(sqlite_path(uri))
            client = connect(uri)
            id_ = _ensure_experiment(client, experiment, uri=uri, output_dir=output_dir)
        except MlflowException as error:
            if "out-of-date database schema" in str(error):
                raise ConfigError(
                    schema_note(sqlite_path(uri))
                    or f"tracking.uri must hold a database of the installed MLflow's version, got "
                    f"{redacted(uri)!r}; back it up, then run `mlflow db upgrade`, or name another"
                ) from None
            raise
    return Store(uri=uri, experiment_id=id_, output_dir=output_dir, client=client)


def _prepare(database: Path | None) -> None:
    """Make the file writable for the group; SQLite gives the files beside it the same mode."""
    if database is None or not database.parent.is_dir():
        return
    if database.exists():
        shared.share(database)
    else:
        shared.touch(database)


def _ensure_experiment(client: MlflowClient, name: str, *, uri: str, output_dir: Path) -> str:
    """The id of the MLflow experiment `name`, which is made or restored if need be."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        server = uri.startswith(("http://", "https://"))
        artifacts = None if server else (output_dir.absolute() / "mlartifacts").as_uri()
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": f"Runs of {name}; rebuilt at any time from their events.jsonl.",
        }
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)
        except MlflowException as error:  # another host was faster
            experiment = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def connect(uri: str) -> MlflowClient:
    """A client of `uri`, with MLflow's telemetry, progress bars and messages switched off."""
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
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # logs what it raises
    return MlflowClient(tracking_uri=with_password(uri))


def lock(uri: str, output_dir: Path) -> BaseFileLock:
    """The lock for writing into a store, one per host. TrackingUnreachable if we may not
    write.

    It is beside a SQLite file, which two output folders may share, else in the output folder.
    """
    from filelock import FileLock

    database = sqlite_path(uri)
    path = Path(f"{database}.lock") if database else output_dir / "mlflow.lock"
    _refuse_read_only(database)
    if not path.exists():  # filelock would make it without rights for the group
        with contextlib.suppress(OSError):
            shared.touch(path)
    return FileLock(path)


def problem(uri: str, error: Exception) -> str:
    """One line on an error that keeps a store from being up to date."""
    if isinstance(error, (TrackingUnreachable, ConfigError)):
        return str(error)
    line = next(iter(str(error).splitlines()), "")
    what = f"{type(error).__name__}: {redacted(line)}"[:300]
    return (
        f"tracking: {redacted(uri)} was not brought up to date ({what}); nothing is lost, "
        "run `python -m sweeps sync` later"
    )


@contextlib.contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Turn errors of a store that does not answer into TrackingUnreachable, without passwords."""
    try:
        yield
    except Exception as error:
        if match := DAMAGED.search(str(error)):
            raise TrackingUnreachable(
                f"{redacted(uri)} cannot be used ({match[0]})",
                then="move the database away and run `python -m sweeps sync`",
            ) from error
        if reason := _refusal(error):
            web = uri.startswith(("http://", "https://"))
            held = f"{LOGIN}, or MLFLOW_TRACKING_TOKEN, hold" if web else f"{PASSWORD} holds"
            raise TrackingUnreachable(
                f"login refused by {redacted(uri)} ({reason}); the environment's {held} it",
                then="run `python -m sweeps sync` then",
            ) from error
        if not is_outage(error):
            raise
        _refuse_read_only(sqlite_path(uri))
        raise TrackingUnreachable.silent(uri) from error


def _refuse_read_only(database: Path | None) -> None:
    """A database of another user can be read, but not written to."""
    if database and (line := read_only(database)):
        raise TrackingUnreachable(
            line, then="who may write there runs `python -m sweeps sync` later"
        )


def _refusal(error: BaseException) -> str | None:
    """Why a login was refused, in a few words; None if it was not."""
    codes = {"UNAUTHENTICATED": "401", "PERMISSION_DENIED": "403"}
    if code := codes.get(getattr(error, "error_code", "")):
        return code
    match = REFUSED.search(str(error)) if is_outage(error) else None
    return match and (match[1] or match[2])


def is_outage(error: BaseException) -> bool:
    """Whether the store failed, so that trying again later may help."""
    from filelock import Timeout
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    codes = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED")
    return (
        isinstance(error, (RequestException, OperationalError, ConnectionError, Timeout))
        or getattr(error, "error_code", None) in (*codes, "PERMISSION_DENIED")
        or str(error).startswith("API request to")
    )

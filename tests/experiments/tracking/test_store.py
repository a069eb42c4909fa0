"""Addresses that cannot work are refused in one line; a store is made once, whoever asks."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow_runs import Store, a_config, a_run, expected, train

from experiments import addresses
from experiments.addresses import check_uri, default_uri
from experiments.tracking import links
from experiments.tracking import store as mlflow_store
from experiments.tracking.runs import Syncer
from experiments.tracking.store import TrackingUnreachable, connect, open_store
from relora_core.config import ConfigError, SweepConfig, TrackingConfig
from tests.ports import free_port


def test_the_experiment_is_found_again_also_after_it_was_deleted(store: Store) -> None:
    assert store.experiment("twice") == store.experiment("twice")
    store.client.delete_experiment(store.experiment("twice"))
    again = store.client.get_experiment(store.experiment("twice"))
    assert again.lifecycle_stage == "active"


def test_a_store_that_another_sync_holds_is_not_called_unreachable(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = FileLock.acquire
    monkeypatch.setattr(FileLock, "acquire", lambda lock, timeout=0: acquire(lock, timeout=0))
    with mlflow_store.lock(store.uri, store.folder), pytest.raises(Timeout):
        store.experiment("x")


def test_a_store_that_does_not_answer_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingUnreachable, match="nothing is lost"):
        open_store(uri, experiment="x", output_dir=tmp_path)
    with pytest.raises(TrackingUnreachable, match="nothing is lost"):
        Syncer(
            mlflow_store.Store(uri=uri, client=connect(uri), experiment_id="1", output_dir=tmp_path)
        ).sync([run])


AT_ONCE = """if True:
    import multiprocessing, sys
    import mlflow.store.tracking.sqlalchemy_store  # once, not in each process
    from experiments.addresses import default_uri
    from experiments.tracking.store import open_store
    from experiments.tracking.runs import Syncer
    from experiments.disk.output_dir import all_runs

    out = sys.argv[1]
    runs, uri = list(all_runs(out)), default_uri(out)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(runs), timeout=60)

    def one(run):
        barrier.wait()
        store = open_store(uri, experiment="x", output_dir=out)
        barrier.wait()
        report = Syncer(store).sync([run], final=True)
        sys.exit(report.created != 1 or bool(report.errors))

    workers = [context.Process(target=one, args=[run]) for run in runs]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    sys.exit(any(worker.exitcode for worker in workers))
"""


@pytest.mark.slow
def test_six_processes_share_a_fresh_store(tmp_path: Path) -> None:
    """All make it at once; then all begin to show their runs at once."""
    runs = [a_run(tmp_path, seed=seed) for seed in range(6)]
    for run in runs:
        train(run, attempt=1, start=0, stop=40, state="finished")
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    there = Store(tmp_path)
    assert len(there.client.search_experiments(filter_string="name = 'x'")) == 1
    there.experiment_id = there.experiment("x")
    assert len(there.client.search_runs([there.experiment_id])) == 6
    assert all(there.points(run) == expected(run) for run in runs)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://x", ["ftp://x", "sqlite://", "postgresql://", "https://", "Did you mean 'http'"]),
        ("sqlit:///x.db", ["Did you mean 'sqlite'"]),
        ("mlruns", ["'mlruns'", "sqlite:///mlruns/mlflow.db"]),
        ("file:./mlruns", ["sqlite:///./mlruns/mlflow.db"]),
        ("file:///tmp/mlruns", ["sqlite:////tmp/mlruns/mlflow.db"]),
        ("sqlite:/x.db", ["nearest valid: sqlite:///x.db"]),
        ("sqlite:///~/x.db", [f"nearest valid: sqlite:///{Path.home()}/x.db"]),
        ("sqlite://", ["sqlite:///mlflow.db"]),
        ("sqlite:///:memory:", ["database file"]),
        ("sqlite:////nowhere/x.db", ["/nowhere does not exist"]),
        ("http://", ["name a host"]),
        ("postgresql+nodriver://u:secret@db/x", ["nodriver", "u:***@db"]),
    ],
)
def test_an_address_that_cannot_work_is_refused_in_one_line(uri: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_uri(TrackingConfig(enabled=True, uri=uri))
    line = str(caught.value)
    assert line.startswith("tracking.uri ")
    assert "\n" not in line
    assert "secret" not in line
    for word in words:
        assert word in line


def test_good_addresses_pass(tmp_path: Path) -> None:
    for uri in (None, f"sqlite:///{tmp_path}/x.db", "http://127.0.0.1:5000", "https://host/path"):
        check_uri(TrackingConfig(enabled=True, uri=uri))
    check_uri(TrackingConfig(enabled=False, uri="ftp://x"))
    folder = f"sqlite:///{tmp_path}"
    with pytest.raises(ConfigError, match="got the folder"):
        check_uri(TrackingConfig(enabled=True, uri=folder))


def test_the_experiment_is_named_after_the_nearest_of_its_names() -> None:
    config = a_config()
    config.experiment = "demo"
    assert addresses.experiment_name(config) == "demo"
    config.sweep = SweepConfig(name="ranks")
    assert addresses.experiment_name(config) == "ranks"
    config.tracking = TrackingConfig(experiment="mine")
    assert addresses.experiment_name(config) == "mine"


def test_the_way_to_the_ui_is_one_command_and_links_lead_to_the_runs() -> None:
    assert addresses.ui_command("outputs", sweep="ranks") == "python -m sweeps ui ranks"
    command = addresses.ui_command("out puts")
    assert command == "python -m sweeps ui --output-dir 'out puts'"
    link = links.ui_link("http://127.0.0.1:5000/", "7")
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert "workflowType=machine_learning" in link
    assert "start_time" not in link


ODD = [
    "a%20b",
    "a b",
    "%2F..%2Fup",
    "100%",
    "a#b",
    "a?b=c",
    "a&b+c;d",
    "über 日",
    "a'b\"c",
    "a:b@c",
]
ODD += ["a%%20b", "%25", "~a"]


@pytest.mark.parametrize("name", ODD)
def test_database_and_artifacts_lie_in_the_output_folder(
    migrated: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "here" / name
    out.mkdir(parents=True)
    shutil.copy(migrated, out / "mlflow.db")
    uri = default_uri(out)
    run = a_run(out)
    train(run, attempt=1, start=0, stop=20, state="finished")
    stores = [open_store(uri, experiment="x", output_dir=out) for _ in range(2)]
    (id_,) = {store.experiment_id for store in stores}
    assert not Syncer(stores[0]).sync([run]).errors
    client = MlflowClient(uri)
    (tracked,) = client.search_runs([id_])
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == [name]
    listed = {one.path for one in client.list_artifacts(tracked.info.run_id)}
    folder = out / "mlartifacts" / tracked.info.run_id / "artifacts"
    assert listed == {path.name for path in folder.iterdir()} != set()
    assert addresses.sqlite_path(uri) == out / "mlflow.db"


def test_a_database_that_an_earlier_version_misplaced_is_said_and_left(
    migrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b").mkdir()
    shutil.copy(migrated, tmp_path / "a b" / "mlflow.db")
    out = tmp_path / "a%20b"
    run = a_run(out)
    train(run, attempt=1, start=0, stop=20)
    old = f"sqlite:///{out}/mlflow.db"
    shown = {"experiment": "x", "output_dir": out}
    Syncer(open_store(old, **shown)).sync([run])
    assert not (out / "mlflow.db").exists()
    before = (tmp_path / "a b" / "mlflow.db").read_bytes()
    uri = default_uri(out)
    assert (addresses.misplaced_note(uri) or "").startswith(f"an earlier version kept {out}")
    shutil.copy(migrated, out / "mlflow.db")
    there = open_store(uri, **shown)
    Syncer(there).sync([run])
    (tracked,) = MlflowClient(uri).search_runs([there.experiment_id])
    assert tracked.data.metrics["train/loss"]
    assert (tmp_path / "a b" / "mlflow.db").read_bytes() == before


@pytest.mark.parametrize("key", ["tracking.experiment", "sweep.name"])
def test_a_name_that_mlflow_would_refuse_after_training_is_refused_before(key: str) -> None:
    config = a_config()
    config.tracking.enabled = True
    section, _, name = key.partition(".")
    for length in (500, 501):
        setattr(getattr(config, section), name, "x" * length)
        if length == 500:
            mlflow_store.check(config)
    with pytest.raises(ConfigError, match=f"^{key} must be at most 500 .* got 501; nearest valid"):
        mlflow_store.check(config)
    config.tracking.enabled = False
    mlflow_store.check(config)


# a login that is refused ------------------------------------------------------------------------
@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server with one answer to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, "You are not authenticated. Please see https://www.mlflow.org/docs"),
        (401, '{"error_code": "UNAUTHENTICATED", "message": "who are you"}'),
        (403, "Permission denied"),
        (403, "<html>a proxy's page</html>"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "not yours"}'),
    ],
)
def test_a_refused_login_is_called_one_and_names_the_variables(
    status: int, body: str, tmp_path: Path
) -> None:
    with answering(status, body) as uri, pytest.raises(TrackingUnreachable) as caught:
        open_store(uri, experiment="x", output_dir=tmp_path)
    line = str(caught.value)
    assert line.startswith(f"tracking: login refused by {uri} ({status}); ")
    for variable in ("USERNAME", "PASSWORD", "TOKEN"):
        assert f"MLFLOW_TRACKING_{variable}" in line
    assert "\n" not in line
    assert "nothing is lost" in line
    assert "unreachable" not in line


def test_a_server_that_is_broken_or_gone_has_refused_no_login(tmp_path: Path) -> None:
    for status in (404, 500, 503):
        with answering(status, "no") as uri, pytest.raises(TrackingUnreachable) as caught:
            open_store(uri, experiment="x", output_dir=tmp_path)
        assert "login" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        'FATAL: password authentication failed for user "me"',
        "fe_sendauth: no password supplied",
        "(1045, \"Access denied for user 'me'@'host' (using password: YES)\")",
        "[28000] Login failed for user 'me'",
    ],
)
def test_a_database_that_refuses_a_login_names_its_variable(words: str) -> None:
    from sqlalchemy.exc import OperationalError

    uri = "postgresql://me@db/x"
    error = OperationalError("connect", {}, Exception(words))
    with pytest.raises(TrackingUnreachable) as caught, mlflow_store.reachable(uri):
        raise error
    line = str(caught.value)
    assert line.startswith(f"tracking: login refused by {uri} (")
    assert "RELORA_DB_PASSWORD holds it" in line


# MLflow's own variables -------------------------------------------------------------------------
def settled(**tracking: Any) -> tuple[TrackingConfig, list[str]]:
    config, notes = a_config(), []
    config.tracking = TrackingConfig(**{"enabled": True, **tracking})
    for _ in range(2):
        shown = mlflow_store.fill_from_environment(config, notes=notes).tracking
    assert config.tracking == TrackingConfig(**{"enabled": True, **tracking})
    return shown, notes


def test_mlflows_variables_are_defaults_below_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled() == (TrackingConfig(enabled=True), [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    shown, notes = settled()
    assert (shown.uri, shown.experiment) == ("http://lab:5000", "ours")
    assert notes == [
        "tracking.uri=http://lab:5000 (the environment's MLFLOW_TRACKING_URI)",
        "tracking.experiment=ours (the environment's MLFLOW_EXPERIMENT_NAME)",
    ]
    shown, notes = settled(uri="http://mine:1", experiment="mine")
    assert (shown.uri, shown.experiment, notes) == ("http://mine:1", "mine", [])
    shown, notes = settled(uri="http://mine:1")
    assert (shown.uri, shown.experiment, len(notes)) == ("http://mine:1", "ours", 1)
    assert settled(enabled=False) == (TrackingConfig(enabled=False), [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " ")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    assert settled() == (TrackingConfig(enabled=True), [])


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://me:secret@lab:5000", ["no password", "MLFLOW_TRACKING_PASSWORD"]),
        ("postgresql://me:secret@db/x", ["no password", "RELORA_DB_PASSWORD"]),
        ("./mlruns", ["sqlite:///./mlruns/mlflow.db"]),
        ("databricks", ["'databricks'"]),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused_by_its_name(
    uri: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError) as caught:
        settled()
    line = str(caught.value)
    assert line.startswith("MLFLOW_TRACKING_URI must ")
    assert line.endswith("; or unset it, tracking.uri goes before it")
    assert "secret" not in line
    for word in words:
        assert word in line
    settled(uri="http://mine:1")


@pytest.mark.parametrize(
    ("version", "words"),
    [("451aebb31d03", ["an older MLflow", "mlflow db upgrade"]), ("f" * 12, ["a newer MLflow"])],
)
def test_a_schema_of_another_mlflow_is_said_at_the_start(
    version: str, words: list[str], migrated: Path, tmp_path: Path
) -> None:
    database = tmp_path / "a ?b.db"
    uri = addresses.sqlite_uri(database)
    assert settled(uri=uri)[1] == []  # there is none
    shutil.copy(migrated, database)
    assert settled(uri=uri)[1] == []
    with closing(sqlite3.connect(database)) as there, there:
        there.execute("update alembic_version set version_num = ?", [version])
    (note,) = settled(uri=uri)[1]
    assert f"tracking: {database} was written by" in note
    assert version in note
    for word in words:
        assert word in note
    with pytest.raises(ConfigError) as caught:  # and again by what would have shown the runs
        open_store(uri, experiment="a", output_dir=tmp_path)
    assert str(caught.value) == note
    database.write_bytes(b"no database at all, which is said by what opens it")
    assert settled(uri=uri)[1] == []

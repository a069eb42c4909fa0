"""MLflow's database in a folder that several users share, that one may only read, or that is a
copy of another: who may write does, who may not looks, and nobody writes elsewhere."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow_runs import Store, a_run, train

from experiments import addresses
from experiments.addresses import default_uri
from experiments.disk.run_dir import RunDir
from experiments.tracking import store as mlflow_store
from experiments.tracking.store import TrackingUnreachable, readable
from relora_core import shared


def tree(folder: Path) -> dict[str, Any]:
    """Everything that a write would change."""
    looks = {p: p.lstat() for p in (folder, *folder.rglob("*"))}
    return {str(p): (s.st_mtime_ns, s.st_size, s.st_mode) for p, s in looks.items()}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that are another user's, whoever runs the tests."""
    folders: list[Path] = []
    real = shared.find_obstacle

    def look(path: Path | str) -> str | None:
        below = any(Path(path).is_relative_to(folder) for folder in folders)
        return f"{path} is read-only for you (owner anna)" if below else real(path)

    monkeypatch.setattr(shared, "find_obstacle", look)
    return folders


def test_a_database_is_the_groups_with_all_that_is_made_beside_it(tmp_path: Path):
    out = tmp_path / "lab"
    out.mkdir()
    out.chmod(0o2770)
    before = os.umask(0o077)
    try:
        mlflow_store._prepare(out / "mlflow.db")
        with mlflow_store.lock(default_uri(out), out):
            pass
        with closing(sqlite3.connect(out / "mlflow.db")) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("CREATE TABLE x (y)")
            db.commit()
            names = {path.name for path in out.iterdir()}
            assert {"mlflow.db", "mlflow.db-wal", "mlflow.db-shm"} <= names
            for path in out.iterdir():
                assert stat.S_IMODE(path.stat().st_mode) & 0o060 == 0o060, path
    finally:
        os.umask(before)


def test_files_of_runs_are_the_groups_too(migrated: Path, tmp_path: Path):
    out = tmp_path / "lab"
    out.mkdir()
    out.chmod(0o2770)
    shutil.copy(migrated, out / "mlflow.db")
    before = os.umask(0o077)
    try:
        store, run = Store(out), a_run(out)
        train(run, attempt=1, start=0, stop=20, state="finished")
        assert store.sync(run, final=True).files is None
    finally:
        os.umask(before)
    assert store.table(run, "paloma")["data"] == [["c4", "inf", 20]]
    for path in out.rglob("*"):
        wanted = 0o2070 if path.is_dir() else 0o060
        assert path.stat().st_mode & wanted == wanted, path


def test_who_may_not_write_hears_whose_it_is_and_looks_at_a_copy(
    migrated: Path, tmp_path: Path, closed: list[Path], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "lab"
    out.mkdir()
    shutil.copy(migrated, out / "mlflow.db")
    uri, before = default_uri(out), tree(out)
    closed.append(out)
    with pytest.raises(
        TrackingUnreachable, match=r"read-only for you \(owner anna\); nothing is lost"
    ):
        mlflow_store.lock(uri, out)
    with readable(uri, output_dir=out) as shown:
        assert shown != uri
        copy = addresses.sqlite_path(shown)
        assert copy is not None
        with closing(sqlite3.connect(copy)) as db:
            assert ("other",) in db.execute("SELECT name FROM experiments").fetchall()
    assert not copy.exists()
    assert capsys.readouterr().err.count("read-only for you (owner anna)") == 1
    assert tree(out) == before
    closed.clear()
    with readable(uri, output_dir=out) as shown:
        assert shown == uri


@pytest.mark.skipif(os.geteuid() == 0, reason="root may make files anywhere")
def test_a_database_with_a_log_is_read_where_no_file_can_be_made(tmp_path: Path):
    _wal(tmp_path / "lab" / "mlflow.db")
    (tmp_path / "lab").chmod(0o555)
    mlflow_store._copy(tmp_path / "lab" / "mlflow.db", tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        assert db.execute("SELECT * FROM x").fetchall() == [(1,)]
    (tmp_path / "lab").chmod(0o755)


def _wal(database: Path) -> None:
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE x (y)")
        db.execute("INSERT INTO x VALUES (1)")


# copies -------------------------------------------------------------------------------------------
def test_a_copy_writes_nothing_into_the_folder_that_it_was_made_of(migrated: Path, tmp_path: Path):
    old, new, third = tmp_path / "old", tmp_path / "new", tmp_path / "third"
    old.mkdir()
    shutil.copy(migrated, old / "mlflow.db")
    store = Store(old)
    run, guest = a_run(old), a_run(third, seed=7)  # a third folder's run, tracked here on purpose
    train(run, attempt=1, start=0, stop=20)
    train(guest, attempt=1, start=0, stop=20, state="finished")
    store.sync(run)
    guests = mlflow_store.open_store(store.uri, experiment="guests", output_dir=third)
    store.sync(guest, experiment_id=guests.experiment_id, output_dir=third)
    shutil.copytree(old, new)
    before = tree(old), tree(third)
    copied, run = Store(new), RunDir(new / run.path.relative_to(old))
    train(run, attempt=1, start=20, stop=40, state="finished")
    report = copied.sync(run, final=True)
    assert (report.errors, report.files) == ({}, None)
    assert copied.table(run, "paloma")["data"] == [["c4", "inf", 40]]
    assert (tree(old), tree(third)) == before
    with closing(sqlite3.connect(new / "mlflow.db")) as db:
        places = [uri for (uri,) in db.execute("SELECT artifact_uri FROM runs")]
        locations = {p for (p,) in db.execute("SELECT artifact_location FROM experiments")}
    assert sum(uri.startswith((new / "mlartifacts").as_uri()) for uri in places) == 1
    assert sum(uri.startswith((third / "mlartifacts").as_uri()) for uri in places) == 1  # its own
    assert (old / "mlartifacts").as_uri() not in locations

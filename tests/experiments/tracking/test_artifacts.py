"""Metrics and status reach MLflow wherever its files may go, and the files are caught up on."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow_runs import Store, a_run, expected, train

from experiments.disk.run_dir import RunDir
from experiments.tracking import store as mlflow_store
from experiments.tracking.artifacts import Artifacts


def artifacts(client: Any, tmp_path: Path) -> Artifacts:
    """Of a server elsewhere."""
    uri, out = "http://lab.example:5000", tmp_path / "out"
    return Artifacts(mlflow_store.Store(uri=uri, client=client, experiment_id="1", output_dir=out))


def blocked(store: Store, tmp_path: Path) -> Path:
    """A file where the store's experiment has its folder: nobody can write there."""
    place = tmp_path / "no folder"
    place.write_text("")
    with closing(sqlite3.connect(store.folder / "mlflow.db")) as there, there:
        there.execute(
            "update experiments set artifact_location = ? where experiment_id = ?",
            ((place / "x").as_uri(), int(store.experiment_id)),
        )
    return place


@pytest.mark.slow
def test_metrics_and_status_do_not_wait_for_files(store: Store, tmp_path: Path) -> None:
    runs = [a_run(tmp_path, seed=seed) for seed in range(2)]
    place = blocked(store, tmp_path)
    for run in runs:
        train(run, attempt=1, start=0, stop=40, state="finished")
    report = store.sync(*runs, final=True, output_dir=tmp_path)
    assert report.errors == {}
    assert report.tables == 0
    line = report.files or ""
    assert line.startswith("tracking: files (tables, configs) cannot be written to file://")
    assert f"the files are in {tmp_path}/mlartifacts;" in line
    assert "\n" not in line
    for run in runs:
        assert store.run(run).info.status == "FINISHED"
        assert store.points(run) == expected(run)
        here = tmp_path / "mlartifacts" / store.run(run).info.run_id / "artifacts"
        assert {p.name for p in here.rglob("*.json")} == {"config.json", "paloma.json"}
    # and they are caught up on: by the same process at its last pass, or by another at any
    place.unlink()
    syncer = store.syncer()
    report = syncer.sync(runs)
    assert (report.files, report.points, report.tables) == (None, 0, 2)
    for run in runs:
        there = place / "x" / store.run(run).info.run_id / "artifacts"
        assert (there / "tables" / "paloma.json").is_file()
        assert (there / "config.json").is_file()
        assert "tables/paloma.json" in store.run(run).data.tags["mlflow.loggedArtifacts"]
    assert store.sync(*runs).tables == 0


@pytest.mark.slow
def test_files_of_an_output_folder_that_has_moved_are_where_it_is_now(
    migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old 100%", tmp_path / "new é"
    old.mkdir()
    shutil.copy(migrated, old / "mlflow.db")
    store = Store(old)
    run = a_run(old)
    train(run, attempt=1, start=0, stop=20)
    store.sync(run)
    old.rename(new)
    old.write_text("")  # nobody writes there any more
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", {})
    moved, run = Store(new), RunDir(new / run.path.relative_to(old))
    assert moved.experiment_id == store.experiment_id
    train(run, attempt=1, start=20, stop=40, state="finished")
    other = a_run(new, seed=1)
    train(other, attempt=1, start=0, stop=20, state="finished")
    report = moved.sync(run, other, final=True)
    assert (report.errors, report.files) == ({}, None)
    for one, stop in ((run, 40), (other, 20)):
        assert moved.run(one).info.status == "FINISHED"
        assert moved.points(one)["train/loss"] == expected(one)["train/loss"]
        assert moved.table(one, "paloma")["data"] == [["c4", "inf", stop]]
        listed = {f.path for f in moved.client.list_artifacts(moved.run(one).info.run_id)}
        assert listed == {"config.json", "tables"}


def test_a_folder_of_a_server_on_another_machine_is_not_made_here(tmp_path: Path) -> None:
    place = tmp_path / "srv" / "mlruns" / "1"
    experiment = SimpleNamespace(artifact_location=str(place))

    class Client:
        def get_experiment(self, _: str) -> Any:
            return experiment

        def log_text(self, *_: str) -> None:
            raise AssertionError("it would be written to this machine")

    files = artifacts(Client(), tmp_path)
    assert not files.text("abc", "{}", "tables/x.json")
    assert (tmp_path / "out" / "mlartifacts/abc/artifacts/tables/x.json").read_text() == "{}"
    assert "start the server with --artifacts-destination" in (files.problem or "")
    assert not (tmp_path / "srv").exists()


def test_a_folder_of_a_server_that_this_machine_shares_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "mlruns").mkdir()
    calls = []

    class Client:
        def get_experiment(self, _: str) -> Any:
            return SimpleNamespace(artifact_location=(tmp_path / "mlruns" / "1").as_uri())

        def log_text(self, *words: str) -> None:
            calls.append(words)

    files = artifacts(Client(), tmp_path)
    assert files.text("abc", "{}", "x.json")
    assert calls == [("abc", "{}", "x.json")]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ImportError("boto3"), KeyError()])
def test_whatever_a_place_for_files_says_is_one_line(tmp_path: Path, error: Exception) -> None:
    """A bucket without its client, credentials or room."""

    class Client:
        def get_experiment(self, _: str) -> Any:
            return SimpleNamespace(artifact_location="s3://key:secret@bucket/1")

        def log_artifact(self, *_: str) -> None:
            raise error

    files = artifacts(Client(), tmp_path)
    (tmp_path / "a.csv").write_text("1")
    (tmp_path / "out").write_text("")  # nor is there a folder here
    assert not files.file("abc", tmp_path / "a.csv", "report")
    line = files.problem or ""
    assert "nor to" in line
    assert "secret" not in line
    assert "\n" not in line

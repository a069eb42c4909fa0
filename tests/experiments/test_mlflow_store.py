"""Addresses that cannot work are refused in one line; a store is made once, whoever asks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_runs import Store, a_config, a_run, closed_port, expected, train

from experiments import mlflow_store
from experiments.mlflow_store import TrackingUnreachable, check_uri, default_uri, ensure_store
from experiments.mlflow_sync import sync
from relora_core.config import ConfigError, SweepConfig, TrackingConfig


def test_the_experiment_is_found_again_also_after_it_was_deleted(store: Store) -> None:
    assert store.experiment("twice") == store.experiment("twice")
    store.client.delete_experiment(store.experiment("twice"))
    again = store.client.get_experiment(store.experiment("twice"))
    assert again.lifecycle_stage == "active"


def test_a_store_that_does_not_answer_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    uri = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(TrackingUnreachable, match="nothing is lost"):
        ensure_store(uri, experiment="x", output_dir=tmp_path)
    with pytest.raises(TrackingUnreachable, match="nothing is lost"):
        sync([run], uri=uri, experiment_id="1", output_dir=tmp_path)


AT_ONCE = """if True:
    import multiprocessing, sys
    import mlflow.store.tracking.sqlalchemy_store  # once, not in each process
    from experiments.mlflow_store import default_uri, ensure_store
    from experiments.mlflow_sync import sync
    from experiments.run_dir import all_runs

    out, what, n = sys.argv[1], sys.argv[2], 32
    uri, context = default_uri(out), multiprocessing.get_context("fork")
    barrier = context.Barrier(n)

    def one(run):
        barrier.wait()
        id_ = ensure_store(uri, experiment="x", output_dir=out)
        if what == "sync":
            report = sync([run], uri=uri, experiment_id=id_, output_dir=out, final=True)
            sys.exit(report.created != 1 or bool(report.errors))

    if what == "sync":
        ensure_store(uri, experiment="x", output_dir=out)
    workers = [context.Process(target=one, args=[run]) for run in all_runs(out)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    sys.exit(any(worker.exitcode for worker in workers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ensure", "sync"])
def test_thirty_two_processes_share_a_fresh_store(tmp_path: Path, what: str) -> None:
    """All make it at once; or all begin to show their runs at once where it has been made."""
    runs = [a_run(tmp_path, seed=seed) for seed in range(32)]
    for run in runs:
        train(run, attempt=1, start=0, stop=40, state="finished")
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    there = Store(tmp_path)
    assert len(there.client.search_experiments(filter_string="name = 'x'")) == 1
    if what == "sync":
        there.experiment_id = there.experiment("x")
        assert len(there.client.search_runs([there.experiment_id])) == 32
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


def test_checking_an_address_loads_no_mlflow() -> None:
    script = (
        "import sys; from experiments.mlflow_store import check_uri, default_uri, ui_command; "
        "from relora_core.config import TrackingConfig; "
        "check_uri(TrackingConfig(enabled=True, uri='http://h')); ui_command('x'); "
        "sys.exit(any(m in sys.modules for m in ('mlflow', 'torch', 'sqlalchemy')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_experiment_is_named_after_the_nearest_of_its_names() -> None:
    config = a_config()
    config.experiment = "demo"
    assert mlflow_store.experiment_name(config) == "demo"
    config.sweep = SweepConfig(name="ranks")
    assert mlflow_store.experiment_name(config) == "ranks"
    config.tracking = TrackingConfig(experiment="mine")
    assert mlflow_store.experiment_name(config) == "mine"


def test_the_way_to_the_ui_is_one_command_and_links_lead_to_the_runs() -> None:
    assert mlflow_store.ui_command("outputs", sweep="ranks") == "python -m sweeps ui ranks"
    command = mlflow_store.ui_command("out puts")
    assert command == "python -m sweeps ui --output-dir 'out puts'"
    link = mlflow_store.ui_link("http://127.0.0.1:5000/", "7")
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
    (id_,) = {ensure_store(uri, experiment="x", output_dir=out) for _ in range(2)}
    assert not sync([run], uri=uri, experiment_id=id_, output_dir=out).errors
    client = MlflowClient(uri)
    (found,) = client.search_runs([id_])
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == [name]
    listed = {one.path for one in client.list_artifacts(found.info.run_id)}
    folder = out / "mlartifacts" / found.info.run_id / "artifacts"
    assert listed == {path.name for path in folder.iterdir()} != set()
    assert mlflow_store.sqlite_path(uri) == out / "mlflow.db"


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
    sync([run], uri=old, experiment_id=ensure_store(old, **shown), output_dir=out)
    assert not (out / "mlflow.db").exists()
    before = (tmp_path / "a b" / "mlflow.db").read_bytes()
    uri = default_uri(out)
    assert (mlflow_store.misplaced(uri) or "").startswith(f"an earlier version kept {out}")
    shutil.copy(migrated, out / "mlflow.db")
    there = ensure_store(uri, **shown)
    sync([run], uri=uri, experiment_id=there, output_dir=out)
    (found,) = MlflowClient(uri).search_runs([there])
    assert found.data.metrics["train/loss"]
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

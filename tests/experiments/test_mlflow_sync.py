"""MLflow shows each point of events.jsonl once, whatever is repeated, killed or unreachable."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import mlflow_sync
from experiments.identity import arm_id, run_id
from experiments.mlflow_sync import Follower, TrackingUnreachable, check_uri, ensure_store, sync
from experiments.run_dir import EventLog, RunDir, runs_folder
from relora_core.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    SweepConfig,
    TrackingConfig,
    TrainConfig,
)
from relora_core.events import Event

T0 = 1_700_000_000.0  # the first event of every run here


def a_config(*, r: int = 4, seed: int = 0) -> RunConfig:
    return RunConfig(
        seed=seed,
        model=ModelConfig(
            name="nano", d_model=24, d_ff=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=64
        ),
        relora=ReLoRAConfig(r=r),
        train=TrainConfig(steps=100, batch_size=4),
        data=DataConfig(seq_len=16),
    )


def a_run(output_dir: Path, *, r: int = 4, seed: int = 0) -> RunDir:
    config = a_config(r=r, seed=seed)
    run = RunDir(runs_folder(output_dir) / run_id(config))
    run.create(config)
    return run


def loss(step: int) -> float:
    return 5.0 / (1 + step)


def train(run: RunDir, *, attempt: int, start: int, stop: int, state: str = "running") -> None:
    """One attempt as the trainer writes it: train/loss every 10 steps, one eval at `stop`.

    The loss depends on the step alone, as it does when a resume is bit for bit; the clock does not.
    """
    clock = T0 + 1000.0 * (attempt - 1)
    log = EventLog(run, attempt)
    log.emit(Event(kind="start", step=start, data={"resumed": start > 0}, time=clock))
    for step in range(start + 10, stop + 1, 10):
        log.emit(
            Event(
                kind="train",
                step=step,
                metrics={"train/loss": loss(step), "train/lr": 1e-3},
                time=clock + step,
            )
        )
    log.emit(Event(kind="eval", step=stop, metrics={"eval/blimp/mean": 0.5}, time=clock + stop + 1))
    rows = [{"source": "c4", "ppl.mean": math.inf, "step": stop}]
    log.emit(
        Event(kind="table", step=stop, data={"name": "paloma", "rows": rows}, time=clock + stop + 2)
    )
    if state == "finished":
        log.emit(Event(kind="end", step=stop, time=clock + stop + 3))
    log.close()
    run.update_status(
        state=state, attempts=attempt, step=stop, error=None, host="here", job_id=f"job{attempt}"
    )


def expected(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """The record's points, as the reader of events.jsonl counts them."""
    points: dict[str, dict[int, float]] = {}
    for event in run.events():
        for key, value in event["metrics"].items():
            points.setdefault(key, {})[event["step"]] = value
    return {key: sorted(of_key.items()) for key, of_key in points.items()}


class Store:
    """A tracking store with one experiment, and what it shows."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self.folder = folder
        self.uri = mlflow_sync.default_uri(folder)
        self.experiment_id = self.experiment("base")
        self.client = MlflowClient(tracking_uri=self.uri)

    def experiment(self, name: str) -> str:
        return ensure_store(self.uri, experiment=name, output_dir=self.folder)

    def sync(self, *runs: RunDir, **changes: Any) -> mlflow_sync.SyncReport:
        settings = {"experiment_id": self.experiment_id, "output_dir": self.folder, **changes}
        return sync(runs, uri=self.uri, **settings)

    def run(self, run: RunDir) -> Any:
        """The one MLflow run that shows `run`."""
        found = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.run_id = '{run.run_id}'"
        )
        assert len(found) == 1
        return found[0]

    def status(self, run: RunDir) -> str | None:
        """None as long as no MLflow run shows `run`."""
        there = self.client.search_runs([self.experiment_id])
        of_run = [r.info.status for r in there if r.data.tags["run_id"] == run.run_id]
        return of_run[0] if of_run else None

    def points(self, run: RunDir) -> dict[str, list[tuple[int, float]]]:
        shown = self.run(run)
        return {
            key: sorted(
                (m.step, m.value) for m in self.client.get_metric_history(shown.info.run_id, key)
            )
            for key in shown.data.metrics
        }

    def table(self, run: RunDir, name: str) -> dict[str, Any]:
        uuid = self.run(run).info.run_id
        (artifact,) = (self.folder / "mlartifacts" / uuid).rglob(f"{name}.json")
        return json.loads(artifact.read_text())


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("odd 'dir' 100% é"))


@pytest.fixture
def store(database: Store, request: pytest.FixtureRequest) -> Store:
    """The shared database with an experiment of the test's own."""
    database.experiment_id = database.experiment(request.node.name)
    return database


def test_every_point_is_shown_once_however_often_it_is_synced(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    first, second = store.sync(run), store.sync(run)
    assert (first.created, first.points, first.tables) == (1, 9, 1)
    assert (second.created, second.points, second.tables) == (0, 0, 0)
    assert store.points(run) == expected(run)


def test_only_what_is_new_is_sent_and_half_a_line_waits(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    store.sync(run)
    log = EventLog(run, 1)
    log.emit(Event(kind="train", step=50, metrics={"train/loss": loss(50)}, time=T0 + 50))
    log.close()
    line = json.dumps({"kind": "train", "step": 60, "metrics": {"train/loss": 1.0}, "time": T0})
    with open(run.events_path, "a") as file:
        file.write(line)
    assert store.sync(run).points == 1
    with open(run.events_path, "a") as file:
        file.write("\n")
    assert store.sync(run).points == 1
    assert store.points(run)["train/loss"][-2:] == [(50, loss(50)), (60, 1.0)]


@pytest.mark.parametrize("between", [True, False], ids=["synced-between", "synced-once"])
@pytest.mark.parametrize("again_from", [30, 0], ids=["resumed", "started-over"])
def test_steps_that_two_attempts_share_are_shown_once(
    store: Store, tmp_path: Path, again_from: int, between: bool
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=50)
    if between:
        store.sync(run)
    train(run, attempt=2, start=again_from, stop=80, state="finished")
    store.sync(run)
    shown = store.points(run)["train/loss"]
    assert [step for step, _ in shown] == list(range(10, 81, 10))
    assert shown == expected(run)["train/loss"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_between_batch_and_position_sends_no_point_twice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    store.sync(run)
    train(run, attempt=2, start=20, stop=60)
    save = mlflow_sync._save

    def killed(run: RunDir, key: str, position: Any) -> None:
        if not position.sending:
            raise Killed
        save(run, key, position)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_sync, "_save", killed)
        with pytest.raises(Killed):
            store.sync(run)
    assert store.points(run) == expected(run)  # the batch did arrive
    assert store.sync(run).points == 0
    assert store.points(run) == expected(run)


def test_a_kill_between_two_batches_sends_only_the_rest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=60)
    log_batch = MlflowClient.log_batch
    sent = []

    def killed(self: MlflowClient, uuid: str, metrics: Any = (), **rest: Any) -> None:
        if len(sent) == 2:
            raise Killed
        log_batch(self, uuid, metrics=metrics, **rest)
        sent.extend([len(metrics)] if metrics else [])

    monkeypatch.setattr(mlflow_sync, "MAX_METRICS", 5)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(Killed):
            store.sync(run)
    assert sent == [5, 5]
    assert store.sync(run).points == 13 - 10
    assert store.points(run) == expected(run)


@pytest.mark.parametrize("damage", [None, b'{"sqlite', b""], ids=["lost", "torn", "empty"])
def test_a_lost_position_finds_the_run_and_its_points_again(
    store: Store, tmp_path: Path, damage: bytes | None
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    store.sync(run)
    run.mlflow_path.unlink()
    if damage is not None:
        run.mlflow_path.write_bytes(damage)
    report = store.sync(run)
    assert (report.created, report.points) == (0, 0)
    assert store.points(run) == expected(run)


def test_a_fresh_store_is_rebuilt_to_the_same_view(store: Store, tmp_path: Path) -> None:
    runs = [a_run(tmp_path, r=r, seed=seed) for r in (2, 4) for seed in (0, 1)]
    for run in runs:
        train(run, attempt=1, start=0, stop=40)
        store.sync(run)
        train(run, attempt=2, start=30, stop=60, state="finished")
    store.sync(*runs)
    other = Store(tmp_path)
    other.sync(*reversed(runs))

    def shown(where: Store, run: RunDir) -> dict[str, Any]:
        there = where.run(run)
        tags = {k: v for k, v in there.data.tags.items() if k != "mlflow.runColor"}
        info = there.info
        return {
            "tags": tags,
            "params": there.data.params,
            "points": where.points(run),
            "table": where.table(run, "paloma"),
            "info": (info.run_name, info.status, info.start_time, info.end_time),
        }

    for run in runs:
        assert shown(other, run) == shown(store, run)
    assert store.sync(*runs).points == 0  # one store's position says nothing of the other's


def test_equal_names_in_another_experiment_are_another_view(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    store.sync(run)
    second = store.experiment("another sweep with the same run")
    assert store.sync(run, experiment_id=second).points == 5
    assert store.sync(run).points == 0


@pytest.mark.parametrize(
    ("state", "status", "over"),
    [
        ("planned", "SCHEDULED", False),
        ("queued", "SCHEDULED", False),
        ("running", "RUNNING", False),
        ("finished", "FINISHED", True),
        ("failed", "FAILED", True),
        ("diverged", "FAILED", True),
        ("cancelled", "KILLED", True),
    ],
)
def test_status_and_times_follow_the_run(
    store: Store, tmp_path: Path, state: str, status: str, over: bool
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    run.update_status(state=state, error="out of memory")
    store.sync(run)
    shown = store.run(run)
    assert shown.info.status == status
    assert shown.data.tags["state"] == state
    assert shown.data.tags["error"] == "out of memory"
    assert shown.info.start_time == T0 * 1000
    ended = {"finished": T0 + 22, "diverged": T0 + 22}.get(state, run.status().heartbeat)
    assert shown.info.end_time == (int(ended * 1000) if over else None)


def test_a_failed_run_that_resumes_sheds_its_error_and_its_end(
    store: Store, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    run.update_status(state="failed", error="node lost")
    store.sync(run)
    train(run, attempt=2, start=20, stop=40, state="finished")
    store.sync(run)
    shown = store.run(run)
    assert shown.info.status == "FINISHED"
    assert shown.info.end_time == int((T0 + 1000 + 43) * 1000)
    assert "error" not in shown.data.tags
    assert (shown.data.tags["attempts"], shown.data.tags["job_id"]) == ("2", "job2")


def test_params_and_tags_say_what_the_run_is(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path, r=8, seed=3)
    run.write_attempt(1, {"host": "here", "commit": "0" * 40})
    train(run, attempt=1, start=0, stop=20)
    store.sync(run, names={run.run_id: "first"}, parent="0" * 32)
    store.sync(run, names={run.run_id: "nano-r008-s3"})
    shown = store.run(run)
    assert shown.info.run_name == "nano-r008-s3"
    params = {"model.name": "nano", "relora.r": "8", "seed": "3", "train.lr": "0.0003"}
    assert params.items() <= shown.data.params.items()
    assert shown.data.params["relora.target_modules"] == "attention, swiglu"
    assert "output_dir" not in shown.data.params
    tags = {
        "kind": "run",
        "arm": arm_id(a_config(r=8)),
        "method": "relora",
        "mlflow.source.git.commit": "0" * 40,
        "mlflow.parentRunId": "0" * 32,
    }
    assert tags.items() <= shown.data.tags.items()


def test_arms_differ_in_colour_and_seeds_do_not(store: Store, tmp_path: Path) -> None:
    runs = {(r, s): a_run(tmp_path, r=r, seed=s) for r in (2, 4, 8) for s in (0, 1)}
    store.sync(runs[2, 0], runs[4, 0])
    store.sync(*runs.values())  # by another Syncer, which must keep the colours given before
    colours = {key: store.run(run).data.tags["mlflow.runColor"] for key, run in runs.items()}
    assert all(colours[r, 0] == colours[r, 1] for r in (2, 4, 8))
    assert len({colours[r, 0] for r in (2, 4, 8)}) == 3


def test_the_newest_table_is_shown_without_dots_and_without_nan(
    store: Store, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    store.sync(run)
    train(run, attempt=1, start=20, stop=40)
    store.sync(run)
    table = store.table(run, "paloma")
    assert table == {"columns": ["source", "ppl_mean", "step"], "data": [["c4", "inf", 40]]}
    listed = json.loads(store.run(run).data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": "tables/paloma.json", "type": "table"}]


def test_nan_infinity_and_odd_names_are_visible(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    log = EventLog(run, 1)
    odd = {"train/loss": math.nan, "a//b/../c(%)": 1.0, "train/grad_norm": math.inf}
    log.emit(Event(kind="train", step=10, metrics=odd, time=T0))
    log.close()
    assert store.sync(run).points == 3
    points = store.points(run)
    assert math.isnan(points["train/loss"][0][1])
    assert points["train/grad_norm"][0][1] > 1e308
    assert points["a/b/c___"] == [(10, 1.0)]
    assert store.sync(run).points == 0


def test_a_run_that_cannot_be_read_holds_up_no_other(store: Store, tmp_path: Path) -> None:
    bad, good = a_run(tmp_path, seed=0), a_run(tmp_path, seed=1)
    for run in (bad, good):
        train(run, attempt=1, start=0, stop=20)
    bad.config_path.write_text("{")
    report = store.sync(bad, good)
    assert list(report.errors) == [bad.run_id]
    assert "\n" not in report.errors[bad.run_id]
    assert store.points(good) == expected(good)


def test_while_another_process_syncs_a_pass_does_nothing(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with mlflow_sync._lock(store.uri, store.folder):
        assert store.sync(run).busy
    assert not store.sync(run).busy


def test_a_pass_without_news_asks_nothing_of_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    syncer = mlflow_sync.Syncer(
        store.uri, experiment_id=store.experiment_id, output_dir=store.folder
    )
    syncer.sync([run])
    for call in ("search_runs", "get_run", "log_batch", "update_run", "set_terminated"):
        monkeypatch.delattr(MlflowClient, call)
    assert not syncer.sync([run]).errors
    run.update_status(step=21)  # a heartbeat alone changes nothing that MLflow shows
    assert not syncer.sync([run]).errors


def test_the_experiment_is_found_again_also_after_it_was_deleted(store: Store) -> None:
    assert store.experiment("twice") == store.experiment("twice")
    store.client.delete_experiment(store.experiment("twice"))
    again = store.client.get_experiment(store.experiment("twice"))
    assert again.lifecycle_stage == "active"


# the follower -----------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_follower_shows_runs_while_they_work_and_after(store: Store, tmp_path: Path) -> None:
    run, said = a_run(tmp_path), []
    train(run, attempt=1, start=0, stop=20)
    with Follower(
        [run],
        uri=store.uri,
        experiment=store.client.get_experiment(store.experiment_id).name,
        output_dir=tmp_path,
        names={run.run_id: "followed"},
        every_s=0.05,
        warn=said.append,
    ) as follower:
        assert follower.wait_ready(60) == store.experiment_id
        wait_for(lambda: store.status(run) == "RUNNING")
        train(run, attempt=2, start=20, stop=60, state="finished")
    assert said == []
    assert store.points(run) == expected(run)
    assert store.run(run).info.run_name == "followed"
    assert store.run(run).info.status == "FINISHED"


def test_a_dead_server_costs_one_line_and_no_time_at_the_start(tmp_path: Path) -> None:
    run, said = a_run(tmp_path), []
    uri = f"http://user:secret@127.0.0.1:{closed_port()}"
    with Follower(
        [run], uri=uri, experiment="x", output_dir=tmp_path, every_s=0.05, warn=said.append
    ) as follower:
        train(run, attempt=1, start=0, stop=20)
        assert follower.wait_ready(60) is None
    (line,) = said
    assert line.startswith(f"tracking: {uri.replace('secret', '***')} unreachable")
    assert "python -m sweeps sync" in line
    assert "secret" not in line + (tmp_path / "logs" / "mlflow-sync.log").read_text()


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


@pytest.mark.slow
def test_a_follower_outlives_its_killed_parent_by_one_pass(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    script = """if True:
        import sys, time
        from experiments.mlflow_sync import Follower
        from experiments.run_dir import RunDir
        path, uri, experiment, output_dir = sys.argv[1:]
        with Follower([RunDir(path)], uri=uri, experiment=experiment, output_dir=output_dir,
                      every_s=3600) as follower:
            follower.wait_ready(60)
            print("ready", flush=True)
            time.sleep(600)
    """
    name = store.client.get_experiment(store.experiment_id).name
    arguments = [str(run.path), store.uri, name, str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        train(run, attempt=2, start=20, stop=60, state="finished")
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: store.status(run) == "FINISHED")
    assert store.points(run) == expected(run)


@pytest.mark.slow
def test_eight_processes_at_once_make_one_store(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from experiments.mlflow_sync import default_uri, ensure_store
        print(ensure_store(default_uri(sys.argv[1]), experiment="x", output_dir=sys.argv[1]))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    assert len({out for out, _ in said}) == 1


# addresses --------------------------------------------------------------------------------------


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
        "import sys; from experiments.mlflow_sync import check_uri, default_uri, ui_command; "
        "from relora_core.config import TrackingConfig; "
        "check_uri(TrackingConfig(enabled=True, uri='http://h')); ui_command('', 'x'); "
        "sys.exit(any(m in sys.modules for m in ('mlflow', 'torch', 'sqlalchemy')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_experiment_is_named_after_the_nearest_of_its_names() -> None:
    config = a_config()
    config.experiment = "demo"
    assert mlflow_sync.experiment_name(config) == "demo"
    config.sweep = SweepConfig(name="ranks")
    assert mlflow_sync.experiment_name(config) == "ranks"
    config.tracking = TrackingConfig(experiment="mine")
    assert mlflow_sync.experiment_name(config) == "mine"


def test_the_ui_starts_lean_on_loopback_and_links_to_the_runs() -> None:
    command = mlflow_sync.ui_command("sqlite:///out puts/mlflow.db", "out puts")
    assert "--backend-store-uri 'sqlite:///out puts/mlflow.db'" in command
    assert "--host 127.0.0.1" in command
    assert mlflow_sync.ui_command("http://host:5000", "x") == "http://host:5000"
    link = mlflow_sync.ui_link("http://127.0.0.1:5000/", "7")
    assert link.startswith("http://127.0.0.1:5000/#/experiments/7/runs?")
    assert "workflowType=machine_learning" in link
    assert "start_time" not in link

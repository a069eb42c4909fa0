"""MLflow shows each point of events.jsonl once, whatever is repeated, killed or unreachable."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import ViewType
from mlflow_runs import T0, Store, a_config, a_run, expected, loss, train

from experiments.disk.event_log import EventLog
from experiments.disk.run_dir import RunDir
from experiments.identity import arm_id, config_to_json
from experiments.tracking import content as mlflow_content
from experiments.tracking import model as mlflow_model
from experiments.tracking import run_view
from experiments.tracking import store as mlflow_store
from experiments.tracking.store import TrackingUnreachable
from relora_core import atomic
from relora_core.config import BlimpConfig, ConfigError, PalomaConfig, RunConfig
from relora_core.events import Event


@pytest.mark.slow
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
    save = run_view.save_position

    def killed(run: RunDir, key: str, position: Any) -> None:
        if not position.sending:
            raise Killed
        save(run, key, position)

    with monkeypatch.context() as patch:
        patch.setattr(run_view, "save_position", killed)
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

    monkeypatch.setattr(mlflow_content, "MAX_METRICS", 5)
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


def content(where: Store, run: RunDir) -> dict[str, Any]:
    """Everything that MLflow shows of the run."""
    there = where.run(run)
    own = ("mlflow.runColor", "claim")
    tags = {k: v for k, v in there.data.tags.items() if k not in own}
    info, inputs = there.info, there.inputs.dataset_inputs
    return {
        "tags": tags,
        "params": there.data.params,
        "points": where.points(run),
        "tables": [where.table(run, name) for name in ("paloma", "eval/blimp_paradigms")],
        "config": where.artifact(run, "config.json"),
        "inputs": sorted((i.dataset.name, i.dataset.digest) for i in inputs),
        "info": (info.run_name, info.status, info.start_time, info.end_time),
    }


@pytest.mark.slow
def test_a_fresh_store_is_rebuilt_to_the_same_view(
    store: Store, tmp_path: Path, migrated: Path
) -> None:
    runs = [a_run(tmp_path, r=r) for r in (2, 4)]
    for i, run in enumerate(runs):
        train(run, attempt=1, start=0, stop=40)
        store.sync(run)
        if i == 1:
            begin_anew(run)
        train(run, attempt=3, start=30, stop=60, state="finished")
        evaluate(run, step=40, finished=T0 + 9000)
    store.sync(*runs)
    before = [content(store, run) for run in runs]
    shutil.copy(migrated, tmp_path / "mlflow.db")
    other = Store(tmp_path)
    for run in reversed(runs):
        other.sync(run)
    other.sync(*runs)
    assert [content(other, run) for run in runs] == before
    for where in (store, other):  # one store's position says nothing of the other's
        assert where.sync(*runs).points == 0
        assert [content(where, run) for run in runs] == before


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
    assert shown.data.tags["reason"] == "out of memory"
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
    assert "reason" not in shown.data.tags
    assert (shown.data.tags["attempts"], shown.data.tags["job_id"]) == ("2", "job2")


def test_params_and_tags_say_what_the_run_is(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path, r=8, seed=3)
    run.write_attempt(1, {"host": "here", "commit": "0" * 40, "dirty": True})
    train(run, attempt=1, start=0, stop=20)
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    (run.checkpoints / "step-00000020").mkdir()
    store.sync(run, names={run.run_id: "first"}, parent="0" * 32)
    store.sync(run, names={run.run_id: "model=nano relora.r=8 seed=3"})
    shown = store.run(run)
    assert shown.info.run_name == "model=nano relora.r=8 seed=3"
    params = {"model.name": "nano", "relora.r": "8", "seed": "3", "train.lr": "0.0003"}
    assert params.items() <= shown.data.params.items()
    assert len(shown.data.params) < 20
    assert not {"output_dir", "galore.r", "model.d_model"} & set(shown.data.params)
    tags = {
        "kind": "run",
        "arm": arm_id(a_config(r=8)),
        "arm_name": "model=nano relora.r=8",
        "seed": "3",
        "method": "relora",
        "mode": "custom",
        "model": "nano",
        "commit": "0" * 12,
        "dirty": "true",
        "host": "here",
        "attempts": "1",
        "job_id": "job1",
        "checkpoint": str(run.checkpoints / "step-00000020"),
        "mlflow.source.git.commit": "0" * 40,
        "mlflow.parentRunId": "0" * 32,
    }
    assert tags.items() <= shown.data.tags.items()
    assert store.artifact(run, "config.json") == config_to_json(run.config())


def test_what_varies_in_a_sweep_is_a_param_unless_a_label_says_it(
    store: Store, tmp_path: Path
) -> None:
    def change(config: RunConfig, *, width: int, decay: float) -> RunConfig:
        model = replace(config.model, d_model=width, name=f"w{width}")
        return replace(config, model=model, train=replace(config.train, weight_decay=decay))

    runs = []
    for width, decay in ((24, 0.1), (24, 0.2), (48, 0.1), (48, 0.2)):
        run = RunDir(tmp_path / f"{width}-{decay}")
        run.create(change(a_config(), width=width, decay=decay))
        runs.append(run)
    store.sync(*runs)
    params = [store.run(run).data.params for run in runs]
    assert [p["train.weight_decay"] for p in params] == ["0.1", "0.2"] * 2
    assert [p["model.name"] for p in params] == ["w24", "w24", "w48", "w48"]
    assert all("model.d_model" not in p for p in params)


def test_data_and_evals_are_inputs_by_name_and_digest(store: Store, tmp_path: Path) -> None:
    config = a_config()
    config.data = replace(config.data, kind="text", path="/far/corpus.txt", fingerprint="d" * 64)
    config.eval.paloma = PalomaConfig(enabled=True, path="hub/paloma", fingerprint="p" * 64)
    config.eval.blimp = BlimpConfig(enabled=False, fingerprint="b" * 64)
    run = RunDir(tmp_path / "runs" / "a")
    run.create(config)
    store.sync(run)
    run.mlflow_path.unlink()
    store.sync(run)
    inputs = store.run(run).inputs.dataset_inputs
    shown = {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs}
    assert shown == {("corpus.txt", "d" * 36, "training"), ("paloma", "p" * 36, "eval")}
    assert len(inputs) == 2


def test_both_mfus_are_curves_of_their_own(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False}, time=T0))
    for step, share in ((10, 0.3), (20, 0.4)):
        metrics = {"perf/mfu": share, "perf/mfu_6n": share / 2}
        log.emit(Event(kind="train", step=step, metrics=metrics, time=T0 + step))
    log.close()
    store.sync(run)
    assert store.points(run)["perf/mfu"] == [(10, 0.3), (20, 0.4)]
    assert store.points(run)["perf/mfu_6n"] == [(10, 0.15), (20, 0.2)]


def test_device_hours_follow_the_training_time_of_all_processes(
    store: Store, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False, "world": 4}, time=T0))
    for step, seconds in ((10, 900.0), (20, 1800.0)):
        metrics = {"perf/train_seconds": seconds, "train/tokens": 64.0 * step}
        log.emit(Event(kind="train", step=step, metrics=metrics, time=T0 + seconds))
        store.sync(run)  # the number of processes was in an earlier pass
    log.close()
    assert store.points(run)["train/gpu_hours"] == [(10, 1.0), (20, 2.0)]
    assert store.points(run)["train/tokens"] == [(10, 640.0), (20, 1280.0)]
    log = EventLog(run, 2)  # on fewer processes; what is done stays
    log.emit(Event(kind="start", step=20, data={"resumed": True, "world": 2}, time=T0 + 2000))
    for step, seconds in ((30, 3600.0), (40, 5400.0)):
        metrics = {"perf/train_seconds": seconds}
        log.emit(Event(kind="train", step=step, metrics=metrics, time=T0 + seconds))
        store.sync(run)
    log.close()
    assert store.points(run)["train/gpu_hours"][2:] == [(30, 3.0), (40, 4.0)]


# a run begun anew -------------------------------------------------------------------------------


def begin_anew(run: RunDir) -> None:
    """The record of `sweeps retry --diverged` and the attempt after it, with other losses."""
    run.update_status(state="planned", step=0)
    log = EventLog(run, 2)
    log.emit(Event(kind="start", step=0, data={"resumed": False}, time=T0 + 5000))
    for step in (10, 20, 30):
        metrics = {"train/loss": 100.0 + step}
        log.emit(Event(kind="train", step=step, metrics=metrics, time=T0 + 5000 + step))
    log.close()
    run.update_status(state="running", attempts=2, step=30)


@pytest.mark.parametrize("position", ["kept", "lost between", "lost after"])
def test_a_run_begun_anew_shows_none_of_its_old_points(
    store: Store, tmp_path: Path, position: str
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=80)
    run.update_status(state="diverged")
    store.sync(run)
    old = store.run(run).info.run_id
    if position == "lost between":
        run.mlflow_path.unlink()
    begin_anew(run)
    assert store.sync(run).created == 1
    if position == "lost after":
        run.mlflow_path.unlink()
    assert store.sync(run).points == 0
    assert store.points(run) == {"train/loss": [(10, 110.0), (20, 120.0), (30, 130.0)]}
    assert store.run(run).info.start_time == int((T0 + 5000) * 1000)
    shown = store.client.get_run(old)
    assert (shown.info.lifecycle_stage, shown.data.tags["state"]) == ("deleted", "superseded")


@pytest.mark.parametrize("position", ["kept", "lost"])
@pytest.mark.parametrize("how", ["deleted in the UI", "begun anew"])
def test_a_run_is_shown_once_after_its_experiment_was_deleted_and_restored(
    store: Store, tmp_path: Path, how: str, position: str
) -> None:
    """MLflow then restores every run in it, those deleted before as well."""
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    store.sync(run)
    old = store.run(run).info.run_id
    if how == "begun anew":
        begin_anew(run)
    else:
        store.client.delete_run(old)
        train(run, attempt=1, start=40, stop=60)
    store.sync(run)
    new = store.run(run).info.run_id
    assert new != old
    before = store.points(run)
    store.client.delete_experiment(store.experiment_id)
    name = store.client.get_experiment(store.experiment_id).name
    assert store.experiment(name) == store.experiment_id
    assert len(store.client.search_runs([store.experiment_id])) == 2
    if position == "lost":
        run.mlflow_path.unlink()
    store.sync(run)
    shown = store.run(run)  # there is one
    assert store.points(run)["train/loss"] == before["train/loss"]
    if position == "kept" or how == "begun anew":
        assert shown.info.run_id == new
    assert store.sync(run).points == 0


@pytest.mark.parametrize("call", ["delete_run", "create_run", "log_batch"])
def test_a_kill_while_a_run_is_begun_anew_leaves_one_right_view(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=80)
    store.sync(run)
    begin_anew(run)
    original = getattr(MlflowClient, call)

    def killed(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, killed)
        with pytest.raises(Killed):
            store.sync(run)
    store.sync(run)
    assert store.points(run) == expected(run)


# other records of the same settings -------------------------------------------------------------


def another_life(run: RunDir, *, began: float) -> None:
    """A first attempt as the trainer writes it; its losses say when it began."""
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False}, time=began))
    for step in (10, 20):
        log.emit(Event(kind="train", step=step, metrics={"train/loss": began + step}, time=began))
    log.close()
    run.update_status(state="finished", attempts=1, step=20)


def test_a_record_in_the_place_of_another_is_shown_with_its_own_points(
    store: Store, tmp_path: Path
) -> None:
    """As where a run's folder was moved away to begin anew with other code."""
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    store.sync(run)
    old = store.run(run).info.run_id
    run.path.rename(tmp_path / "aside")
    run = a_run(tmp_path)
    another_life(run, began=T0 + 9000)
    store.sync(run)
    assert store.points(run) == expected(run)
    assert store.client.get_run(old).info.lifecycle_stage == "deleted"
    run.mlflow_path.unlink()
    assert store.sync(run).created == 0
    assert store.points(run) == expected(run)


def test_equal_runs_of_two_output_folders_are_two(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [a_run(tmp_path / name) for name in ("one", "two")]
    for number, run in enumerate(runs):
        another_life(run, began=T0 + number)
    for _ in range(2):
        for run in runs:
            assert not store.sync(run, output_dir=run.output_dir).errors
    first = {
        one.data.tags["record"]: store.client.get_metric_history(one.info.run_id, "train/loss")[0]
        for one in store.client.search_runs([store.experiment_id])
    }
    assert {place: point.value for place, point in first.items()} == {
        str(run.path): T0 + number + 10 for number, run in enumerate(runs)
    }
    monkeypatch.setattr(mlflow_model, "default_uri", lambda output_dir: store.uri)
    name = store.client.get_experiment(store.experiment_id).name
    monkeypatch.setattr(mlflow_model, "experiment_name", lambda config: name)
    for run in runs:  # to which an exported model belongs
        tracked = mlflow_model.find_tracked(run)
        assert tracked.run.data.tags["record"] == str(run.path)


def test_a_model_goes_to_no_equal_run_of_another_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_model, "default_uri", lambda output_dir: store.uri)
    name = store.client.get_experiment(store.experiment_id).name
    monkeypatch.setattr(mlflow_model, "experiment_name", lambda config: name)
    theirs, mine = (a_run(tmp_path / name) for name in ("theirs", "mine"))
    for number, run in enumerate((theirs, mine)):
        another_life(run, began=T0 + number)
    store.sync(theirs, output_dir=theirs.output_dir)
    with pytest.raises(ConfigError, match="does not hold"):
        mlflow_model.find_tracked(mine)
    store.sync(mine, output_dir=mine.output_dir)
    for _ in range(2):
        assert mlflow_model.find_tracked(mine).run.data.tags["record"] == str(mine.path)
        mine.mlflow_path.unlink(missing_ok=True)  # when it began tells as much


@contextlib.contextmanager
def at(machine: Path, folder: Path) -> Iterator[Path]:
    """The machine's output folder, at the path that another machine's has, too."""
    machine.rename(folder)
    yield folder
    folder.rename(machine)  # to itself, if that is its path


def test_equal_runs_at_one_path_of_two_machines_are_two(store: Store, tmp_path: Path) -> None:
    """As in containers, where all have /workspace/outputs."""
    machines = [tmp_path / "one", tmp_path / "two"]
    for number, machine in enumerate(machines):
        machine.mkdir()
        with at(machine, tmp_path / "outputs") as folder:
            another_life(a_run(folder), began=T0 + number)
    for _ in range(2):
        for machine in machines:
            with at(machine, tmp_path / "outputs") as folder:
                assert not store.sync(a_run(folder), output_dir=folder).errors
    made = store.client.search_runs([store.experiment_id], run_view_type=ViewType.ALL)
    assert {one.info.lifecycle_stage for one in made} == {"active"}
    first = [store.client.get_metric_history(one.info.run_id, "train/loss")[0] for one in made]
    assert sorted(point.value for point in first) == [T0 + 10, T0 + 11]


@pytest.mark.parametrize("place", ["folders", "machines"])
def test_equal_runs_that_wait_in_two_folders_are_two(
    store: Store, tmp_path: Path, place: str
) -> None:
    """One begins while the other still waits. Folders of two machines have one path."""
    machines = [tmp_path / "one", tmp_path / "two"]

    def sync(number: int, *, began: float | None = None) -> str:
        """MLflow's id of the run."""
        machine = machines[number]
        with at(machine, machine if place == "folders" else tmp_path / "outputs") as folder:
            run = a_run(folder)
            if began is not None:
                another_life(run, began=began)
            assert not store.sync(run, output_dir=folder).errors
            return next(iter(run_view.named(run)))

    for machine in machines:
        machine.mkdir()
    waiting = [sync(0), sync(1)]
    assert waiting[0] != waiting[1]
    begun = [sync(0, began=T0), sync(1), sync(1, began=T0 + 1)]
    assert begun == [waiting[0], waiting[1], waiting[1]]
    made = store.client.search_runs([store.experiment_id], run_view_type=ViewType.ALL)
    assert {one.info.lifecycle_stage for one in made} == {"active"}
    firsts = {
        one.info.run_id: store.client.get_metric_history(one.info.run_id, "train/loss")[0].value
        for one in made
    }
    assert firsts == {waiting[0]: T0 + 10, waiting[1]: T0 + 11}


@pytest.mark.parametrize("dies", [False, True], ids=["answer lost", "killed"])
def test_a_run_that_waits_is_found_again_where_others_write_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path)
    create_run = MlflowClient.create_run

    def fails(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        create_run(self, *arguments, **named)
        raise Killed if dies else ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", fails)
        with pytest.raises(Killed if dies else TrackingUnreachable):
            store.sync(run, output_dir=tmp_path)
    assert store.sync(run, output_dir=tmp_path).created == 0
    assert store.status(run) == "SCHEDULED"


def test_a_run_that_waits_is_found_again_after_its_folder_was_moved(
    migrated: Path, tmp_path: Path
) -> None:
    """The address of its database has changed with it."""
    (tmp_path / "before").mkdir()
    shutil.copy(migrated, tmp_path / "before" / "mlflow.db")
    Store(tmp_path / "before").sync(a_run(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    store, run = Store(tmp_path / "after"), a_run(tmp_path / "after")
    assert store.sync(run).created == 0
    assert store.run(run).data.tags["record"] == str(run.path)


# evaluations apart from training ----------------------------------------------------------------


def evaluate(run: RunDir, *, step: int, name: str = "eval", finished: float = T0 + 500) -> None:
    """An evaluation of a checkpoint as `experiments.run.evaluate` leaves it."""
    folder = run.evals / name
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "section": "blimp",
        "step": step,
        "digest": "d",
        "metrics": {f"{name}/blimp/mean": 0.5},
        "tables": {"blimp_paradigms": [{"uid": "a", "step": step}]},
        "finished": finished + step,
    }
    atomic.write_json(folder / f"step-{step:08d}-blimp.json", result)


@pytest.mark.slow
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    order=st.permutations([("eval", 10), ("eval", 20), ("eval", 40), ("long", 20), ("long", 30)]),
    between=st.lists(st.booleans(), min_size=5, max_size=5),
    lose=st.integers(0, 5),
)
def test_evaluations_apart_are_shown_once_in_any_order(
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    order: list[tuple[str, int]],
    between: list[bool],
    lose: int,
) -> None:
    """Training itself evaluated at step 40: that point is not doubled."""
    run = a_run(tmp_path_factory.mktemp("any"))
    store.experiment_id = store.experiment(str(run.path))
    train(run, attempt=1, start=0, stop=40, state="finished")
    for i, (name, step) in enumerate(order):
        evaluate(run, name=name, step=step)
        if between[i]:
            store.sync(run)
        if i == lose:
            run.mlflow_path.unlink(missing_ok=True)
    store.sync(run)
    assert store.sync(run).points == 0
    points = store.points(run)
    assert points["eval/blimp/mean"] == [(10, 0.5), (20, 0.5), (40, 0.5)]
    assert points["long/blimp/mean"] == [(20, 0.5), (30, 0.5)]
    assert store.table(run, "long/blimp_paradigms")["data"] == [["a", 30]]
    assert store.table(run, "paloma")["data"]


def test_evaluations_of_a_life_that_no_longer_counts_are_left_out(
    store: Store, tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=40)
    evaluate(run, name="long", step=20)
    begin_anew(run)
    store.sync(run)
    assert set(store.points(run)) == {"train/loss"}


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
    with mlflow_store.lock(store.uri, store.folder):
        assert store.sync(run).busy
    assert not store.sync(run).busy


def test_a_pass_without_news_asks_nothing_of_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    syncer = store.syncer()
    syncer.sync([run])
    for call in ("search_runs", "get_run", "log_batch", "update_run", "set_terminated"):
        monkeypatch.delattr(MlflowClient, call)
    assert not syncer.sync([run]).errors
    run.update_status(step=21)  # a heartbeat alone changes nothing that MLflow shows
    assert not syncer.sync([run]).errors

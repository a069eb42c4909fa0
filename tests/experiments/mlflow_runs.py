"""Runs as the trainer records them, in milliseconds, and what a tracking store shows of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from experiments import addresses
from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from experiments.identity import run_id
from experiments.tracking import store as mlflow_store
from experiments.tracking.runs import InSweep, Syncer, SyncReport
from experiments.tracking.store import connect, open_store
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig
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
        self.uri = addresses.default_uri(folder)
        self.experiment_id = self.experiment("base")
        self.client = MlflowClient(tracking_uri=self.uri)

    def experiment(self, name: str) -> str:
        return open_store(self.uri, experiment=name, output_dir=self.folder).experiment_id

    def opened(self, **changes: Any) -> mlflow_store.Store:
        settings = {"experiment_id": self.experiment_id, "output_dir": self.folder, **changes}
        return mlflow_store.Store(uri=self.uri, client=connect(self.uri), **settings)

    def sync(
        self,
        *runs: RunDir,
        names: dict[str, str] | None = None,
        parent: str | None = None,
        states: dict[str, RunState] | None = None,
        final: bool = False,
        **place: Any,
    ) -> SyncReport:
        """By a Syncer that has seen nothing yet."""
        sweep = InSweep(names=names or {}, parent=parent)
        return Syncer(self.opened(**place)).sync(runs, sweep=sweep, states=states, final=final)

    def run(self, run: RunDir) -> Any:
        """The one MLflow run that shows `run`."""
        runs = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.run_id = '{run.run_id}'"
        )
        assert len(runs) == 1
        return runs[0]

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

    def syncer(self) -> Syncer:
        return Syncer(self.opened())

    def artifact(self, run: RunDir, path: str) -> str:
        uuid = self.run(run).info.run_id
        return (self.folder / "mlartifacts" / uuid / "artifacts" / path).read_text()

    def table(self, run: RunDir, name: str) -> dict[str, Any]:
        return json.loads(self.artifact(run, f"tables/{name}.json"))

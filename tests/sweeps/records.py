"""Sweeps on disk as a launcher and its workers leave them, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import RunConfig
from relora_core.events import Event
from sweeps.planning.plan import make_plan, store


def store_runs(
    points: Sequence[tuple[dict[str, str], RunConfig]], *, output_dir: Path, **plan: str
) -> list[RunDir]:
    """The runs of a plan of these points, which is stored; each has its folder."""
    runs = []
    for cell in store(make_plan(points, **plan), output_dir=output_dir).cells:
        runs.append(RunDir(runs_folder(output_dir) / cell.run_id))
        runs[-1].create(cell.config)
    return runs


def end_run(run: RunDir, *, loss: float, state: str = "finished", step: int = 4) -> None:
    """What a run leaves that ends with this loss."""
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False}))
    log.emit(Event(kind="train", step=step, metrics={"train/loss": loss}))
    log.emit(Event(kind="end", step=step))
    log.close()
    run.write_result({"state": state, "metrics": {"train/loss": loss}, "step": step})
    run.update_status(state=state, step=step, attempts=1)

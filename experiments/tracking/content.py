"""What an MLflow run shows and is to show, and the one place that writes the difference.

Not for: deciding what runs, arms and sweeps are to show (`runs.py`, `sweeps.py`), nor for files
(`artifacts.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from experiments.tracking.run_view import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_METRICS = 800  # per log_batch call, of 1000 in all with at most 100 params and 100 tags
TERMINAL = ("FINISHED", "FAILED", "KILLED")


@dataclass(kw_only=True, slots=True)
class Content:
    """What an MLflow run is to show."""

    name: str | None
    """None: as it is."""
    status: str
    """As MLflow names it."""
    ended: int
    """In milliseconds since the epoch; used only if the status is one of TERMINAL."""
    tags: dict[str, str]
    removable: Collection[str]
    """Tags that are removed if they are not in `tags`; all others stay."""
    params: dict[str, str]
    points: Sequence[Point]
    """To be added to its metrics."""


@dataclass(kw_only=True, slots=True)
class Shown:
    """What an MLflow run showed when it was last read or written."""

    run: str
    """MLflow's id of it."""
    place: str | None
    """Location of its files."""
    name: str | None
    status: str
    started: int
    ended: int | None
    tags: dict[str, str]
    params: set[str]
    metrics: dict[str, float]
    last: dict[str, int] = field(default_factory=dict)
    """Metric -> step of its newest point."""

    @classmethod
    def of(cls, run: Run) -> Shown:
        latest = run.data.to_proto().metrics  # of each metric the point with the largest step
        return cls(
            run=run.info.run_id,
            place=run.info.artifact_uri,
            name=run.info.run_name,
            status=run.info.status,
            started=run.info.start_time,
            ended=run.info.end_time,
            tags=dict(run.data.tags),
            params=set(run.data.params),
            metrics=dict(run.data.metrics),
            last={metric.key: metric.step for metric in latest},
        )


def differences(shown: Shown, metrics: dict[str, float], *, step: int) -> list[Point]:
    """Points to add so that the run shows `metrics`; others become NaN, as MLflow removes none.

    Each value gets an unused step, `step` or a later one: MLflow would show both values of a step.
    """
    removed = {key: math.nan for key in shown.metrics if key not in metrics}
    now = int(time.time() * 1000)
    return [
        Point(key=key, value=value, time_ms=now, step=max(step, shown.last.get(key, -1) + 1))
        for key, value in {**metrics, **removed}.items()
        if not _same(shown.metrics.get(key), value)
    ]


def _same(shown: float | None, value: float) -> bool:
    return shown is not None and (shown == value or (math.isnan(shown) and math.isnan(value)))


def apply(client: MlflowClient, shown: Shown, wanted: Content) -> None:
    """Write what differs, in as few calls as possible; updates `shown` except for its metrics."""
    from mlflow.entities import Metric, Param, RunTag

    labels = {
        "params": [Param(k, v) for k, v in wanted.params.items() if k not in shown.params],
        "tags": [RunTag(k, v) for k, v in wanted.tags.items() if shown.tags.get(k) != v],
    }
    metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in wanted.points]
    if metrics or any(labels.values()):
        client.log_batch(shown.run, metrics=metrics[:MAX_METRICS], **labels)
    for start in range(MAX_METRICS, len(metrics), MAX_METRICS):
        client.log_batch(shown.run, metrics=metrics[start : start + MAX_METRICS])
    for key in wanted.removable:
        if key in shown.tags and key not in wanted.tags:
            client.delete_tag(shown.run, key)
            del shown.tags[key]
    shown.params |= set(wanted.params)
    shown.tags |= wanted.tags
    if wanted.name and wanted.name != shown.name:
        client.update_run(shown.run, name=wanted.name)
        shown.name = wanted.name
    _set_status(client, shown, wanted)


def _set_status(client: MlflowClient, shown: Shown, wanted: Content) -> None:
    if wanted.status not in TERMINAL:
        if shown.status != wanted.status:
            client.update_run(shown.run, status=wanted.status)
            shown.status = wanted.status
    elif (shown.status, shown.ended) != (wanted.status, wanted.ended):
        client.set_terminated(shown.run, status=wanted.status, end_time=wanted.ended)
        shown.status, shown.ended = wanted.status, wanted.ended

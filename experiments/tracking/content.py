"""What an MLflow run is to show, what it shows, and the one place that writes the difference.

For runs, arms and sweeps alike. Not for: deciding what they are to show (`runs.py`, `sweeps.py`),
nor for files (`artifacts.py`).
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
    """None leaves the one that it has."""
    status: str
    """As MLflow names it."""
    ended: int
    """In milliseconds since the epoch; used only if the status is one of TERMINAL."""
    tags: dict[str, str]
    passing: Collection[str]
    """Tags to remove if `tags` does not have them; all others stay."""
    params: dict[str, str]
    points: Sequence[Point]
    """To be added to its metrics."""


@dataclass(kw_only=True, slots=True)
class Shown:
    """What an MLflow run shows, as far as we know."""

    run: str
    """MLflow's id of it."""
    place: str | None
    """Where its files are."""
    name: str | None
    status: str
    started: int
    ended: int | None
    tags: dict[str, str]
    params: set[str]
    metrics: dict[str, float]
    last: dict[str, int] = field(default_factory=dict)
    """Metric -> step of its newest point."""


def shown(run: Run) -> Shown:
    latest = run.data.to_proto().metrics  # for each key the point with the largest step
    return Shown(
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
    """Points to add so that it shows `metrics`. A metric that is not among them becomes NaN, since
    MLflow cannot remove it.

    Each value gets an unused step, `step` or a later one: MLflow's charts would show both values
    of a step.
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
    """Write what differs in as few calls as possible: params and tags go with the first points.

    Updates `shown`, except for its metrics.
    """
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
    for key in wanted.passing:
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

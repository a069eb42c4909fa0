"""What MLflow is to show of a run, read from the run's folder.

How far the record was read is a Position, so that nothing is sent twice. Not for: reading or
writing a store (`runs.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import json_files
from experiments.disk.evaluations import results
from experiments.disk.event_log import parse_event
from experiments.disk.run_dir import RunDir, Status
from experiments.identity import arm_id, label, scientific
from relora_core import atomic
from relora_core.config import EVALS, RunConfig, applies, concerns, get, walk

CHOICES = ("method", "model.name", "relora.name", "data.kind")
"""Settings that decide many others."""
MAIN = (
    *CHOICES,
    *("seed", "train.steps", "train.batch_size", "train.lr", "data.seq_len"),
)
"""Params of every run, besides the `main` knobs of its method and those that vary."""
MAX_PARAM = 6000
MAX_TAG = 5000
MAX_DIGEST = 36


@dataclass(kw_only=True, slots=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(kw_only=True, slots=True)
class Position:
    """How much of a run an MLflow run has; stored in RUN_DIR/mlflow.json."""

    run: str
    """MLflow's id of the run; before it is known, the run's tag `claim`."""
    attempt: int = 0
    """The first attempt that it shows: the newest that began at step 0."""
    began: float = 0.0
    """When that attempt began, in seconds since the epoch."""
    offset: int = 0
    """Bytes of events.jsonl that MLflow has acknowledged."""
    time: float = 0.0
    """Of the newest event before `offset`."""
    world: int = 1
    """Processes of the newest attempt before `offset`."""
    seconds: float = 0.0
    """Of training, before `offset`."""
    others: float = 0.0
    """Process-seconds of earlier attempts, beyond what `world` processes would have taken."""
    last: dict[str, int] = field(default_factory=dict)
    """Metric key -> newest step sent. A point of that step or an earlier one was sent already: a
    resumed attempt repeats the values of the one before it."""
    apart: dict[str, list[int]] = field(default_factory=dict)
    """Metric key -> steps sent from evaluations apart from training, in any order."""
    described: bool = False
    """Whether config and data sets were sent."""
    waiting: list[str] = field(default_factory=list)
    """Tables that are still to be sent."""
    sending: bool = False
    """A batch was on its way when this was written: only MLflow knows whether it arrived."""


@dataclass(kw_only=True, slots=True)
class Unsent:
    """The part of the record after a position."""

    points: list[Point]
    tables: dict[str, list[dict[str, Any]]]
    position: Position
    """The position after them."""
    restarted: bool = False
    """The run began anew at step 0: MLflow shows an attempt that no longer counts."""


def read_positions(run: RunDir) -> dict[str, Any]:
    """Store and MLflow experiment -> Position, as JSON."""
    try:
        return json_files.read(run.mlflow_path)
    except (FileNotFoundError, json_files.Damaged):  # `runs.py` then asks MLflow
        return {}


def read_position(run: RunDir, key: str) -> Position | None:
    raw = read_positions(run).get(key)
    try:
        return Position(**json_files.read_fields(Position, raw)) if raw else None
    except (ValueError, TypeError, AttributeError):
        return None


def named(run: RunDir) -> set[str]:
    """MLflow's ids in its Positions, also of stores whose address has changed since."""
    positions = [one for one in read_positions(run).values() if isinstance(one, dict)]
    return {one["run"] for one in positions if isinstance(one.get("run"), str)}


def save_position(run: RunDir, key: str, position: Position) -> None:
    atomic.write_json(run.mlflow_path, {**read_positions(run), key: dataclasses.asdict(position)})


def mark(run: RunDir) -> tuple[int, ...]:
    """Sizes and times of its files: they change when there is something new to show."""
    stamps: list[int] = []
    for path in (run.events_path, run.status_path, *sorted(run.evals.glob("*"))):
        try:
            stat = path.stat()
            stamps += [stat.st_size, stat.st_mtime_ns]
        except FileNotFoundError:
            stamps += [-1, -1]
    return tuple(stamps)


# training -----------------------------------------------------------------------------------------
def read_unsent(run: RunDir, position: Position) -> Unsent:
    """What training has recorded after `position`."""
    after = dataclasses.replace(
        position, last=dict(position.last), apart=dict(position.apart), sending=False
    )
    new = Unsent(points=[], tables={}, position=after)
    for after.offset, event in _events_after(run.events_path, position.offset):
        if event["kind"] == "start":
            _start(event, new)
        if event.get("attempt", after.attempt) < after.attempt:
            continue
        after.time = max(after.time, event["time"])
        for name, value in _metrics(event, after).items():
            key = metric_key(name)
            if event["step"] <= after.last.get(key, -1):
                continue
            after.last[key] = event["step"]
            if event["step"] not in after.apart.get(key, ()):
                new.points.append(_point(key, value, event["time"], event["step"]))
        if event["kind"] == "table":
            new.tables[event["data"]["name"]] = event["data"]["rows"]
    new.restarted = after.attempt != position.attempt and bool(position.last or position.apart)
    return new


def _start(event: Mapping[str, Any], new: Unsent) -> None:
    """Drop all before an attempt that resumes nothing, as RunDir.events() does."""
    after = new.position
    attempt = event.get("attempt", after.attempt)
    if attempt >= after.attempt:
        world = int(event["data"].get("world", 1))
        after.others += after.seconds * (after.world - world)
        after.world = world
    if event["data"].get("resumed") or attempt <= after.attempt:
        return
    new.points, new.tables = [], {}
    after.attempt, after.began = attempt, event["time"]
    after.time, after.seconds, after.others, after.last, after.apart = 0.0, 0.0, 0.0, {}, {}


def beginnings(run: RunDir) -> set[float]:
    """When its attempts that resumed nothing began: copies of a record have these in common."""
    starts = (event for event in run.raw_events() if event["kind"] == "start")
    return {event["time"] for event in starts if not event["data"].get("resumed")}


def _metrics(event: Mapping[str, Any], after: Position) -> dict[str, float]:
    """The event's metrics, and the device-hours of training so far, an axis of MLflow's charts."""
    metrics = event["metrics"]
    if event["kind"] == "train" and "perf/train_seconds" in metrics:
        after.seconds = metrics["perf/train_seconds"]
        hours = (after.seconds * after.world + after.others) / 3600
        return {**metrics, "train/gpu_hours": hours}
    return metrics


def _point(key: str, value: Any, seconds: float, step: int) -> Point:
    return Point(key=key, value=float(value), time_ms=int(seconds * 1000), step=step)


def _events_after(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset after it, event) of each complete line that is an event."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        file.seek(offset if offset <= path.stat().st_size else 0)
        offset = file.tell()
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with contextlib.suppress(ValueError):
                yield offset, parse_event(line)


def metric_key(name: str) -> str:
    """`name` without what MLflow refuses in a key: it would refuse the whole batch."""
    key = re.sub(r"[^\w/.\- :]", "_", name)
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))[:250]


# evaluations apart from training ------------------------------------------------------------------
def read_unsent_evaluations(run: RunDir, position: Position) -> Unsent:
    """Results of separate evaluations that were not sent, of the attempts that count."""
    after = dataclasses.replace(position, apart=dict(position.apart))
    new = Unsent(points=[], tables={}, position=after)
    fresh: set[str] = set()
    for result in results(run):  # oldest step first, so that the newest of a table stays
        if result["finished"] < position.began:
            continue
        points = [
            _point(key, value, result["finished"], result["step"])
            for name, value in result["metrics"].items()
            if result["step"] not in after.apart.get(key := metric_key(name), ())
        ]
        for point in points:
            after.apart[point.key] = [*after.apart.get(point.key, ()), point.step]
        new.points += points
        tables = {f"{result['name']}/{name}": rows for name, rows in result["tables"].items()}
        new.tables |= tables
        fresh |= set(tables) if points else set()
    new.tables = {path: rows for path, rows in new.tables.items() if path in fresh}
    return new


def tables(run: RunDir, position: Position) -> dict[str, list[dict[str, Any]]]:
    """The newest rows of every table, of the attempts that count."""
    trained = read_unsent(run, Position(run=position.run))
    return trained.tables | read_unsent_evaluations(run, trained.position).tables


# what the run is ----------------------------------------------------------------------------------
def varying(configs: Sequence[RunConfig]) -> list[str]:
    """Scientific keys that differ between runs with equal CHOICES."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for config in configs:
        groups.setdefault(_choices(config), []).append(scientific(config))
    keys = dict.fromkeys(key for rows in groups.values() for row in rows for key in row)
    return [
        key
        for key in keys
        if any(len({repr(row.get(key)) for row in rows}) > 1 for rows in groups.values())
    ]


def _choices(config: RunConfig) -> tuple[Any, ...]:
    return tuple(get(config, key) for key in CHOICES)


def params(config: RunConfig, *, varying: Sequence[str]) -> dict[str, str]:
    """MAIN and `varying`, where they apply; the whole config is an artifact."""
    wanted, chosen = {*MAIN, *varying}, {}
    for key, f, value in walk(config):
        shown = key in wanted or f.metadata.get("main")
        if shown and value is not None and applies(f.metadata, config) and concerns(config, key):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            chosen[key] = text[:MAX_PARAM]
    return chosen


def arm_name(name: str, config: RunConfig) -> str:
    """The run's name without its seed; the experiment's name if only seeds vary."""
    words = [word for word in name.split() if not word.startswith("seed=")]
    return " ".join(words).removesuffix(f"-s{config.seed}") or config.experiment


def default_name(config: RunConfig) -> str:
    """The name of a run that no sweep names."""
    return f"{label(config)}-s{config.seed}"


def tags(run: RunDir, config: RunConfig, status: Status, *, name: str) -> dict[str, str]:
    attempts = run.attempt_records()
    newest = attempts[-1] if attempts else {}
    step = run.newest_step()
    dirty, commit = newest.get("dirty"), newest.get("commit")
    values: dict[str, Any] = {
        "kind": "run",
        "run_id": run.run_id,
        "arm": arm_id(config),
        "arm_name": arm_name(name, config),
        "seed": config.seed,
        "sweep": config.sweep.name,
        "method": config.method,
        "mode": config.relora.name if config.method == "relora" else None,
        "model": config.model.name,
        "commit": commit and commit[:12],
        "dirty": None if dirty is None else str(dirty).lower(),
        "job_id": status.job_id,
        "attempts": status.attempts,
        "host": status.host,
        "state": status.state,
        "reason": getattr(status, "reason", None) or status.error,
        **run.trial_tags(),
        "checkpoint": run.checkpoints.absolute() / f"step-{step:08d}" if step else None,
        "mlflow.source.name": "run.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
    }
    return {k: str(v)[:MAX_TAG] for k, v in values.items() if v is not None and v != ""}


def ended_ms(status: Status, position: Position) -> int:
    """When a run ended: at its last event, or if it has no result at a later status."""
    seconds = position.time
    if not status.state.done or not seconds:
        seconds = max(seconds, status.heartbeat) or time.time()
    return int(seconds * 1000)


@dataclass(kw_only=True, slots=True)
class DatasetInput:
    """Data that the run reads, by name and digest."""

    name: str
    digest: str
    source_type: str
    source: str
    """JSON, in the format of the source type."""
    context: str
    """`training` or `eval`."""


def datasets(config: RunConfig) -> list[DatasetInput]:
    """The data, and the evals that are on, if they have a fingerprint."""
    data = config.data
    wanted = [(data.kind, data.path, data.fingerprint, "training")]
    for name in EVALS:
        section = getattr(config.eval, name)
        if section.enabled:
            wanted.append((name, section.path, section.fingerprint, "eval"))
    return [
        _dataset(kind, path, digest, context) for kind, path, digest, context in wanted if digest
    ]


def _dataset(kind: str, path: str | None, digest: str, context: str) -> DatasetInput:
    source_type, source = _source(path)
    return DatasetInput(
        name=Path(path).name if path and context == "training" else kind,
        digest=digest[:MAX_DIGEST],
        source_type=source_type,
        source=json.dumps(source),
        context=context,
    )


def _source(path: str | None) -> tuple[str, dict[str, Any]]:
    """(source type, source) as MLflow's UI reads them; no path: our own generator."""
    if path is None:
        return "code", {"tags": {"mlflow.source.name": "relora_core/data/grammar.py"}}
    if Path(path).exists():
        return "local", {"uri": str(Path(path).absolute())}
    return "hugging_face", {"path": path}


# tables -------------------------------------------------------------------------------------------
def table_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the UI's table view reads them; it would leave dotted columns blank."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    finite = [[_json_cell(row.get(column)) for column in columns] for row in rows]
    return json.dumps({"columns": [c.replace(".", "_") for c in columns], "data": finite})


def _json_cell(value: Any) -> Any:
    # A browser refuses the NaN that Python writes.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

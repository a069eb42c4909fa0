"""Reads a sweep's plan, records and results as tidy data (`data.py`), without torch.

What cannot be read of a run is stated in its data. Not for: estimates (`stats.py`), pictures
(`figures/`), text (`page.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments import colours
from experiments.colours import Look
from experiments.disk import frozen, inputs
from experiments.disk.evaluations import PLAIN, results, unlike
from experiments.disk.named import find_run
from experiments.disk.output_dir import plan_folder
from experiments.disk.plans import (
    PlannedRun,
    SweepRecord,
    question,
    read_sweep,
    single_run,
    sweep_names,
)
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState, state_of
from experiments.disk.states import State
from experiments.identity import config_from_json
from experiments.json_files import READ_ERRORS
from experiments.metrics import LOSS
from experiments.report.data import Arm, Attempt, Evaluated, Point, RunData, Sweep, settings
from relora_core.config import EVALS, ConfigError, RunConfig, nearest, runs_eval

KINDS = ("method", "data.kind", *(f"eval.{name}.enabled" for name in EVALS))
"""Settings that decide which others apply."""
_TABLE = re.compile(
    rb'\{"attempt": (\d+), "kind": "table", "step": (\d+), .{0,80}?"name": "([^"]+)"'
)


def gather(
    output_dir: Path | str,
    sweep: str,
    *,
    states: Mapping[str, RunState] | None = None,
    beside: Sequence[str] = (),
) -> Sweep:
    """The sweep with all data of its runs; ConfigError if there is no such plan.

    `states` are those that a scheduler gave, by run_id; other runs' states are read from their
    files. `beside` names models from elsewhere, which are further arms.
    """
    record, configs = _plan(output_dir, sweep)
    for word in beside:
        run = _evaluated(output_dir, word)
        record.runs.append(run)
        configs.append(run.dir.config())
    runs = [
        _run(planned, config, states=states or {})
        for planned, config in zip(record.runs, configs, strict=True)
    ]
    notes = [*record.notes, *drop_unlike_evaluations(runs)]
    return Sweep(
        name=sweep,
        question=question(sweep, record.overrides, [config.experiment for config in configs]),
        commands=record.commands,
        collapsed=record.collapsed,
        same_arms=record.same_arms,
        notes=notes,
        arms=_arms(
            runs,
            names={run.arm_id: run.arm for run in reversed(record.runs)},
            axes={run.arm_id: run.axes for run in reversed(record.runs)},
            looks=colours.looks(record.runs),
        ),
    )


def drop_unlike_evaluations(runs: Sequence[RunData]) -> list[str]:
    """Drop the numbers of separate evaluations that are `unlike`; a note of each of these, and of
    each other one that different code has made.
    """
    notes = []
    known = [
        (run.config if run.metrics else None, {k: one.digest for k, one in run.evaluated.items()})
        for run in runs
    ]
    left_out = unlike(known)
    for key, places in left_out.items():
        for run in (runs[place] for place in places):
            for metric in run.evaluated[key].metrics:
                run.metrics.pop(metric, None)
                run.curves.pop(metric, None)
            for table in run.evaluated[key].tables:
                run.tables.pop(table, None)
        name, section = key
        notes.append(
            f"evaluations of {section} under the name {name} had other settings in some runs and "
            "are left out: python -m sweeps eval --as NEW_NAME evaluates all runs alike"
        )
    for name, section in dict.fromkeys(key for run in runs for key in run.evaluated):
        if (name, section) not in left_out and len(_codes(runs, name, section)) > 1:
            notes.append(
                f"evaluations of {section} under the name {name} were made by code of relora_core "
                "with different hashes, so that a difference between runs may be the code's: "
                "python -m sweeps eval --as NEW_NAME evaluates all runs alike"
            )
    return notes


def _codes(runs: Sequence[RunData], name: str, section: str) -> set[str]:
    """code_hash of all that scored the runs: under the plain name training, too."""
    codes = {run.evaluated[name, section].code for run in runs if (name, section) in run.evaluated}
    if name == PLAIN and section in EVALS:
        own = [run for run in runs if run.metrics and runs_eval(run.config, section)]
        codes |= {run.code[-1] for run in own if run.code}
    return codes - {""}


def _evaluated(output_dir: Path | str, word: str) -> PlannedRun:
    """The run of a model from elsewhere that `word` names; ConfigError for any other."""
    run = single_run(find_run(output_dir, word=word))
    if "foreign" not in run.config:
        raise ConfigError(
            f"--beside must name models that `python -m experiments evaluate` has evaluated, got "
            f"{word!r}, the run {run.run_id} that was trained here"
        )
    return replace(run, name=run.config["model"]["name"], arm=run.config["model"]["name"])


def _plan(output_dir: Path | str, sweep: str) -> tuple[SweepRecord, list[RunConfig]]:
    """The sweep's record, and the configs of its runs."""
    names = sweep_names(output_dir)
    if sweep not in names:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ConfigError(
            f"SWEEP must be one of {some or 'none yet'} in {output_dir}, got {sweep!r}."
            f"{nearest(sweep, names)}"
        )
    try:
        record = read_sweep(output_dir, sweep)
        if not record.runs:
            raise ValueError("it has no runs")
        configs = [config_from_json(json.dumps(run.config)) for run in record.runs]
        folder = Path(output_dir).absolute()
        return record, [frozen.read(config, output_dir=folder) for config in configs]
    except READ_ERRORS as error:
        path = plan_folder(output_dir, name=sweep) / "plan.json"
        raise ConfigError(
            f"{path} must be a plan as this version writes it ({error}); plan the sweep anew"
        ) from None


# arms -------------------------------------------------------------------------------------------
def _arms(
    runs: Sequence[RunData],
    *,
    names: Mapping[str, str],
    axes: Mapping[str, Mapping[str, str]],
    looks: Mapping[str, Look],
) -> list[Arm]:
    arms: dict[str, Arm] = {}
    for run in runs:
        if run.arm_id not in arms:
            arms[run.arm_id] = Arm(
                arm_id=run.arm_id,
                name=names[run.arm_id],
                axes={key: value for key, value in axes[run.arm_id].items() if key != "seed"},
                **looks[run.arm_id]._asdict(),
            )
        arms[run.arm_id].runs.append(run)
    rows = {arm.arm_id: settings(arm.runs[0].config) for arm in arms.values()}
    keys = _varying(list(rows.values()))
    for arm in arms.values():
        arm.runs.sort(key=lambda run: run.seed)
        arm.settings = {k: rows[arm.arm_id][k] for k in keys if k in rows[arm.arm_id]}
    return list(arms.values())


def _varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with several values among the arms that they apply to.

    A knob that was added later is absent at the value that means "as before": it also varies if
    only some rows of one kind have it.
    """
    kinds = [tuple(repr(row.get(key)) for key in KINDS) for row in rows]
    keys = []
    for key in dict.fromkeys(key for row in rows for key in row):
        has = [key in row for row in rows]
        values = {repr(row[key]) for row in rows if key in row}
        if len(values) > 1 or len(set(zip(kinds, has, strict=True))) > len(set(kinds)):
            keys.append(key)
    return keys


# runs -------------------------------------------------------------------------------------------
def _run(planned: PlannedRun, config: RunConfig, *, states: Mapping[str, RunState]) -> RunData:
    run_dir = planned.dir
    run = RunData(
        run_id=planned.run_id,
        arm_id=planned.arm_id,
        name=planned.name,
        seed=config.seed,
        config=config,
    )
    try:
        state = states.get(run.run_id) or state_of(run_dir)
        run.state, run.reason, run.step = state.state, state.reason, state.step
        _read_record(run, run_dir)
        _read_evaluations(run, run_dir)
        run.attempts = [_attempt(record) for record in run_dir.attempt_records()]
        run.changed = sorted({c["key"] for c in inputs.accepted(run_dir, by=inputs.TRAINING)})
        run.cost.attempts = max(state.attempts, len(run.attempts))
        if state.state.done:
            result = run_dir.result() or {}
            run.metrics = _final(run, result)
            run.step = result.get("step", run.step)
            run.loss_steps = result.get("loss_steps") or _since_log(run)
    except READ_ERRORS as error:
        what = " ".join(str(error).split())[:200]
        run.state, run.metrics = "unreadable", {}
        run.reason = f"its files are damaged ({type(error).__name__}: {what})"
    run.cost.tokens = run.step * config.train.batch_size * config.data.seq_len
    return run


def _final(run: RunData, result: Mapping[str, Any]) -> dict[str, float]:
    """The result's metrics, and those of separate evaluations at its last step.

    A diverged run ends between two evals: what it measured before is no number of its end.
    """
    curves = run.curves.items()
    ends = {name: points[-1].value for name, points in curves if points[-1].step == result["step"]}
    if result.get("state") == State.DIVERGED:
        return ends
    own = {name: float(value) for name, value in result["metrics"].items()}
    return {name: value for name, value in ends.items() if name not in own} | own


def _since_log(run: RunData) -> int:
    """Updates since the last log: earlier versions averaged those for the final loss."""
    steps = [0, 0, *(point.step for point in run.curves.get(LOSS.key, []))]
    return steps[-1] - steps[-2]


def _attempt(record: Mapping[str, Any]) -> Attempt:
    gpus = record.get("gpus") or []
    names = [str(g.get("name", g)) if isinstance(g, Mapping) else str(g) for g in gpus]
    hardware = ", ".join(f"{n} x {name}" for name, n in Counter(names).items())
    return Attempt(
        host=record.get("host") or "",
        python=record.get("python") or "",
        code_hash=record.get("code_hash") or "",
        commit=record.get("commit") or "",
        dirty=record.get("dirty"),
        hardware=hardware or str(record.get("cpu") or ""),
        packages=record.get("packages") or {},
    )


def _read_record(run: RunData, run_dir: RunDir) -> None:
    """Fill in curves, tables, restarts and cost from one reading of events.jsonl."""
    events, tables, spans = _read_events(run_dir.events_path)
    hours, seconds, world = 0.0, 0.0, 1
    steps, clock = [0], [0.0]
    for event in events:
        if event["kind"] == "start":
            world = int(event["data"].get("world", 1))
            notes = event["data"].get("notes", [])
            run.notes += [str(note) for note in notes if note not in run.notes]
        elif "perf/train_seconds" in event["metrics"]:
            now = event["metrics"]["perf/train_seconds"]
            hours, seconds = hours + max(0.0, now - seconds) * world / 3600, now
            steps.append(event["step"])
            clock.append(hours)
    per_step = run.config.train.batch_size * run.config.data.seq_len
    at_events = np.interp([event["step"] for event in events], steps, clock).tolist()
    for event, at_event in zip(events, at_events, strict=True):
        step = event["step"]
        if event["kind"] == "restart":
            run.restarts.append(step)
        if event["kind"] != "system":
            at = step, step * per_step, at_event
            for name, value in event["metrics"].items():
                _add(run.curves.setdefault(name, []), Point(*at, float(value)))
    run.tables |= tables
    run.cost.gpu_hours = hours
    run.cost.all_hours = sum((last - first) * n / 3600 for first, last, n in spans.values())
    run.step = max(run.step, steps[-1])


def _add(curve: list[Point], point: Point) -> None:
    """Add a point; it replaces one of the same step, which a resumed run measured again."""
    if curve and curve[-1].step == point.step:
        curve.pop()
    curve.append(point)


def _read_events(
    path: Path,
) -> tuple[
    list[dict[str, Any]], dict[str, list[dict[str, Any]]], dict[int, tuple[float, float, int]]
]:
    """The events that count (RunDir.events); table -> rows; attempt -> (begin, end, processes).

    Tables are most of a record's bytes: only the newest of each name is parsed.
    """
    events: list[dict[str, Any]] = []
    tables: dict[str, list[tuple[int, bytes]]] = {}
    spans: dict[int, tuple[float, float, int]] = {}
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return [], {}, {}
    with file:
        for line in file:
            if not line.endswith(b"\n"):  # being written, or torn by a kill
                break
            if (match := _TABLE.match(line)) and line.endswith(b"}\n"):
                tables.setdefault(match[3].decode(), []).append((int(match[2]), line))
                continue
            try:
                event = json.loads(line)
                kind, step, metrics, data = (event[k] for k in ("kind", "step", "metrics", "data"))
                if not isinstance(metrics, dict) or not isinstance(data, dict):
                    continue
            except READ_ERRORS:  # half a line, left by a kill
                continue
            if kind == "table":
                tables.setdefault(data.get("name", ""), []).append((step, line))
                continue
            attempt, world = event.get("attempt", 1), int(data.get("world", 1))
            begin, _, world = spans.get(attempt, (event["time"], 0.0, world))
            spans[attempt] = begin, event["time"], world
            if kind == "start":
                limit = step if data.get("resumed", False) else -1
                events = [e for e in events if e["step"] <= limit]
                tables = {n: [t for t in table if t[0] <= limit] for n, table in tables.items()}
            events.append(event)
    return events, {name: rows for name, table in tables.items() if (rows := _rows(table))}, spans


def _rows(lines: Sequence[tuple[int, bytes]]) -> list[dict[str, Any]]:
    """The rows of the newest complete line."""
    for _, line in reversed(lines):
        with contextlib.suppress(*READ_ERRORS):
            return json.loads(line)["data"]["rows"]
    return []


def _read_evaluations(run: RunData, run_dir: RunDir) -> None:
    """Add separate evaluations as further points and tables.

    Under the plain name, tables of the last step are the run's own, as the metrics are; what
    training has measured itself stays.
    """
    evaluations = list(results(run_dir))
    if not evaluations:
        return
    places = sorted({p[:3] for points in run.curves.values() for p in points})
    steps, hours = [0, *(k[0] for k in places)], [0.0, *(k[2] for k in places)]
    per_step = run.config.train.batch_size * run.config.data.seq_len
    added: dict[str, list[Point]] = {}
    for evaluation in evaluations:
        step = evaluation["step"]
        at = step, step * per_step, float(np.interp(step, steps, hours))
        for name, value in evaluation["metrics"].items():
            added.setdefault(name, []).append(Point(*at, float(value)))
        key = evaluation["name"], evaluation["section"]
        tables = {f"{evaluation['name']}/{n}": rows for n, rows in evaluation["tables"].items()}
        if evaluation["name"] == PLAIN and step == run.step:
            tables |= {n: rows for n, rows in evaluation["tables"].items() if n not in run.tables}
        run.tables |= tables
        run.evaluated[key] = Evaluated(
            digest=evaluation["digest"],
            code=str(evaluation.get("code_hash") or ""),
            metrics=list(evaluation["metrics"]),
            tables=list(tables),
        )
    for name, points in added.items():
        by_step = {point.step: point for point in [*points, *run.curves.get(name, [])]}
        run.curves[name] = [by_step[step] for step in sorted(by_step)]

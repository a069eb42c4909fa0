"""What evaluations of checkpoints have stored beside a run, and all final metrics of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from experiments import json_files
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State

if TYPE_CHECKING:
    pass


def steps_of(run_dir: RunDir) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    names = [path.name[5:] for path in run_dir.checkpoints.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


# results ------------------------------------------------------------------------------------------
STORED = {"name": str, "section": str, "step": int, "digest": str}
STORED |= {"metrics": dict[str, float], "tables": dict[str, list[dict[str, Any]]]}


def results(run_dir: RunDir, *, name: str = "*") -> Iterator[dict[str, Any]]:
    """Every stored result, oldest step first."""
    for path in sorted(run_dir.evals.glob(f"{name}/step-*.json"), key=lambda path: path.name):
        with contextlib.suppress(
            json_files.Damaged
        ):  # a damaged result: the step is evaluated again
            result = json_files.read(path)
            if json_files.has_types(result, STORED):
                yield result


def evaluations(run_dir: RunDir) -> dict[int, dict[str, float]]:
    """Step -> metrics of all evaluations apart from training, oldest step first."""
    merged: dict[int, dict[str, float]] = {}
    for result in results(run_dir):
        merged.setdefault(result["step"], {}).update(result["metrics"])
    return merged


def all_metrics(run_dir: RunDir) -> dict[str, float]:
    """The result's metrics, and those of separate evaluations at the newest step evaluated.

    Where both have a metric the result counts. Of a finished run only evaluations of its last step
    count: an earlier checkpoint's numbers are not the run's.
    """
    result = run_dir.result() or {}
    by_step = evaluations(run_dir)
    newest = max(by_step, default=0)
    if result.get("state") == State.FINISHED:
        newest = result["step"]
    return by_step.get(newest, {}) | result.get("metrics", {})

"""One warm process for all of these tests, an undisturbed run, and what any other must be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.tracking.run_view import Position, read_unsent
from relora_core import checkpoint
from sweeps.retention import Policy, judge
from tests.faults.inject import Runner, runner, small_run

KILLED = -9
LAYOUT = {"config.json", "status.json", "events.jsonl", "result.json", "error.txt"}


@pytest.fixture(scope="session")
def warm_runner() -> Iterator[Runner]:
    with runner() as one:
        yield one


@pytest.fixture(scope="session")
def undisturbed(warm_runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = warm_runner.attempt(small_run(out))
    assert done.code == 0, done.output
    return out


def only_run(output_dir: Path | str) -> RunDir:
    (run,) = all_runs(output_dir)
    return run


def numbers(run: RunDir) -> dict[str, Any]:
    """All that a run computes: final metrics, the record, weights, moments and generators."""
    result = run.result()
    assert result is not None
    newest = checkpoint.complete(run.checkpoints)[-1]
    states = torch.load(newest / "rng.pt", weights_only=True)
    files = [*newest.glob("*.safetensors"), newest / "optimizer.pt"]
    return {
        "state": (result["state"], result["step"], newest.name),
        "metrics": _timeless(result["metrics"]),
        "record": record(run),
        "points": points(run),
        "generators": [state["torch"].numpy().tobytes() for state in states],
        "files": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }


def record(run: RunDir) -> dict[tuple[str, int, str], Any]:
    """(kind, step, name) -> value; what a resumed run measured again must be what it was."""
    found: dict[tuple[str, int, str], Any] = {}
    for event in run.events():
        values = _timeless(event["metrics"])
        if event["kind"] == "table":
            values[event["data"]["name"]] = event["data"]["rows"]
        for name, value in values.items():
            key = event["kind"], event["step"], name
            assert found.setdefault(key, value) == value, key
    return found


def points(run: RunDir) -> dict[tuple[str, int], float]:
    """(metric, step) -> value, as MLflow is told: each once."""
    found: dict[tuple[str, int], float] = {}
    for point in read_unsent(run, Position(run="-")).points:
        if not point.key.startswith("perf/") and point.key != "train/gpu_hours":
            assert (point.key, point.step) not in found
            found[point.key, point.step] = point.value
    return found


def _timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def orphans(output_dir: Path) -> list[str]:
    """Files that belong to no run and that `python -m sweeps gc` would not name."""
    run = only_run(output_dir)
    for path in output_dir.rglob(".*.tmp"):  # a younger one may be somebody's
        os.utime(path, (0, 0))
    torn = judge(run, state=state_of(run).state, policy=Policy()).torn
    known = {run.path / name for name in LAYOUT} | set(run.attempts.glob("[0-9]*.json"))
    known |= {f for path in checkpoint.complete(run.checkpoints) for f in path.iterdir()}
    files = [p for p in output_dir.rglob("*") if not p.is_dir()]
    return [
        str(p.relative_to(output_dir))
        for p in files
        if p not in known and not any(t == p or t in p.parents for t in torn)
    ]


def assert_sound(output_dir: Path, *, undisturbed: Path) -> None:
    """The run has ended with the numbers of the undisturbed one and has left nothing behind."""
    run, other = only_run(output_dir), only_run(undisturbed)
    assert state_of(run).state == "finished"
    assert numbers(run) == numbers(other)
    assert run.lock_holder() is None
    assert orphans(output_dir) == []

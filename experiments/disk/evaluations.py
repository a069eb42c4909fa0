"""Stored results of evaluations apart from training, and all final metrics of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from experiments import json_files
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from relora_core.config import EvalConfig

PLAIN = "eval"
"""The name under which metrics have the keys that they have in training: eval/paloma/perplexity."""
STORED = {"name": str, "section": str, "step": int, "digest": str}
STORED |= {"metrics": dict[str, float], "tables": dict[str, list[dict[str, Any]]]}


def results(run_dir: RunDir, *, name: str = "*") -> Iterator[dict[str, Any]]:
    """Every stored result, oldest step first."""
    for path in sorted(run_dir.evals.glob(f"{name}/step-*.json"), key=lambda path: path.name):
        with contextlib.suppress(json_files.Damaged):  # the step will be evaluated again
            result = json_files.read(path)
            if json_files.has_types(result, STORED):
                yield result


def evaluations(run_dir: RunDir) -> dict[int, dict[str, float]]:
    """Step -> metrics of all stored results, oldest step first."""
    merged: dict[int, dict[str, float]] = {}
    for result in results(run_dir):
        merged.setdefault(result["step"], {}).update(result["metrics"])
    return merged


def all_metrics(run_dir: RunDir) -> dict[str, float]:
    """The result's metrics, and those of evaluations of the newest step that has any.

    A metric that both have is the result's. Of a finished run only evaluations of its last step
    count: an earlier checkpoint's numbers are not the run's.
    """
    result = run_dir.result() or {}
    by_step = evaluations(run_dir)
    newest = max(by_step, default=0)
    if result.get("state") == State.FINISHED:
        newest = result["step"]
    return by_step.get(newest, {}) | result.get("metrics", {})


def settings_digest(eval: EvalConfig, section: str) -> str:
    """Digest of the settings that the eval's numbers depend on; a fingerprint stands for a path."""
    own = getattr(eval, section)
    values = {
        f.name: getattr(own, f.name)
        for f in dataclasses.fields(own)
        if f.metadata.get("scientific", True)
        and f.name not in ("enabled", "every_steps")
        and ("as_before" not in f.metadata or getattr(own, f.name) != f.metadata["as_before"])
    }
    return hashlib.sha256(json.dumps([section, values]).encode()).hexdigest()[:16]

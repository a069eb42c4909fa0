"""Stored results of evaluations apart from training, and all final metrics of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from experiments import json_files
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from relora_core.config import EVALS, EvalConfig, RunConfig, runs_eval

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


def final_metrics(run_dir: RunDir) -> dict[str, float]:
    """`all_metrics`; of a diverged run only those that were measured at its last step, as in
    reports: it ends between two evals, and what it measured before is no number of its end.
    """
    result = run_dir.result() or {}
    if result.get("state") == State.DIVERGED:
        return metrics_at(run_dir, step=result["step"])
    return all_metrics(run_dir)


def metrics_at(run_dir: RunDir, *, step: int) -> dict[str, float]:
    """What the run measured at this step, and evaluations of its checkpoint."""
    measured: dict[str, float] = {}
    for event in run_dir.events():
        if event["step"] == step and event["kind"] != "system":
            measured |= event["metrics"]
    return evaluations(run_dir).get(step, {}) | measured


def unlike(
    runs: Sequence[tuple[RunConfig | None, Mapping[tuple[str, str], str]]],
) -> dict[tuple[str, str], list[int]]:
    """(name, section) of each separate evaluation whose settings, as a limit, differ between `runs`
    -> places of the runs whose numbers of it are not to be compared.

    A run is its config, None without numbers of training, and the digest of each evaluation. Under
    the plain name these stand beside numbers of training, which stay.
    """
    found = {}
    for key in dict.fromkeys(key for _, evaluated in runs for key in evaluated):
        name, section = key
        apart, digests = [], set[str]()
        for place, (config, evaluated) in enumerate(runs):
            plain = name == PLAIN and section in EVALS
            if config is not None and plain and runs_eval(config, section):
                digests.add(settings_digest(config.eval, section))
            elif key in evaluated:
                apart.append(place)
                digests.add(evaluated[key])
        if apart and len(digests) > 1:
            found[key] = apart
    return found


def settings_digest(eval: EvalConfig, section: str) -> str:
    """Digest of `eval_settings`."""
    values = eval_settings(eval, section)
    return hashlib.sha256(json.dumps([section, values]).encode()).hexdigest()[:16]


def eval_settings(eval: EvalConfig, section: str) -> dict[str, Any]:
    """The settings that the eval's numbers depend on, equal for any two evals of the same texts.

    A fingerprint stands for a path, and `moot` and `same_as` count as in `identity.essential`.
    """
    own = getattr(eval, section)
    config: Any = SimpleNamespace(eval=eval)  # these knobs depend on no other section
    values = {}
    for f in dataclasses.fields(own):
        meta, value = f.metadata, getattr(own, f.name)
        if not meta.get("scientific", True) or f.name in ("enabled", "every_steps"):
            continue
        if any(rules_out(config) for rules_out in meta.get("moot", {}).values()):
            value = f.default
        elif "same_as" in meta:
            value = meta["same_as"](config)
        if "as_before" not in meta or value != meta["as_before"]:
            values[f.name] = value
    return values

"""Which checkpoints and code snapshots may be removed, and their removal, which is atomic.

Nothing of a run is removed while it is queued, running or lost. The newest checkpoint of a run that
has not finished stays, and so does any run's only one. Not for: the command (`commands/gc.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.disk.evaluations import evaluations
from experiments.disk.output_dir import jobs_folder, plan_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.disk.states import State
from experiments.metrics import goes_up, headline
from relora_core.config import ConfigError, nearest
from sweeps.slurm.submission import APPEARS_S, alive, recover

IN_USE = (State.QUEUED, State.RUNNING, State.LOST)
"""States in which a process may be using the run's files."""
LOADABLE = ("model.safetensors", "progress.json")
COMPLETE = (*LOADABLE, "optimizer.pt", "rng.pt")
"""Files of a checkpoint. One with only LOADABLE (a user kept the weights) is not removed."""
SNAPSHOT_AGE_S = 3600.0
"""A younger snapshot may belong to a launch that has not written its submission yet."""


@dataclass(kw_only=True, slots=True)
class Policy:
    """How many checkpoints of each run stay."""

    keep_latest: int = 1
    keep_best: int = 0
    metric: str | None = None
    """Ranks checkpoints; None: perplexity if the run has it, else the training loss."""
    maximize: bool | None = None
    """None: accuracies up, all else down."""


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What to do with one run's checkpoints."""

    run_id: str
    keep: list[int] = field(default_factory=list)
    """Steps."""
    remove: list[Path] = field(default_factory=list)
    """Folders of complete checkpoints, oldest first."""
    torn: list[Path] = field(default_factory=list)
    """Files and folders left by kills during a write or a removal."""
    bytes: int = 0
    """Freed by removing all of these."""
    note: str = ""
    """Why nothing of the run is removed, or how its checkpoints were ranked."""


# checkpoints ------------------------------------------------------------------------------------
def judge(run: RunDir, *, state: State, policy: Policy) -> Verdict:
    """What `policy` says of a run in `state`; removes nothing."""
    checkpoints = {step_of(p): p for p in run.checkpoints.glob("step-*") if p.name[5:].isdigit()}
    complete = {step: path for step, path in sorted(checkpoints.items()) if _has(path, COMPLETE)}
    if state in IN_USE:
        return Verdict(run_id=run.run_id, keep=sorted(checkpoints), note=f"{state}: left alone")
    if linked := [p for p in (run.path, run.checkpoints, *checkpoints.values()) if p.is_symlink()]:
        note = f"{linked[0].name} is a link, to what may be another's: left alone"
        return Verdict(run_id=run.run_id, keep=sorted(checkpoints), note=note)
    keep, note = _choose(run, list(complete), state=state, policy=policy)
    torn = [path for path in checkpoints.values() if not _has(path, LOADABLE)]
    torn += sorted(run.checkpoints.glob(".tmp-step-*")) + run.torn()
    verdict = Verdict(
        run_id=run.run_id,
        keep=sorted(keep),
        remove=[path for step, path in complete.items() if step not in keep],
        torn=torn,
        note=note,
    )
    verdict.bytes = count_bytes([*verdict.remove, *verdict.torn])
    return verdict


def step_of(path: Path) -> int:
    return int(path.name[5:])


def _has(path: Path, names: Sequence[str]) -> bool:
    return all((path / name).exists() for name in names)


def _choose(run: RunDir, steps: list[int], *, state: State, policy: Policy) -> tuple[set[int], str]:
    """The steps that stay, and how they were ranked."""
    keep = set(steps[-policy.keep_latest :] if policy.keep_latest else [])
    if state != State.FINISHED or len(steps) == 1:
        keep |= set(steps[-1:])  # the run resumes from it
    if not policy.keep_best or not steps:
        return keep, ""
    values = at_steps(run, steps)
    loss, *of_evals = [metric.key for metric in headline()]
    usual = (of_evals[0], loss)
    metric = policy.metric or next((key for key in usual if values.get(key)), usual[0])
    ranked = values.get(metric, {})
    if not ranked:
        return set(steps), f"no {metric} at any checkpoint: all stay"
    up = goes_up(metric) if policy.maximize is None else policy.maximize
    sign = -1.0 if up else 1.0
    best = sorted(ranked, key=lambda step: (sign * ranked[step], -step))[: policy.keep_best]
    listed = ", ".join(f"{ranked[step]:.5g} at {step}" for step in best)
    return keep | set(best), f"best {metric}: {listed}"


def at_steps(run: RunDir, steps: Sequence[int] | None) -> dict[str, dict[int, float]]:
    """Metric -> step -> finite value at these steps (None: at all), of training and evaluations."""
    logged = [(event["step"], event["metrics"]) for event in run.events()]
    values: dict[str, dict[int, float]] = {}
    for step, metrics in [*evaluations(run).items(), *logged]:
        for name, value in metrics.items():
            if (steps is None or step in steps) and math.isfinite(value):
                values.setdefault(name, {})[step] = value
    return values


def check(policy: Policy, *, runs: Sequence[RunDir]) -> None:
    """ConfigError for a policy that keeps nothing or ranks by a metric that no run has."""
    for key, value in (("keep-latest", policy.keep_latest), ("keep-best", policy.keep_best)):
        if value < 0:
            raise ConfigError(f"--{key} must be >= 0, got {value}; nearest valid: 0")
    if not policy.keep_latest and not policy.keep_best:
        raise ConfigError(
            "--keep-latest must be >= 1 where --keep-best is 0, got 0; nearest valid: 1"
        )
    if policy.metric is None:
        return
    if not policy.keep_best:
        raise ConfigError("--metric needs --keep-best, got 0; nearest valid: --keep-best 1")
    measured = {name for run in runs for name in at_steps(run, None)}
    if policy.metric not in measured:
        raise ConfigError(
            f"--metric must be one that these runs have measured, got {policy.metric!r}."
            f"{nearest(policy.metric, sorted(measured))}"
        )


# removal ----------------------------------------------------------------------------------------
def remove(verdict: Verdict, *, run: RunDir) -> None:
    """Remove what the verdict lists; BlockingIOError if the run is in use now."""
    if verdict.torn or verdict.remove:
        now = state_of(run).state
        if now in IN_USE:
            raise BlockingIOError(None, f"is {now} by now: left alone")
    for path in verdict.torn:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, onerror=_make_writable)
        else:
            path.unlink(missing_ok=True)
    for path in verdict.remove:
        discard(path)


def discard(path: Path) -> None:
    """Remove a folder; after a kill it is complete, or has a temporary name."""
    aside = path.with_name(f".tmp-{path.name}-gc-{os.getpid()}")
    path.rename(aside)
    shutil.rmtree(aside, onerror=_make_writable)


def _make_writable(function: Callable[..., object], path: str, error: object) -> None:
    """Try again with write permission: snapshots may be read-only. A file removed since is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.chmod(os.path.dirname(path), stat.S_IRWXU)
        if not os.path.islink(path):  # chmod would reach what it points to
            os.chmod(path, stat.S_IRWXU)
        function(path)


def count_bytes(paths: Sequence[Path]) -> int:
    """Bytes that removing all of `paths`, files or folders, frees.

    A file with several hard links counts only if all of them are removed.
    """
    files: dict[tuple[int, int], os.stat_result] = {}
    links: Counter[tuple[int, int]] = Counter()
    alone = [(str(path.parent), [], [path.name]) for path in paths if not path.is_dir()]
    for folder, _, names in [*alone, *(step for path in paths for step in os.walk(path))]:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = os.lstat(os.path.join(folder, name))
                files[file.st_dev, file.st_ino] = file
                links[file.st_dev, file.st_ino] += 1
    return sum(file.st_size for key, file in files.items() if links[key] >= file.st_nlink)


# snapshots --------------------------------------------------------------------------------------
def old_snapshots(output_dir: Path | str, *, sweep: str, states: Mapping[str, State]) -> list[Path]:
    """Code snapshots of a sweep that no job can still read, and what is left of removed ones.

    `states` are those of the sweep's runs, by run_id. Empty while any of them is in use or a job of
    the sweep may still run. SlurmError if SLURM must be asked and does not answer.
    """
    folder = plan_folder(output_dir, name=sweep) / "code"
    if folder.is_symlink() or folder.parent.is_symlink():
        return []
    young = time.time() - SNAPSHOT_AGE_S
    snapshots = [
        path
        for path in sorted(folder.glob("*"))
        if path.is_dir() and not path.is_symlink() and path.stat().st_ctime < young
    ]
    if not snapshots or any(state in IN_USE for state in states.values()):
        return []
    return [] if _jobs_alive(output_dir, sweep=sweep) else snapshots


def _jobs_alive(output_dir: Path | str, *, sweep: str) -> bool:
    """Whether a job of the sweep may still run: no run's state shows those of evaluations."""
    if not jobs_folder(output_dir, name=sweep).exists():
        return False
    submissions = recover(output_dir, sweep)
    recent = time.time() - APPEARS_S
    if any(one.state == "submitting" and one.created > recent for one in submissions):
        return True
    return bool(alive(submissions))

"""What the commands share: the runs that arguments name, and looking at them, SLURM asked seldom.

Not for: judging a run's state (`sweeps/slurm/survey.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.disk.named import find_run, named, several
from experiments.disk.output_dir import all_runs
from experiments.disk.plans import PlannedRun, read_sweeps, single_run, sweep_names
from experiments.disk.state import RunState, state_of
from experiments.environment import RUN
from relora_core.config import ConfigError, nearest
from sweeps.slurm import survey as scheduler

ASK_S = 20.0
"""Shortest time between two questions to the scheduler, of a command that looks again and again."""

Run = PlannedRun


# which runs -------------------------------------------------------------------------------------
def runs_of(output_dir: Path | str, *, sweep: str | None = None) -> list[Run]:
    """The runs of `sweep`; without it all runs, each once. Few of their configs are read."""
    sweeps = read_sweeps(output_dir)
    if sweep is not None:
        check_sweep(sweep, list(sweeps), output_dir=output_dir)
    chosen: dict[str, Run] = {}
    for name in [sweep] if sweep is not None else sweeps:
        for run in sweeps[name].runs:
            chosen.setdefault(run.run_id, run)
    for name, record in sweeps.items():
        for run in record.runs:
            if run.run_id in chosen:
                chosen[run.run_id].sweeps.append(name)
    if sweep is None:
        singles = [run for run in all_runs(output_dir) if run.run_id not in chosen]
        chosen |= {run.run_id: single_run(run) for run in singles}
    return list(chosen.values())


def check_sweep(sweep: str, sweeps: Sequence[str], *, output_dir: Path | str) -> None:
    """ConfigError unless there is a plan of this name."""
    if sweep not in sweeps:
        some = ", ".join(sweeps[:8]) + (", ..." if len(sweeps) > 8 else "")
        hint = nearest(sweep, list(sweeps))
        if hits := named(output_dir, sweep):
            owners = _owners(output_dir, hits)
            hint = f" It names runs of {', '.join(owners) or 'no sweep'}: this command takes SWEEP."
        raise ConfigError(
            f"SWEEP must be one of {some or 'none yet'} in {output_dir}, got {sweep!r}.{hint}"
        )


def _owners(output_dir: Path | str, run_ids: Sequence[str]) -> list[str]:
    every = (run for run in runs_of(output_dir) if run.run_id in run_ids)
    return list(dict.fromkeys(name for run in every for name in run.sweeps))


def find_sweep(output_dir: Path | str, word: str) -> str:
    """The sweep called `word`, or the only sweep with a run, arm or job of that name."""
    sweeps = read_sweeps(output_dir)
    if word in sweeps:
        return word
    everything = [run.run_id for sweep in sweeps.values() for run in sweep.runs]
    owners = _owners(output_dir, [word] if word in everything else named(output_dir, word))
    if len(owners) != 1:
        return word
    print(f"{word} is of the sweep {owners[0]}: all of it", file=sys.stderr)
    return owners[0]


def has_jobs_alone(output_dir: Path | str, word: str) -> bool:
    """Whether `word` names a search that has jobs but no trials yet, hence no plan."""
    folders = Path(output_dir).glob("sweeps/*/jobs")
    return word not in sweep_names(output_dir) and word in {
        folder.parent.name for folder in folders
    }


def resolve(output_dir: Path | str, words: Sequence[str]) -> list[Run]:
    """The runs that `words` name, each once.

    A word is a sweep, the name, arm or job of runs as `status` shows it, or a part of one run's id.
    """
    everything = {run.run_id: run for run in runs_of(output_dir)}
    sweeps = list(dict.fromkeys(name for run in everything.values() for name in run.sweeps))
    chosen: dict[str, Run] = {}
    for word in words:
        if word in sweeps:  # in the order of its plan, with the names that it has there
            members = runs_of(output_dir, sweep=word)
        elif word not in everything and (hits := named(output_dir, word)):
            members = [everything[run_id] for run_id in hits]
        elif any(word in run.run_id for run in all_runs(output_dir)):
            members = [everything[find_run(output_dir, word=word).run_id]]
        elif word in everything:  # planned, and without a folder yet
            members = [everything[word]]
        else:
            hint = nearest(word, [*sweeps, *everything])
            raise ConfigError(
                f"SWEEP|RUN must be the name of a sweep, a run, an arm or a job, or (part of) the "
                f"id of a run in {output_dir}, got {word!r}."
                f"{hint or ' `python -m sweeps status --json` lists them.'}"
            )
        for run in members:
            chosen.setdefault(run.run_id, run)
    return list(chosen.values())


def named_runs(output_dir: Path | str, word: str | None) -> list[Run]:
    """The runs that `status` and `watch` show: all, or those that `word` names."""
    sweeps = sweep_names(output_dir)
    if word is None or word in sweeps:
        return runs_of(output_dir, sweep=word)
    try:
        return resolve(output_dir, [word])
    except ConfigError:
        check_sweep(word, sweeps, output_dir=output_dir)
        raise


def one_run(output_dir: Path | str, word: str) -> Run:
    """The run that `word` names; ConfigError if it names several."""
    chosen = resolve(output_dir, [word])
    if len(chosen) != 1:
        raise several(word, [run.run_id for run in chosen])
    return chosen[0]


def is_named(output_dir: Path | str, word: str) -> bool:
    """Whether `word` is the name of a run or an arm, as `status` shows them."""
    return bool(named(output_dir, word))


# looking ----------------------------------------------------------------------------------------
def survey(runs: Sequence[Run]) -> dict[str, RunState]:
    """run_id -> state, with the scheduler's answers; a run without steps has the plan's."""
    states = scheduler.survey([run.dir for run in runs])
    return {run.run_id: _with_steps(states[run.run_id], run) for run in runs}


def _with_steps(state: RunState, run: Run) -> RunState:
    return state if state.steps else dataclasses.replace(state, steps=run.steps)


class Observer:
    """Looks at runs again and again; the scheduler is asked at most every ASK_S seconds.

    In between, a run's state comes from its files. As long as that is the state they gave when the
    scheduler was asked, the judgement of that time is reused.
    """

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._own: dict[str, RunState] = {}
        self._judged: dict[str, RunState] = {}

    @property
    def due(self) -> bool:
        """Whether the next look asks the scheduler."""
        return time.monotonic() - self._asked >= ASK_S

    def look(self, runs: Sequence[Run], *, ask: bool = False) -> dict[str, RunState]:
        """run_id -> state as it is now; `ask` asks the scheduler at once."""
        own = {run.run_id: _with_steps(state_of(run.dir), run) for run in runs}
        if ask or self.due:
            self._own, self._judged = own, survey(runs)
            self._asked = time.monotonic()
            return self._judged
        return {run_id: self._merged(run_id, state) for run_id, state in own.items()}

    def _merged(self, run_id: str, own: RunState) -> RunState:
        before, judged = self._own.get(run_id), self._judged.get(run_id)
        if before is None or judged is None:
            return own
        if (own.state, own.attempts) != (before.state, before.attempts):
            return own
        reason = judged.reason if judged.reason != before.reason else own.reason
        return dataclasses.replace(own, state=judged.state, reason=reason)


def counts(states: Sequence[RunState]) -> str:
    """`3 finished, 1 running`."""
    totals = Counter(state.state for state in states)
    return ", ".join(f"{n} {state}" for state, n in totals.items())


def no_runs(output_dir: Path | str) -> str:
    return f"no runs in {output_dir} yet: `{RUN}` makes one"


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="name of a sweep (default: all)")


def add_runs(parser: argparse.ArgumentParser) -> None:
    names = "sweep, run, arm or job (default: all)"
    parser.add_argument("sweep", nargs="?", metavar="SWEEP|RUN", help=names)

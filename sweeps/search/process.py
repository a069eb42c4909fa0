"""What each process of a search does: it takes trials and runs them, until none is left.

    python -P -m sweeps.search.process STUDY

There is no driver: processes meet only in the study. If a process ends early, its trial stays its
own (a requeued job resumes it) until another process sees that it will not come back.
Not for: starting processes (`processes.py`), nor signals (`sweeps/job.py`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from experiments import notices
from experiments.disk import inputs, presence
from experiments.disk.output_dir import cache_dir, place_of_study
from experiments.disk.process import is_alive, process_start
from experiments.disk.run_dir import SILENT_AFTER_S, RunDir
from experiments.disk.states import Outcome
from experiments.errors import RunLocked, one_line
from experiments.run.runner import run_experiment
from experiments.run.stopping import StopFlag
from experiments.scheduler import current_job
from relora_core import data
from relora_core.config import ConfigError
from relora_core.data.base import DataError
from relora_core.events import Event
from sweeps import worker
from sweeps.attempt import follow, is_stalled, redirect_output
from sweeps.planning.plan import make_plan, store
from sweeps.search import reads
from sweeps.search.arms import open_studies
from sweeps.search.objective import REPORTS, seed_value
from sweeps.search.study import Study
from sweeps.search.trial import Trial, Worker, spell
from sweeps.slurm import cluster
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.submission import submitted_jobs
from sweeps.slurm.survey import is_dead
from sweeps.worker import FAILED, FINISHED, INTERRUPTED

PRELOAD = worker.PRELOAD
"""What any trial imports: a warm parent has it already (`sweeps/local/warm.py`)."""
MAX_STALLED = 5
"""Attempts at a run without a new checkpoint, after which its trial has failed; of a job it is
hydra.launcher.max_stalled."""
LOOK_EVERY_S = 2.0


def work(
    folder: Path | str,
    *,
    stop: StopFlag,
    most: int | None = None,
    max_stalled: int = MAX_STALLED,
) -> int:
    """Run trials until none is left; the exit code.

    `most` is for a job of the scheduler: it takes so many at most, and the next one only if all
    before have ended early.
    """
    studies, me = open_studies(folder), this_process()
    with presence.shown(place_of_study(folder).output_dir) as file:
        code = _take_turns(studies, me, stop=stop, most=most, max_stalled=max_stalled)
        if code != INTERRUPTED or me.job_id is not None:  # whether a job goes on, SLURM says
            file.unlink(missing_ok=True)
    return code


def _take_turns(
    studies: list[Study], me: Worker, *, stop: StopFlag, most: int | None, max_stalled: int
) -> int:
    taken, gave_up = 0, False
    while True:
        stop.next_run()
        if stop():
            return INTERRUPTED
        trial = None
        for study in in_turn(studies, me):
            if has_failed(study) or has_changed(study):
                studies.remove(study)  # the other arms go on
                gave_up = True
            elif trial := study.take(me, has_ended=HasEnded(study)):
                break
        if trial is None:
            return FAILED if gave_up else FINISHED
        print(f"{trial.name}: {spell(trial.params)}", flush=True)
        taken += 1
        early = run_trial(trial, stop=stop, max_stalled=max_stalled)
        if early is None:
            return INTERRUPTED
        if most is not None and (taken >= most or not early):
            return FINISHED


def in_turn(studies: Sequence[Study], me: Worker) -> list[Study]:
    """The studies in the order to ask them for a trial: first one with a trial of this worker, then
    those with the fewest trials, so that a search may be stopped at any time and all arms have been
    tried as often."""

    def rank(study: Study) -> tuple[bool, int]:
        mine = any(trial.belongs_to(me) for trial in study.running())
        return not mine, len(study.trials())

    return sorted(studies, key=rank) if len(studies) > 1 else list(studies)


def has_failed(study: Study) -> bool:
    """Whether too many trials in a row have failed; then print so."""
    reasons = study.failures()
    if len(reasons) < study.config.max_failures:
        return False
    arm = f"{study.arm}: " if study.arm else ""
    print(
        f"error: {arm}the newest {len(reasons)} trials failed (search.max_failures="
        f"{study.config.max_failures}); the newest: {reasons[0]}",
        file=sys.stderr,
    )
    return True


def has_changed(study: Study) -> bool:
    """Whether trials would read other data than the search was planned with; then print so."""
    try:
        reads.check(study.spec, study.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return True
    return False


# owners -----------------------------------------------------------------------------------------
def this_process() -> Worker:
    return Worker(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        birth=process_start(os.getpid()),
        job_id=current_job(),
    )


@dataclass
class HasEnded:
    """Whether the worker of a trial has ended and will not resume it; if in doubt: no.

    SLURM is asked once, for the jobs of all running trials.
    """

    study: Study

    def __call__(self, worker: Worker) -> bool:
        here = worker.host == socket.gethostname()
        if worker.job_id is not None and (not here or worker.job_id in self._submitted):
            return self._is_over(worker.job_id)
        place, pid, birth = self.study.output_dir, worker.pid, worker.birth
        shown = presence.is_shown(place, host=worker.host, pid=pid, birth=birth)
        if shown is None and not here:
            return False
        return not (shown or is_alive(pid, birth=birth, started=worker.started))

    @cached_property
    def _submitted(self) -> set[str]:
        return submitted_jobs(self.study.output_dir)

    @cached_property
    def _jobs(self) -> dict[str, cluster.Job] | None:
        """What SLURM answers; None: nothing."""
        ids = {trial.worker.job_id for trial in self.study.running()}
        with contextlib.suppress(SlurmError):
            if cluster.available():
                return cluster.jobs(sorted(id_ for id_ in ids if id_ is not None))
        return None

    def _is_over(self, job_id: str) -> bool:
        """Of a job; one that waits was requeued and keeps its trial."""
        if self._jobs is None:
            return False
        job = self._jobs.get(job_id)
        return self._is_silent(job_id) if job is None else job.over

    def _is_silent(self, job_id: str) -> bool:
        """Whether the runs of a job that SLURM does not know have stopped writing."""
        written = [
            max(run.status().heartbeat, run.path.stat().st_mtime)
            for trial in self.study.running()
            if trial.worker.job_id == job_id
            for run in trial.runs
            if run.path.exists()
        ]
        return time.time() - max(written, default=0.0) > SILENT_AFTER_S


# one trial --------------------------------------------------------------------------------------
def run_trial(trial: Trial, *, stop: StopFlag, max_stalled: int = MAX_STALLED) -> bool | None:
    """Run the trial at each seed and end it in the study; whether it ended before its last step.

    None if this process is to end: the trial goes on later, in this job or another.
    """
    try:
        runs = prepare(trial)
        for index, run_dir in enumerate(runs):
            stop.next_run()
            outcome = _run_seed(trial, run_dir, index=index, stop=stop, max_stalled=max_stalled)
            if outcome is None:
                return True
            if outcome is Outcome.INTERRUPTED:
                return None
            if outcome is Outcome.PRUNED:
                trial.prune()
                print(f"{trial.name}: pruned at step {run_dir.newest_step()}", flush=True)
                return True
            if outcome is Outcome.CANCELLED:
                raise ConfigError(f"{run_dir.run_id} was cancelled")
        verdict = trial.finish()
        print(f"{trial.name}: {verdict.values or verdict.reason}", flush=True)
        return verdict.values is None
    except (ConfigError, DataError) as error:
        return _failed(trial, str(error))
    except Exception as error:
        traceback.print_exc()
        return _failed(trial, one_line(error))


def _failed(trial: Trial, reason: str) -> bool:
    trial.fail(reason)
    print(f"{trial.name} failed: {reason}", file=sys.stderr, flush=True)
    return True


def prepare(trial: Trial) -> list[RunDir]:
    """The trial's runs, made as those of any sweep: folders, places in the plan, data."""
    output_dir = trial.study.output_dir
    configs = [trial.config(seed) for seed in trial.seeds]
    runs = trial.runs
    for run_dir, config in zip(runs, configs, strict=True):
        run_dir.create(config)
        if not trial.is_newest_of(run_dir) and not _is_at_work(run_dir):
            run_dir.cancel_path.unlink(missing_ok=True)  # the request was not for this trial
    trial.write_records()
    reads.record_accepted(trial.study.folder, runs)
    plan = make_plan([({}, config) for config in configs], name=trial.study.name)
    plan.notes = [*trial.study.spec.notes, *notices.across(configs)]
    store(plan, output_dir=output_dir)
    opened = inputs.open_for_training(runs[0], configs[0])
    data.prepare(opened.data, cache_dir=cache_dir(output_dir), progress=print)
    return runs


def _is_at_work(run_dir: RunDir) -> bool:
    """Whether a process, of another trial or a grid, may be at work on the run."""
    holder = run_dir.lock_holder()
    return holder is not None and not is_dead(holder, heartbeat=run_dir.status().heartbeat)


def _run_seed(
    trial: Trial, run_dir: RunDir, *, index: int, stop: StopFlag, max_stalled: int
) -> Outcome | None:
    """How the run ended; None if another process has the trial by now."""
    config = run_dir.config()
    listener = SearchSink(trial, stop=stop, index=index)
    while True:
        listener.replay(run_dir)  # again after a wait: another process was at work on the run
        if not run_dir.ended() and is_stalled(run_dir, limit=max_stalled):
            raise DataError(
                f"{max_stalled} attempts at {run_dir.run_id} ended at step "
                f"{run_dir.newest_step()} without a new checkpoint"
            )
        heartbeat = run_dir.status().heartbeat
        try:
            with redirect_output(run_dir), follow(run_dir):
                outcome = run_experiment(
                    config,
                    run_dir,
                    console=True,
                    stop=stop,
                    is_dead=lambda holder, at=heartbeat: is_dead(holder, heartbeat=at),
                    extra_sinks=[listener],
                )
            return listener.after_seed(outcome, run_dir)
        except RunLocked:
            if not trial.belongs_to(this_process()):
                return None
            # Another trial, or a grid, is at work on the same run: its result serves both.
            if stop():
                return Outcome.INTERRUPTED
            time.sleep(LOOK_EVERY_S)


class SearchSink:
    """Reports to the study what pruners need, and ends the run if the pruner decides so.

    A pruner compares one curve of each trial, that of the first seed. Wilcoxon's test compares
    trials seed by seed: each seed is reported once, at its end.
    """

    def __init__(self, trial: Trial, *, stop: StopFlag, index: int) -> None:
        search = trial.study.config
        self.trial, self.stop, self.index = trial, stop, index
        self.metric, self.pruner = search.prune_metric, search.pruner["name"]
        self.pruning = self.pruner != "none"
        self.reporting = len(search.objectives) == 1
        self.steps = trial.config(trial.seeds[0]).train.steps
        self.every = self.steps / REPORTS
        self.next = 0.0

    def emit(self, event: Event) -> None:
        if self.pruner == "wilcoxon" or self.index or not self.reporting:
            return
        if self.metric in event.metrics and event.step >= self.next:
            self.next = event.step + self.every
            self.trial.report(event.step, event.metrics[self.metric])
            # At the last step there is nothing to save: the trial is complete.
            if self.pruning and event.step < self.steps and self.trial.should_prune():
                self.stop.prune()

    def replay(self, run_dir: RunDir) -> None:
        """Report what an earlier attempt or a grid has logged of the run, without pruning."""
        self.pruning, before = False, self.pruning
        for event in run_dir.events():
            self.emit(Event(kind=event["kind"], step=event["step"], metrics=event["metrics"]))
        self.pruning = before

    def after_seed(self, outcome: Outcome, run_dir: RunDir) -> Outcome:
        """How the run ended; PRUNED if no further seed should be run."""
        if self.pruner != "wilcoxon" or outcome not in (Outcome.FINISHED, Outcome.DIVERGED):
            return outcome
        value = seed_value(self.trial.study.config, run_dir)
        if value is not None:
            self.trial.report(self.index, value)
        last = self.index + 1 == len(self.trial.seeds)
        return Outcome.PRUNED if not last and self.trial.should_prune() else outcome


# as a scheduler's job ---------------------------------------------------------------------------
def trials_per_job(folder: Path | str) -> int:
    return open_studies(folder)[0].config.trials_per_job


def runs_of_job(folder: Path | str) -> list[RunDir] | None:
    """The begun runs of the trial that this job has not finished; None if it has no trial."""
    job_id = current_job()
    for study in open_studies(folder):
        for trial in study.running():
            if job_id is not None and trial.worker.job_id == job_id:
                return [run for run in trial.runs if run.status().attempts]
    return None


# the process ------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    """See the module's docstring."""
    if len(argv) != 1:
        print("usage: python -m sweeps.search.process STUDY", file=sys.stderr)
        return 2
    stop = StopFlag()
    with stop.installed():
        try:
            return work(argv[0], stop=stop)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))

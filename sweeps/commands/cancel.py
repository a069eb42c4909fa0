"""`cancel`: ask runs to end, wherever they are; they keep their checkpoints.

The request is a marker in the run's folder: whatever starts or trains the run reads it. Signals and
scancel only make that sooner.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from collections.abc import Mapping, Sequence

import psutil

from experiments.disk.output_dir import run_at
from experiments.disk.process import is_alive
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState, state_of
from experiments.disk.states import State
from experiments.errors import RunLocked
from relora_core import shared
from relora_core.config import ConfigError
from sweeps.commands import selection
from sweeps.commands.selection import Run
from sweeps.slurm import cluster
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.submission import adopt, alive, recover, submitted_jobs, unanswered

HELP = "end runs that are queued or running; they keep their checkpoints"
EXAMPLES = """examples:
  python -m sweeps cancel model-relora.r          a whole sweep; says what and asks first
  python -m sweeps cancel tiny-relora-r16 --yes
The command that started a run, or `retry --cancelled`, goes on from its newest checkpoint.
"""
GRACE_S = 10.0
"""Longest wait for running runs to end."""
MOST_SHOWN = 20
"""Runs that are listed."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="SWEEP|RUN", help="sweep, run, arm, job, or part of a run_id"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """0 when all were asked to end, 1 when scancel failed for some."""
    named = [word for word in args.words if not selection.has_jobs_alone(args.output_dir, word)]
    chosen = selection.resolve(args.output_dir, named)
    problem = None
    try:  # a command that was killed inside sbatch has not recorded its jobs in the runs
        for sweep in dict.fromkeys(name for one in chosen for name in one.sweeps):
            adopt(args.output_dir, sweep)
    except SlurmError as error:
        problem = str(error)
    before = selection.survey(chosen)
    active = [one for one in chosen if before[one.run_id].state.in_flight]
    others = [before[one.run_id] for one in chosen if one not in active]
    if others:
        print(f"left alone: {selection.counts(others)}")
    more = []
    try:
        jobs = _jobs(active, before, output_dir=args.output_dir)
        more = _jobs_without_runs(args.words, output_dir=args.output_dir)
    except SlurmError as error:
        jobs, problem = _recorded_jobs(active, before, output_dir=args.output_dir), str(error)
    if not active and not more:
        _cancel_interrupted(chosen, before, output_dir=args.output_dir)
        if problem:
            print(f"SLURM: {problem}; there may be jobs of theirs", file=sys.stderr)
        return int(problem is not None)
    job_ids = [*_jobs_of_only(jobs, output_dir=args.output_dir), *more]
    if not _confirm(active, before, job_ids=job_ids, yes=args.yes):
        print("nothing was cancelled")
        return 0
    for one in active:
        shared.touch(one.dir.cancel_path)
    still_alive: set[str] = set()
    if job_ids:
        try:
            cluster.cancel(job_ids)
        except SlurmError as error:
            problem, still_alive = str(error), _alive(job_ids)
    for one in active:
        if one.run_id not in jobs:
            terminate(one.dir)
    _settle([one for one in active if jobs.get(one.run_id) not in still_alive], before)
    if active or not problem:
        _print_result(active)
    if problem:
        print(f"SLURM: {problem}; the runs end once they see the request", file=sys.stderr)
    return int(problem is not None)


def _cancel_interrupted(
    runs: Sequence[Run], states: Mapping[str, RunState], *, output_dir: str
) -> None:
    """Mark runs whose command was interrupted inside sbatch: SLURM may have their jobs later."""
    sweeps = dict.fromkeys(name for one in runs for name in one.sweeps)
    fresh = {run_id for name in sweeps for run_id in unanswered(output_dir, name)}
    planned = [one for one in runs if states[one.run_id].state is State.PLANNED]
    interrupted = [one for one in planned if one.run_id in fresh]
    if not interrupted:
        print("nothing to cancel: none of them is queued or running")
        return
    for one in interrupted:
        shared.touch(one.dir.cancel_path)
    print(
        f"{len(interrupted)} runs: the command that submitted them was interrupted, and SLURM "
        "lists no job of theirs so far; if it takes one yet, that ends when it begins"
    )


# which jobs -------------------------------------------------------------------------------------
def _recorded_jobs(
    runs: Sequence[Run], states: Mapping[str, RunState], *, output_dir: str
) -> dict[str, str]:
    """run_id -> its SLURM job, if we have submitted that; no other is ours to end."""
    named = {r.run_id: job for r in runs if (job := states[r.run_id].job_id) is not None}
    ours = submitted_jobs(output_dir) if named else set()
    return {run_id: job for run_id, job in named.items() if job in ours}


def _jobs(
    runs: Sequence[Run], states: Mapping[str, RunState], *, output_dir: str
) -> dict[str, str]:
    """run_id -> its SLURM job, also if the command that submitted it could not record the id."""
    jobs = _recorded_jobs(runs, states, output_dir=output_dir)
    unknown = {run.run_id for run in runs} - jobs.keys()
    for sweep in dict.fromkeys(s for r in runs if r.run_id in unknown for s in r.sweeps):
        for submission in recover(output_dir, sweep):
            task_jobs = submission.job_ids()
            if submission.state == "submitted" and not _is_recorded(task_jobs, output_dir):
                jobs |= {run_id: job for run_id, job in task_jobs.items() if run_id in unknown}
    return jobs


def _jobs_without_runs(words: Sequence[str], *, output_dir: str) -> list[str]:
    """Jobs of searches and evaluations of the sweeps that are among `words`."""
    submissions = [one for word in words for one in recover(output_dir, word)]
    return alive(one for one in submissions if one.kind != "train")


def _alive(jobs: Sequence[str]) -> set[str]:
    """The jobs that are still alive after scancel; all of them if SLURM does not answer."""
    try:
        by_id = cluster.jobs(jobs)
    except SlurmError:
        return set(jobs)
    return {job_id for job_id, job in by_id.items() if job.alive and job.state != "COMPLETING"}


def _is_recorded(jobs: Mapping[str, str], output_dir: str) -> bool:
    """Whether the job ids have reached the runs' status files."""
    runs = [run_at(output_dir, run_id) for run_id in jobs]
    return any(run.status().job_id is not None for run in runs)


def _jobs_of_only(jobs: Mapping[str, str], *, output_dir: str) -> list[str]:
    """The jobs in which no other run is active; a packed job with another one is not ended."""
    if not jobs:
        return []
    ours = set(jobs.values())
    others = [r for r in selection.runs_of(output_dir) if r.run_id not in jobs]
    together = [r for r in others if r.dir.status().job_id in ours and not r.dir.ended()]
    states = selection.survey(together)
    shared_jobs = {states[r.run_id].job_id for r in together if states[r.run_id].state.in_flight}
    return sorted(ours - shared_jobs)


def _confirm(
    runs: Sequence[Run], states: Mapping[str, RunState], *, job_ids: Sequence[str], yes: bool
) -> bool:
    """Print what is to be cancelled and ask, unless `yes`; whether it is to be done."""
    what = selection.counts([states[r.run_id] for r in runs])
    print(f"to cancel: {what or 'jobs that have no run yet'}")
    for run in runs[:MOST_SHOWN]:
        job = states[run.run_id].job_id
        print(f"  {states[run.run_id].state:<8} {run.name}" + (f"  (job {job})" if job else ""))
    if len(runs) > MOST_SHOWN:
        print(f"  ... and {len(runs) - MOST_SHOWN} more")
    if job_ids:
        more = f" and {len(job_ids) - 10} more" if len(job_ids) > 10 else ""
        print(f"SLURM jobs: {' '.join(job_ids[:10])}{more}")
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("--yes must be given where nobody can be asked (stdin is no terminal)")
    return input("cancel? [y/N] ").strip().lower() in ("y", "yes")


# ending them ------------------------------------------------------------------------------------
def terminate(run_dir: RunDir) -> bool:
    """SIGTERM to the process of this host that holds the run; False if there is none."""
    holder = run_dir.lock_holder()
    if holder is None or holder["host"] != socket.gethostname():
        return False
    if not is_alive(holder["pid"], birth=holder.get("birth"), started=holder.get("started", 0.0)):
        return False  # of a container with this host's name, where pids mean other processes
    try:
        psutil.Process(holder["pid"]).terminate()
    except psutil.Error:  # it has ended meanwhile, or is another user's
        return False
    return True


def _settle(runs: Sequence[Run], before: Mapping[str, RunState]) -> None:
    """Wait a while for the runs to end; mark as cancelled those that no process will mark."""
    deadline = time.monotonic() + GRACE_S
    waiting = list(runs)
    while waiting:
        for run in list(waiting):
            was = before[run.run_id]
            ours = was.state is State.QUEUED or was.job_id is None  # else its job writes it
            if state_of(run.dir).state is State.CANCELLED or (ours and write_cancelled(run.dir)):
                waiting.remove(run)
        if not waiting or time.monotonic() >= deadline:
            return
        time.sleep(0.2)


def write_cancelled(run_dir: RunDir) -> bool:
    """Write `cancelled` unless a process has the run or it has ended; whether it is over."""
    with contextlib.suppress(RunLocked), run_dir.lock():
        if not run_dir.ended():
            run_dir.update_status(state=State.CANCELLED, phase="", eta_s=None, error=None)
        return True
    return False


def _print_result(runs: Sequence[Run]) -> None:
    after = selection.survey(runs)
    print(f"now: {selection.counts(list(after.values())) or 'no jobs'}")
    still = [run for run in runs if after[run.run_id].state.in_flight]
    for run in still[:MOST_SHOWN]:
        state = after[run.run_id]
        where = (
            f"on {state.host or 'its host'}" if state.state is State.RUNNING else "when it begins"
        )
        print(f"  {state.state} {run.name}: asked to end, {where}")

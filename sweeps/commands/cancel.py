"""`cancel`: ask runs to end, wherever they are; they keep their checkpoints.

The marker in the run's folder is the request: whoever starts or works on the run reads it. Signals
and scancel only make that sooner. Not for: deleting anything.
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
  python -m sweeps cancel r16-t60-grammar-s0 --yes
The command that started a run, or `retry --cancelled`, goes on from its newest checkpoint.
"""
GRACE_S = 10.0
"""How long we look at running runs end before we leave them to it."""
TELL = 20


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
    try:  # a command that was ended inside sbatch has left jobs that no run knows of
        for sweep in dict.fromkeys(name for one in chosen for name in one.sweeps):
            adopt(args.output_dir, sweep)
    except SlurmError as error:
        problem = str(error)
    before = selection.survey(chosen)
    going = [one for one in chosen if before[one.run_id].state.in_flight]
    alone = [before[one.run_id] for one in chosen if one not in going]
    if alone:
        print(f"left alone: {selection.counts(alone)}")
    more = []
    try:
        jobs = _jobs(going, before, output_dir=args.output_dir)
        more = _without_runs(args.words, output_dir=args.output_dir)
    except SlurmError as error:
        jobs, problem = _known_jobs(going, before, output_dir=args.output_dir), str(error)
    if not going and not more:
        sweeps = dict.fromkeys(name for one in chosen for name in one.sweeps)
        fresh = {run_id for name in sweeps for run_id in unanswered(args.output_dir, name)}
        planned = [one for one in chosen if before[one.run_id].state is State.PLANNED]
        if unheard := [one for one in planned if one.run_id in fresh]:
            for one in unheard:
                shared.touch(one.dir.cancel_path)
            print(
                f"{len(unheard)} runs: the command that submitted them was interrupted, and SLURM "
                "lists no job of theirs so far; if it takes one yet, that ends when it begins"
            )
        else:
            print("nothing to cancel: none of them is queued or running")
        if problem:
            print(f"SLURM: {problem}; there may be jobs of theirs", file=sys.stderr)
        return int(problem is not None)
    job_ids = [*_wholly_ours(jobs, output_dir=args.output_dir), *more]
    if not _agreed(going, before, job_ids=job_ids, yes=args.yes):
        print("nothing was cancelled")
        return 0
    for one in going:
        shared.touch(one.dir.cancel_path)
    still_alive: set[str] = set()
    if job_ids:
        try:
            cluster.cancel(job_ids)
        except SlurmError as error:
            problem, still_alive = str(error), _alive(job_ids)
    for one in going:
        if one.run_id not in jobs:
            terminate(one.dir)
    _settle([one for one in going if jobs.get(one.run_id) not in still_alive], before)
    if going or not problem:
        _tell(going)
    if problem:
        print(f"SLURM: {problem}; the runs end once they see the request", file=sys.stderr)
    return int(problem is not None)


# what -------------------------------------------------------------------------------------------
def _known_jobs(
    runs: Sequence[Run], states: Mapping[str, RunState], *, output_dir: str
) -> dict[str, str]:
    """run_id -> its SLURM job, of those that we have submitted: no other is ours to end."""
    named = {r.run_id: job for r in runs if (job := states[r.run_id].job_id) is not None}
    ours = submitted_jobs(output_dir) if named else set()
    return {run_id: job for run_id, job in named.items() if job in ours}


def _jobs(
    runs: Sequence[Run], states: Mapping[str, RunState], *, output_dir: str
) -> dict[str, str]:
    """run_id -> its SLURM job; also where a submission died before the id was written down."""
    jobs = _known_jobs(runs, states, output_dir=output_dir)
    unknown = {run.run_id for run in runs} - jobs.keys()
    for sweep in dict.fromkeys(s for r in runs if r.run_id in unknown for s in r.sweeps):
        for submission in recover(output_dir, sweep):
            if submission.state == "submitted" and not _written(submission.job_ids(), output_dir):
                task_jobs = submission.job_ids().items()
                jobs |= {run_id: job for run_id, job in task_jobs if run_id in unknown}
    return jobs


def _without_runs(words: Sequence[str], *, output_dir: str) -> list[str]:
    """A sweep's jobs that do not own runs: searches and evaluations."""
    submissions = [one for word in words for one in recover(output_dir, word)]  # none of a run's id
    return alive(one for one in submissions if one.kind != "train")


def _alive(jobs: Sequence[str]) -> set[str]:
    """The jobs that are still alive after scancel; all of them if SLURM does not answer."""
    try:
        by_id = cluster.jobs(jobs)
    except SlurmError:
        return set(jobs)
    return {job_id for job_id, job in by_id.items() if job.alive and job.state != "COMPLETING"}


def _written(jobs: Mapping[str, str], output_dir: str) -> bool:
    """Whether the job id has reached the runs' status files."""
    runs = [run_at(output_dir, run_id) for run_id in jobs]
    return any(run.status().job_id is not None for run in runs)


def _wholly_ours(jobs: Mapping[str, str], *, output_dir: str) -> list[str]:
    """The jobs in which only runs of `jobs` are active; a packed job with other runs goes on."""
    if not jobs:
        return []
    ours = set(jobs.values())
    others = [r for r in selection.runs_of(output_dir) if r.run_id not in jobs]
    together = [r for r in others if r.dir.status().job_id in ours and not r.dir.ended()]
    states = selection.survey(together)
    shared_jobs = {states[r.run_id].job_id for r in together if states[r.run_id].state.in_flight}
    return sorted(ours - shared_jobs)


def _agreed(
    runs: Sequence[Run], states: Mapping[str, RunState], *, job_ids: Sequence[str], yes: bool
) -> bool:
    what = selection.counts([states[r.run_id] for r in runs])
    print(f"to cancel: {what or 'jobs that have no run yet'}")
    for run in runs[:TELL]:
        job = states[run.run_id].job_id
        print(f"  {states[run.run_id].state:<8} {run.name}" + (f"  (job {job})" if job else ""))
    if len(runs) > TELL:
        print(f"  ... and {len(runs) - TELL} more")
    if job_ids:
        more = f" and {len(job_ids) - 10} more" if len(job_ids) > 10 else ""
        print(f"SLURM jobs: {' '.join(job_ids[:10])}{more}")
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("--yes must be given where nobody can be asked (stdin is no terminal)")
    return input("cancel? [y/N] ").strip().lower() in ("y", "yes")


# how --------------------------------------------------------------------------------------------
def terminate(run_dir: RunDir) -> bool:
    """SIGTERM to the process of this host that holds the run; False if there is none."""
    holder = run_dir.lock_holder()
    if holder is None or holder["host"] != socket.gethostname():
        return False
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
            silent = before[run.run_id].state is State.QUEUED or before[run.run_id].job_id is None
            if state_of(run.dir).state is State.CANCELLED or (silent and write_cancelled(run.dir)):
                waiting.remove(run)
        if not waiting or time.monotonic() >= deadline:
            return
        time.sleep(0.2)


def write_cancelled(run_dir: RunDir) -> bool:
    """Write `cancelled` unless somebody works on the run or it has ended; whether it is over."""
    with contextlib.suppress(RunLocked), run_dir.lock():
        if not run_dir.ended():
            run_dir.update_status(state=State.CANCELLED, phase="", eta_s=None, error=None)
        return True
    return False


def _tell(runs: Sequence[Run]) -> None:
    after = selection.survey(runs)
    print(f"now: {selection.counts(list(after.values())) or 'no jobs'}")
    still = [run for run in runs if after[run.run_id].state.in_flight]
    for run in still[:TELL]:
        state = after[run.run_id]
        where = (
            f"on {state.host or 'its host'}" if state.state is State.RUNNING else "when it begins"
        )
        print(f"  {state.state} {run.name}: asked to end, {where}")

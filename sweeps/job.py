"""One SLURM job: its runs, their processes, and what happens when it must end.

    python -m sweeps.job SUBMISSION                srun's task: trains, evaluates, searches or times
    python -m sweeps.job --after CODE SUBMISSION   the batch script, once srun has ended

SUBMISSION is a submission.json; the job's number in the array says which of its tasks is meant.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.disk.output_dir import run_at
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from experiments.run.stopping import StopFlag, shielded
from experiments.scheduler import JOB, current_job, enter_job, job_environment
from relora_core import shared
from relora_core.config import ConfigError
from sweeps import worker
from sweeps.attempt import follow, is_stalled, record_end, redirect_output
from sweeps.planning.plan import command
from sweeps.slurm import cluster
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.sbatch import FOR_SCRIPT, is_of_a_group
from sweeps.slurm.submission import read_submission, record_job
from sweeps.timing import time_each
from sweeps.worker import CANCELLED, FAILED, FINISHED, INTERRUPTED, LOCKED

SIGNALLED = 128
"""Exit codes above are those of processes that a signal has ended."""
PORTS = range(20000, 32768)
"""For MASTER_PORT: below the ports that systems assign by themselves."""
WAIT_S = 120.0
"""Longest wait for an earlier start of this job to end, for SLURM to end this one after a requeue,
and for a controller that does not answer."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


@dataclass(kw_only=True, slots=True)
class Work:
    """What this job is to do."""

    runs: list[RunDir] = field(default_factory=list)
    requests: list[Path] = field(default_factory=list)
    """Evaluations."""
    timings: list[Path] = field(default_factory=list)
    """Configs whose steps are to be timed."""
    study: Path | None = None
    """The search that says what the job runs; `runs` are then those of its newest trial."""
    packed: int = 1
    """Runs for which the job has cores: the last job of an array may have fewer."""
    max_stalled: int
    signal_delay_s: float


def read(file: Path, *, index: int) -> Work:
    """Task `index` of the submission."""
    one = read_submission(file)
    output_dir = file.resolve().parents[4]  # output_dir/sweeps/NAME/jobs/ID/submission.json
    names = one.tasks[index]
    work = Work(
        packed=max(len(task) for task in one.tasks),
        max_stalled=one.max_stalled,
        signal_delay_s=one.signal_delay_s,
    )
    if one.kind == "eval":
        work.requests = [_inside(output_dir, name) for name in names]
    elif one.kind == "timing":
        work.timings = [_inside(output_dir, name) for name in names]
    elif one.kind == "search":
        work.study = _inside(output_dir, names[0])
    else:
        work.runs = [run_at(output_dir, name) for name in names]
    return work


def _inside(output_dir: Path, name: str) -> Path:
    path = (output_dir / name).resolve()
    if not path.is_relative_to(output_dir):
        raise ConfigError(f"a submission must name what is below {output_dir}, got {name!r}")
    return path


def task_index() -> int:
    """Of this job in its array."""
    return int((current_job() or "").partition("_")[2] or 0)


def rank() -> int:
    return int(os.environ.get("SLURM_PROCID", "0"))


def run(work: Work) -> int:
    """The task of srun: the exit code of its worst run."""
    if work.requests:
        return max(_evaluate(request) for request in work.requests)
    join_group(processes=int(os.environ.get("SLURM_NTASKS", "1")))
    if work.timings:
        return _time(work.timings)
    stop = StopFlag(deadline=_deadline(work) if rank() == 0 else None)
    with stop.installed():
        if work.study is not None:
            codes = [_run_trials(work, work.study, stop)]
        elif work.packed > 1:
            codes = _run_packed(work, stop)
        else:
            codes = [_run_alone(work.runs[0], stop, max_stalled=work.max_stalled)]
        if INTERRUPTED in codes and rank() == 0:
            return _requeue(work, why=stop.reason or "stopped")
    # If another rank ended with an error, srun would kill rank 0, which is still at work.
    return max(codes) if rank() == 0 or INTERRUPTED not in codes else FINISHED


def join_group(*, processes: int) -> None:
    """Set torch's variables for the processes of this job; remove those of any other group."""
    for name in [name for name in os.environ if is_of_a_group(name)]:
        del os.environ[name]
    if processes == 1:
        return
    from submitit.helpers import TorchDistributedEnvironment

    # Jobs that run together have neighbouring ids, so neighbouring ports; random ones may collide.
    os.environ["MASTER_PORT"] = str(PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)])
    TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)


def _deadline(work: Work) -> float | None:
    """When to save at the latest: SLURM's warning may not come, or not to every process."""
    job_id = current_job()
    end = cluster.end_time(job_id) if job_id else None
    return None if end is None else end - work.signal_delay_s


def _time(files: list[Path]) -> int:
    """Time each; one that fails has its reason in a file. Each meets its ranks at another port."""

    def environment(index: int) -> dict[str, str]:
        own = {**os.environ, **job_environment()}
        if port := own.get("MASTER_PORT"):
            own["MASTER_PORT"] = str(int(port) + index)
        return own

    stop = StopFlag()
    with stop.installed():
        time_each(files, environments=environment, stop=stop)
    return FINISHED


def _evaluate(request: Path) -> int:
    words = [sys.executable, "-P", "-m", "experiments.run.evaluate", str(request)]
    return subprocess.call(words, env={**os.environ, **job_environment()})


def _run_trials(work: Work, study: Path, stop: StopFlag) -> int:
    """Run trials; if one is interrupted, its runs become those of the work. The exit code."""
    from sweeps.search import process  # Optuna, which no other job needs

    most = process.trials_per_job(study)
    code = process.work(study, stop=stop, most=most, max_stalled=work.max_stalled)
    if code == INTERRUPTED:
        work.runs = process.runs_of_job(study) or []
    return code


# one run ----------------------------------------------------------------------------------------
def _run_alone(run_dir: RunDir, stop: StopFlag, *, max_stalled: int) -> int:
    """Run the job's only run in this process; the exit code."""
    if rank():  # rank 0 writes the log and decides
        return worker.work(run_dir.path, stop=stop)
    if _give_up(run_dir, max_stalled=max_stalled):
        return FAILED
    waited = time.monotonic()
    with redirect_output(run_dir), follow(run_dir):
        while (code := worker.work(run_dir.path, stop=stop)) == LOCKED:
            holder = run_dir.lock_holder() or {}
            late = time.monotonic() - waited > WAIT_S
            if holder.get("job_id") != current_job() or late or stop():
                break
            time.sleep(1.0)  # an earlier start of this job, which SLURM is still ending
    return code


def _give_up(run_dir: RunDir, *, max_stalled: int) -> bool:
    """Whether the run makes no progress; then it is recorded as failed."""
    if run_dir.ended() or not is_stalled(run_dir, limit=max_stalled):
        return False
    again = command("retry", run_dir.run_id, output_dir=run_dir.path.parents[1])
    line = (
        f"{max_stalled} attempts of this job ended at step {run_dir.newest_step()} without a new "
        f"checkpoint; `{again}` tries again"
    )
    run_dir.update_status(state=State.FAILED, phase="", error=line)
    return True


# several runs -----------------------------------------------------------------------------------
def _run_packed(work: Work, stop: StopFlag) -> list[int]:
    """Run small runs together, each in a process with its share of the devices; exit codes."""
    runs = [r for r in _unfinished(work) if not _give_up(r, max_stalled=work.max_stalled)]
    children = []
    for slot, run_dir in enumerate(runs):
        with shared.open_file(run_dir.log_path(run_dir.next_attempt()), "ab") as log, shielded():
            children.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "sweeps.worker", str(run_dir.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=share(slot, of=work.packed),
                    preexec_fn=_die_with(os.getpid()),
                )
            )
    terminated = False
    while any(child.poll() is None for child in children):
        if stop() and not terminated:
            terminated = True
            for child in children:
                child.terminate()
        time.sleep(0.2)
    codes = [child.returncode for child in children]
    for run_dir, code in zip(runs, codes, strict=True):
        if code >= 0:  # one that was killed is resumed later
            record_end(run_dir, code=code)
    codes = [INTERRUPTED if code < 0 else code for code in codes]
    failed = any(run_dir.status().state is State.FAILED for run_dir in work.runs)
    return [*codes, FAILED if failed else FINISHED]


def _die_with(parent: int) -> Callable[[], None]:
    """A function for a new process that ties it to `parent`: it dies when the parent is killed."""
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os.kill(os.getpid(), signal.SIGKILL)

    return tie


def share(slot: int, *, of: int) -> dict[str, str]:
    """Environment of the process in this slot: one of the job's GPUs, its part of the cores."""
    environment = {**os.environ, **job_environment()}
    gpus = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // of)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    return environment


def _unfinished(work: Work) -> list[RunDir]:
    """The runs that this job has not brought to an end.

    Of several, those that failed are left out: they would start again with each requeue.
    """
    left = [r for r in work.runs if not r.ended() and not r.cancel_path.exists()]
    return [r for r in left if len(work.runs) == 1 or not _failed_here(r)]


def _failed_here(run_dir: RunDir) -> bool:
    status = run_dir.status()
    return status.state is State.FAILED and status.job_id == current_job()


def _requeue(work: Work, *, why: str) -> int:
    """Requeue this job if SLURM allows it; all that it needs is on disk. The exit code."""
    job_id, left = current_job(), _unfinished(work)
    if not (left or work.study):
        return CANCELLED
    if job_id is None:
        return INTERRUPTED
    for run_dir in left:  # before the requeue: SLURM ends this process at once
        run_dir.update_status(state=State.QUEUED, phase=f"stopped: {why}", error=None)
    if not cluster.reachable():
        return FOR_SCRIPT
    until = time.monotonic() + max(WAIT_S, work.signal_delay_s)
    try:
        while True:
            try:
                with shielded():  # SLURM's signals to the job would end squeue, too
                    if not cluster.may_requeue(job_id):
                        return INTERRUPTED  # cancelled, or SLURM requeues it by itself
                    cluster.requeue(job_id)
                break
            except SlurmError as error:
                if not error.passing or time.monotonic() > until:
                    raise
                print(f"requeue: {error}; trying again", file=sys.stderr, flush=True)
                time.sleep(cluster.PAUSE_S)
    except SlurmError as error:
        for run_dir in left:
            line = f"stopped ({why}) and not requeued: {error}"
            run_dir.update_status(state=State.FAILED, phase="", error=line)
        return INTERRUPTED
    time.sleep(WAIT_S)  # SLURM ends us now
    return INTERRUPTED


def after(work: Work, *, code: int) -> int:
    """What the batch script does once srun has ended: the exit code of the job.

    A task that was killed without warning (out of memory, kill -9) resumes from its checkpoint.
    """
    # INTERRUPTED: it has requeued the job already.
    if work.requests or work.timings or code in (INTERRUPTED, FOR_SCRIPT):
        return code
    if work.study is not None:
        return _after_search(work, work.study, code=code)
    for run_dir in work.runs:
        if run_dir.cancel_path.exists():
            record_end(run_dir, code=code)
    if not (left := _unfinished(work)):
        return code
    killed = code - SIGNALLED if code > SIGNALLED else 0
    if not killed or all(is_stalled(run_dir, limit=work.max_stalled) for run_dir in left):
        for run_dir in left:
            record_end(run_dir, code=-killed if killed else code)
        return code
    return _requeue(work, why=f"killed by signal {killed}")


def _after_search(work: Work, study: Path, *, code: int) -> int:
    """Requeue a job that was killed during a trial, to resume it; any other is over."""
    from sweeps.search import process  # Optuna, which no other job needs

    runs = process.runs_of_job(study) if code > SIGNALLED else None
    if runs is None:
        return code
    work.runs = runs
    for run_dir in _unfinished(work):
        record_end(run_dir, code=SIGNALLED - code)
    return _requeue(work, why=f"killed by signal {code - SIGNALLED}")


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    ended = argv[:1] == ["--after"]
    if len(argv) != (3 if ended else 1):
        print("usage: python -m sweeps.job [--after CODE] SUBMISSION", file=sys.stderr)
        return 2
    file = Path(argv[-1])
    token = os.environ.get(JOB, "")
    job_id = enter_job(name=read_submission(file).name)
    if job_id is None:
        print(
            f"{JOB} must name {file} and the SLURM job around this process, as its batch script "
            f"has it, got {token!r}: this is not a job of that submission",
            file=sys.stderr,
        )
        return 2
    work = read(file, index=task_index())
    if ended:
        return after(work, code=int(argv[1]))
    if rank() == 0:
        with contextlib.suppress(OSError):  # it matters only where the command was killed
            record_job(file, job_id)
            for made in file.parent.glob(f"{job_id}_*"):  # SLURM's
                shared.share(made)
    return run(work)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # for what the worker starts
    sys.exit(main(sys.argv[1:]))

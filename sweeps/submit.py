"""One sbatch: its script, made with submitit, and the job id that comes of it.

submitit pickles a function; here a job is the submission's file, so nothing is pickled and a job
that starts before its command has ended finds all it needs. Not for: what to submit (`slurm.py`).
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from sweeps import cluster
from sweeps.cluster import SlurmError
from sweeps.options import Shape, SlurmOptions
from sweeps.state import Submission

TRIES = 4
"""At sbatch, where the controller is busy."""


# launching --------------------------------------------------------------------------------------


def parameters(
    options: SlurmOptions, shape: Shape, *, name: str, code: Path, file: Path
) -> dict[str, Any]:
    """submitit's parameters of one array: `file` is its submission, `code` the frozen copy."""
    packed = options.runs_per_job > 1
    sbatch = {k: getattr(options, k) for k in ("reservation",) if getattr(options, k)}
    extra = {**sbatch, "requeue": True, **options.extra}
    mine: dict[str, Any] = {
        "job_name": name,
        "time": shape.minutes,
        "nodes": shape.nodes,
        "ntasks_per_node": 1 if packed else shape.tasks_per_node,
        "cpus_per_task": shape.cpus_per_task * (options.runs_per_job if packed else 1),
        "mem": None if shape.mem_gb is None else f"{round(shape.mem_gb * 1024)}M",
        "gpus_per_node": shape.gpus_per_node or None,
        "signal_delay_s": options.signal_delay_s,
        "stderr_to_stdout": True,
        "exclusive": True if options.exclusive else None,
        "additional_parameters": extra,
        "setup": [*environment(code), *options.setup],
        # One dead rank would leave the others waiting for it until the time limit.
        "srun_args": ["--kill-on-bad-exit=1", *options.srun_args],
        "teardown": [
            "code=$?",
            f'{python(options)} -m sweeps.job --after "$code" {shlex.quote(str(file))}',
            "code=$?",
            *options.teardown,
            "exit $code",
        ],
    }
    same = ("partition", "account", "qos", "constraint", "mail_type", "mail_user", "dependency")
    mine |= {key: getattr(options, key) for key in same}
    return {key: value for key, value in mine.items() if value is not None}


def environment(code: Path) -> list[str]:
    """Shell lines that make the job's Python use the frozen code and its own cores."""
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        "export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}",
        "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
        "export MKL_NUM_THREADS=$OMP_NUM_THREADS RELORA_THREADS=$OMP_NUM_THREADS",
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",  # since SLURM 22.05 srun asks anew
        "ulimit -c 0",
    ]


def python(options: SlurmOptions) -> str:
    return options.python or shlex.quote(sys.executable)


def script(options: SlurmOptions, shape: Shape, *, tasks: int, name: str, file: Path) -> str:
    """The text of the batch script, for `--test-only` and for the curious."""
    executor = _executor(options, shape, name=name, code=Path("code"), file=file)
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(_command(options, file), "check")


def _command(options: SlurmOptions, file: Path) -> str:
    return f"{python(options)} -m sweeps.job {shlex.quote(str(file))}"


def _executor(options: SlurmOptions, shape: Shape, *, name: str, code: Path, file: Path) -> Any:
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=file.parent)
    executor.update_parameters(**parameters(options, shape, name=name, code=code, file=file))
    executor.parameters["wckey"] = None  # submitit's own; many sites refuse unknown ones
    return executor


def send(
    one: Submission,
    folder: Path,
    *,
    options: SlurmOptions,
    shape: Shape,
    at_once: int | None,
    code: Path,
) -> None:
    """sbatch for a submission that is on disk, and write down what came of it."""
    try:
        one.job_id = sbatch(
            options, shape, tasks=len(one.tasks), at_once=at_once,
            name=one.name, code=code, file=folder / "submission.json",
        )  # fmt: skip
    except SlurmError as error:
        one.state, one.error = "refused", str(error)
        one.write(folder)
        raise
    one.state = "submitted"
    one.write(folder)


def sbatch(
    options: SlurmOptions,
    shape: Shape,
    *,
    tasks: int,
    at_once: int | None,
    name: str,
    code: Path,
    file: Path,
) -> str:
    """Submit one array; its job id. A time-out is no refusal: the job is looked for first."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(options, shape, name=name, code=code, file=file)
    if tasks > 1:
        executor.parameters["map_count"] = tasks
        executor.parameters["array_parallelism"] = at_once or tasks
    for left in reversed(range(TRIES)):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                return str(executor._submit_command(_command(options, file)).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            line = " ".join(str(error).split()).removeprefix("sbatch: error: ")
            if not cluster.BUSY.search(line):
                raise SlurmError(line) from None
            if job_id := cluster.find(name):
                return job_id
            if not left:
                raise SlurmError(line) from None
        time.sleep(cluster.PAUSE_S)
    raise AssertionError("at least one try")

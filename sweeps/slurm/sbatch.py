"""One call of sbatch: the script, made with submitit, and the id of the job.

submitit would pickle a function; here a job reads the submission's file, which is there before
sbatch is called. Not for: what to submit (`launcher.py`), nor when (`queue.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.scheduler import GPUS, JOB
from relora_core import shell
from sweeps.slurm import cluster
from sweeps.slurm.cluster import SlurmError
from sweeps.slurm.options import Shape, SlurmOptions, gpu_kind, plain, sbatch_options
from sweeps.slurm.submission import Submission, read_submission

TRIES = 4
"""At sbatch, if the controller is busy."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
"""What SLURM sets for a job beside its own variables."""
FOR_SCRIPT = 7
"""Exit code of a job in a container without SLURM's tools: the script, outside, is to requeue."""
SUBMITTED = re.compile(r"^Submitted batch job (\d+)(?: on cluster \S+)?\s*$", re.M)
"""The answer of an unwrapped sbatch. After any other answer we are not sure (`Unsure`)."""


class Unsure(SlurmError):
    """Whether SLURM has accepted the job is not known; the next command looks for it."""


# the user's environment -------------------------------------------------------------------------
def is_of_a_group(variable: str) -> bool:
    """Whether it says which process of a group this is, or how the group computes."""
    return shell.is_place(variable) or shell.is_accelerate(variable)


def dropped_variables() -> list[str]:
    """Variables that sbatch, and hence the job, does not get.

    SBATCH_ variables would override the script. SLURM_ variables belong to a job around this
    command, and the new job would take them for its own.
    """
    inside = "SLURM_JOB_ID" in os.environ
    return sorted(
        name
        for name in os.environ
        if cluster.is_an_option(name)
        or is_of_a_group(name)
        or name in shell.TASK_NAMES
        or name.startswith("SUBMITIT_")
        or name == JOB
        or (inside and name in DEVICES)
    )


def options_of_environment(options: SlurmOptions) -> dict[str, str]:
    """Options that are unset in the launcher and set by the user's SBATCH_ variables."""
    site = [option.name for option in dataclasses.fields(options) if option.metadata.get("site")]
    given = {name: os.environ.get(f"SBATCH_{name.upper()}", "") for name in site}
    return {
        name: value for name, value in given.items() if value and getattr(options, name) is None
    }


def print_environment(options: SlurmOptions) -> None:
    """Print a line on variables of the user's shell that take effect, or that do not."""
    taken = options_of_environment(options)
    ignored = [n for n in dropped_variables() if n.removeprefix("SBATCH_").lower() not in taken]
    own = [n for n in ignored if os.environ[n] and (n.startswith("SBATCH_") or is_of_a_group(n))]
    parts = []
    if taken:
        counts = (
            f"SBATCH_{k.upper()}={v} (hydra.launcher.{k} is not set)" for k, v in taken.items()
        )
        parts.append(f"take {', '.join(counts)}")
    if own:
        parts.append(f"do not take {', '.join(own)}")
    if job_id := os.environ.get("SLURM_JOB_ID"):
        parts.append(f"nothing of the job {job_id} around this command")
    if parts:
        print(f"of this shell's variables the jobs {'; '.join(parts)}", file=sys.stderr)


# one call ---------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Sbatch:
    """One call of sbatch: what the jobs ask for, and the submission that they read."""

    name: str
    tasks: int
    options: SlurmOptions
    shape: Shape
    file: Path
    """submission.json"""
    code: Path = Path("code")
    """The frozen copy that the jobs import."""
    at_once: int | None = None
    """Tasks that may run at a time; None: all."""

    def script(self) -> str:
        """The batch script, for `sbatch --test-only`."""
        return self._executor()._make_submission_file_text(self._command(), "check")

    def submit(self) -> str:
        """Call sbatch; the job's id. If its answer is unclear, SLURM is asked for the job."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = self._executor()
        if self.tasks > 1:
            executor.parameters["array_parallelism"] = self.at_once or self.tasks
        for left in reversed(range(TRIES)):
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                    return str(executor._submit_command(self._command()).job_id)
            except (FailedJobError, FailedSubmissionError) as error:
                line = " ".join(str(error).split()).removeprefix("sbatch: error: ")
                unclear = isinstance(error, FailedSubmissionError)
            if job_id := self._look_up(line):
                return job_id
            if unclear:
                time.sleep(cluster.PAUSE_S)
                if job_id := self._look_up(line):
                    return job_id
                raise SlurmError(f"{line}, and SLURM knows no job {self.name!r}")
            if not left or not cluster.BUSY.search(line):
                raise SlurmError(line)
            time.sleep(cluster.PAUSE_S)
        raise AssertionError("at least one try")

    def _look_up(self, line: str) -> str | None:
        """The job's id, as the job itself has recorded it, else by its name; None: no such job."""
        try:
            return read_submission(self.file).job_id or cluster.find(self.name)
        except SlurmError as error:
            raise Unsure(
                f"{line}; whether SLURM has taken the job {self.name!r} it does not say: {error}"
            ) from None

    def _command(self) -> str:
        return f"{python(self.options)} -m sweeps.job {shlex.quote(str(self.file))}"

    def _executor(self) -> Any:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedSubmissionError

        name = self.name

        class Executor(SlurmExecutor):
            """Calls sbatch without variables that would change the job; checks its answer."""

            def _make_submission_command(self, submission_file_path: Path) -> list[str]:
                unset = [text for variable in dropped_variables() for text in ("-u", variable)]
                # The name on the command line, too: a site's wrapper may set another.
                return ["env", *unset, "sbatch", f"--job-name={name}", str(submission_file_path)]

            @staticmethod
            def _get_job_id_from_submission_command(string: str | bytes) -> str:
                text = string.decode() if isinstance(string, bytes) else string
                ids = set(SUBMITTED.findall(text))
                if len(ids) != 1:
                    raise FailedSubmissionError(f"sbatch printed {text[:200]!r}")
                return ids.pop()

        executor = Executor(folder=self.file.parent)
        executor.update_parameters(**self.parameters())
        executor.parameters["wckey"] = None  # submitit's own; many sites refuse unknown ones
        if self.tasks > 1:
            executor.parameters["map_count"] = self.tasks
        return executor

    def parameters(self) -> dict[str, Any]:
        """submitit's parameters."""
        options = dataclasses.replace(self.options, **options_of_environment(self.options))
        shape, file, array = self.shape, shlex.quote(str(self.file)), self.tasks > 1
        this_python = None if options.python else sys.executable
        packed = options.runs_per_job > 1
        cpus = shape.cpus_per_task * (options.runs_per_job if packed else 1)
        extra = {k: v for k, v in options.extra.items() if plain(k) != "gpus_per_node"}
        parameters: dict[str, Any] = {
            "job_name": self.name,
            "time": shape.minutes,
            "nodes": shape.nodes,
            "ntasks_per_node": 1 if packed else shape.tasks_per_node,
            "cpus_per_task": None if shape.by_gpu else cpus,  # sbatch takes one of the two
            "mem": None if shape.mem_gb is None else f"{round(shape.mem_gb * 1024)}M",
            "gpus_per_node": _gpus(options, shape),
            "signal_delay_s": options.signal_delay_s,
            "stderr_to_stdout": True,
            "exclusive": True if options.exclusive else None,
            "additional_parameters": {**sbatch_options(options), "requeue": True, **extra},
            "setup": [
                *unset_variables(shape, array=array),
                *environment(cpus, by_gpu=shape.by_gpu),
                *_own_setup(options.setup),
                *_use_code(self.code),
                *_check_files(self.file, self.code, python=this_python),
                f"export {GPUS}={shape.gpus_per_node}",
                set_token(self.name, array=array),
            ],
            # Else the other ranks would wait for a dead one until the time limit.
            "srun_args": ["--kill-on-bad-exit=1", *options.srun_args],
            "teardown": [
                "code=$?",
                f'{python(options)} -m sweeps.job --after "$code" {file}',
                "code=$?",
                REQUEUE,
                f"unset {JOB}",
                *options.teardown,
                "exit $code",
            ],
        }
        return {key: value for key, value in parameters.items() if value is not None}


# lines of its script ----------------------------------------------------------------------------
def unset_variables(shape: Shape, *, array: bool) -> list[str]:
    """Shell lines that unset variables of other jobs, in case the script was submitted from one."""
    prefixes = (*shell.ELASTIC_PREFIXES, *shell.ACCELERATE_PREFIXES)
    prefixes += ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_STEP")
    names = [*shell.PLACE, *shell.ELASTIC, *(f"${{!{prefix}@}}" for prefix in prefixes)]
    names += [JOB, "SLURM_EXPORT_ENV"]
    if not array:
        names.append("${!SLURM_ARRAY_@}")
    if shape.mem_gb is not None:  # srun refuses these beside a job's memory per node
        names += ["SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"]
    return [f"unset {' '.join(names)}"]


def set_token(name: str, *, array: bool) -> str:
    """The shell line from which the job's processes know that the job is ours."""
    job_id = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if array else "$SLURM_JOB_ID"
    return f"export {JOB}={shlex.quote(name)}/{job_id}"


def _gpus(options: SlurmOptions, shape: Shape) -> str | None:
    kind, count = gpu_kind(options), shape.gpus_per_node
    if not count:
        return None
    return f"{kind}:{count}" if kind else str(count)


def environment(cpus: int, *, by_gpu: bool) -> list[str]:
    """Shell lines that give the job's Python its own cores; `setup` may change them."""
    # srun ignores sbatch's cpus_per_task since 22.05; cpus_per_gpu it takes from the job.
    own = [] if by_gpu else ["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"]
    return [
        "export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}",
        f"export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-{cpus if by_gpu else 1}}}",
        "export MKL_NUM_THREADS=$OMP_NUM_THREADS",
        *own,
        "ulimit -c 0",
    ]


ON_ERROR = (
    'trap \'code=$?; if [ ${#BASH_SOURCE[@]} -le "$relora_depth" ]; then echo '
    '"error: hydra.launcher.setup failed with exit code $code: $BASH_COMMAND" >&2; '
    "exit $code; fi' ERR"
)


REQUEUE = (
    f'[ "$code" != {FOR_SCRIPT} ] || '
    f'case "$(squeue -h -t all -j "${{{JOB}##*/}}" -o "%T|%r")" in '
    f'RUNNING*|"COMPLETING|TimeLimit"*) scontrol requeue "${{{JOB}##*/}}" ;; esac'
)
"""The shell line that requeues the job for its container, as `cluster.may_requeue` decides."""


def _own_setup(lines: Sequence[str]) -> list[str]:
    """The user's lines, none of which may fail.

    Of functions (`module`) and sourced files only the last command counts.
    """
    if not lines:
        return []
    return [
        "relora_depth=${#BASH_SOURCE[@]}",
        ON_ERROR,
        *lines,
        "trap - ERR",
        "set +eu",  # if a line has set -e, a run that fails must not end this script early
    ]


def _use_code(code: Path) -> list[str]:
    """Shell lines that make the job's Python import the frozen code, whatever `setup` has set."""
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
    ]


def _check_files(file: Path, code: Path, *, python: str | None) -> list[str]:
    """Shell lines that end the job with one line if its node cannot see a file that it needs."""
    needed = dict.fromkeys((str(file), str(code)), "output_dir must be")
    if python is not None:
        needed[python] = "this Python, or the one that hydra.launcher.python names, must be"
    return [
        f'[ -e {shlex.quote(path)} ] || {{ echo "error: $HOSTNAME does not see "'
        f"{shlex.quote(f'{path}: {what} on a shared file system')} >&2; exit 1; }}"
        for path, what in needed.items()
    ]


def python(options: SlurmOptions) -> str:
    return options.python or shlex.quote(sys.executable)


# a submission -----------------------------------------------------------------------------------
def submit(
    one: Submission, folder: Path, *, shape: Shape, options: SlurmOptions, code: Path
) -> None:
    """Write the submission into `folder`, call sbatch, and record what came of it."""
    one.write(folder)
    if one.waits_for:
        waits = f"afterany:{':'.join(one.waits_for)}"
        both = f"{options.dependency},{waits}" if options.dependency else waits
        options = dataclasses.replace(options, dependency=both)
    sbatch = Sbatch(
        name=one.name, tasks=len(one.tasks), at_once=one.at_once,
        options=options, shape=shape, code=code, file=folder / "submission.json",
    )  # fmt: skip
    try:
        one.job_id = sbatch.submit()
    except Unsure:
        raise
    except SlurmError as error:
        one.state, one.error = "refused", str(error)
        one.write(folder)
        raise
    except KeyboardInterrupt:
        one.job_id = _find_interrupted(sbatch)
        if one.job_id is not None:
            one.state = "submitted"
            one.write(folder)
        raise
    one.state = "submitted"
    one.write(folder)


def _find_interrupted(sbatch: Sbatch) -> str | None:
    """The job of an interrupted sbatch, if SLURM knows it by now."""
    for pause in (0.0, cluster.PAUSE_S):  # sbatch may still be at work
        time.sleep(pause)
        with contextlib.suppress(SlurmError, OSError, ValueError):
            if job_id := read_submission(sbatch.file).job_id or cluster.find(sbatch.name):
                return job_id
    return None

"""Questions to SLURM and its answers, through its command-line tools. Not for: judging by them.

Only `-o` formats are read: JSON output differs between releases. A tool that does not answer raises
SlurmError, so that its silence is never taken for an answer about a job.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

ANSWER_S = 60.0
"""How long a tool may take; a busy controller needs tens of seconds."""
PATIENCE_S = 5.0
"""After so many seconds we print which tool we wait for."""
PAUSE_S = 2.0
"""Between two tries at a controller that is busy or being restarted."""
SACCT_DAYS = 30
"""How far back a job is looked for by name."""
ARRAY = 1000
"""Tasks of an array where SLURM does not say how many it may have."""
SCONTROL_MAX = 8
"""At most so many jobs that neither squeue nor sacct knows are asked for, one by one."""

UNLISTED = "UNLISTED"
"""Our own state of a task that SLURM does not list, though others of its array: it is over."""
OVER = frozenset(("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL")).union(
    ("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT", UNLISTED)
)
WAITING = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
)

BUSY = re.compile(
    r"socket timed out|unable to contact|connection (refused|reset|timed out)|zero bytes|"
    r"temporarily unable|resource temporarily|rate.?limit|backup controller|try again",
    re.IGNORECASE,
)
"""What the tools print if the controller, not the request, is the trouble."""
PENDING = re.compile(r"job is pending execution", re.IGNORECASE)
"""What scontrol prints of a job that is requeued already."""
FORGOTTEN = re.compile(r"invalid job id|already complet|job/step already", re.IGNORECASE)
"""What scancel prints of a job that is over."""
SPAN = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
"""`1-02:03:04`, `2:03:04`, `3:04`; not `UNLIMITED`, `INVALID`."""

SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Where SLURM is and who asks: the only variables of SLURM that its tools get from us."""
TOOLS = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
TOOLS += ("SCONTROL_",)
"""Variables that are options of SLURM's tools, or of a job around us."""


class SlurmError(RuntimeError):
    """SLURM did not answer, or refused; one line."""

    @property
    def passing(self) -> bool:
        """Whether the controller, not the request, is the trouble: it may answer later."""
        return bool(BUSY.search(str(self)) or "did not answer" in str(self))


@dataclass(kw_only=True, slots=True)
class Job:
    """One job, or one task of an array, as SLURM sees it."""

    job_id: str
    """`123`, or `123_4` for task 4 of an array."""
    state: str
    """One word, such as PENDING, RUNNING, NODE_FAIL."""
    reason: str = ""
    """Why it waits."""
    name: str = ""
    node: str = ""
    source: str = "squeue"
    """The tool that reported it: squeue, sacct or scontrol."""

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def alive(self) -> bool:
        """It runs or may still run; so does a job in a state that we do not know."""
        return not self.over

    @property
    def waiting(self) -> bool:
        """It has no node: queued, requeued or held."""
        return self.state in WAITING


def is_an_option(variable: str) -> bool:
    """Whether this variable would change what SLURM's tools do."""
    return variable.startswith(TOOLS) and variable not in SITE


def available() -> bool:
    """Whether jobs can be submitted and asked for from this machine."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def reachable() -> bool:
    """Whether this process may ask SLURM of its job; False in a container without its tools."""
    return shutil.which("squeue") is not None and shutil.which("scontrol") is not None


# asking -----------------------------------------------------------------------------------------
def jobs(job_ids: Iterable[str]) -> dict[str, Job]:
    """What SLURM knows of these jobs; jobs that it does not know are left out.

    SlurmError only if squeue does not answer: not every site has sacct, and its answer is older.
    """
    wanted = _well_formed(job_ids)
    if not wanted:
        return {}
    listed = _squeue()
    by_id = {job.job_id: job for job in listed if job.job_id in wanted}
    for ask in (_sacct, _scontrol):
        missing = wanted - by_id.keys()
        if missing:
            bases = sorted({_base(job_id) for job_id in missing}, key=_number)
            by_id |= {job.job_id: job for job in ask(bases) if job.job_id in missing}
    # A task that was cancelled while it was pending leaves no record anywhere.
    arrays = {_base(job.job_id) for job in listed if "_" in job.job_id}
    unlisted = [id_ for id_ in wanted - by_id.keys() if "_" in id_ and _base(id_) in arrays]
    return by_id | {id_: Job(job_id=id_, state=UNLISTED) for id_ in unlisted}


def _base(job_id: str) -> str:
    """The id without the task of an array."""
    return job_id.partition("_")[0]


def _well_formed(job_ids: Iterable[str]) -> set[str]:
    """Those that are ids: they come from files, and a tool must not take one for an option."""
    return {job_id for job_id in job_ids if re.fullmatch(r"\d+(_\d+)?", job_id)}


def find(name: str) -> str | None:
    """Id of the user's newest job of that name (of an array: without the task), if there is one."""
    for listed in (_squeue, _sacct_recent):
        # The accounting stores a double quote as a backtick.
        same = (name, name.replace('"', "`"))
        ids = {_base(job.job_id) for job in listed() if job.name in same}
        if ids:
            return max(ids, key=_number)
    return None


def _number(job_id: str) -> tuple[int, str]:
    return (int(job_id) if job_id.isdigit() else -1, job_id)


def _squeue() -> list[Job]:
    """Every job of the user that the controller still has, for some minutes also ended ones."""
    # The name comes last: it may hold the separator. -a: partitions may be hidden.
    query = ["squeue", "-h", "-a", "-r", "-t", "all"]
    query += ["-u", str(os.getuid()), "-o", "%i|%T|%r|%N|%j"]
    return [
        Job(job_id=job_id, state=state, reason=rest[0], node=rest[1], name=rest[2])
        for job_id, state, *rest in _rows(ask(query), columns=5)
    ]


def _sacct(bases: Sequence[str]) -> list[Job]:
    return _accounted(["-j", ",".join(bases)])


def _sacct_recent() -> list[Job]:
    return _accounted(["-u", str(os.getuid()), "-S", f"now-{SACCT_DAYS}days"])


def _accounted(which: Sequence[str]) -> list[Job]:
    """The accounting's record of each job; empty if there is no accounting."""
    query = ["sacct", "-X", "-n", "-P", *which, "-o", "JobID,State,NodeList,JobName"]
    try:
        answer = ask(query, tries=1)
    except SlurmError:
        return []
    return [
        Job(job_id=job_id, state=state, node=node, name=name, source="sacct")
        for job_id, state, node, name in _rows(answer, columns=4)
    ]


def _scontrol(bases: Sequence[str]) -> list[Job]:
    """One question per job, so only for the newest few."""
    parsed: list[Job] = []
    for base in bases[-SCONTROL_MAX:]:
        try:
            answer = ask(["scontrol", "-o", "show", "job", base], tries=1)
        except SlurmError:
            continue
        for line in answer.splitlines():
            parsed += _parse_job(line)
    return parsed


def _parse_job(line: str) -> Iterator[Job]:
    """The tasks in one line of `scontrol -o show job`."""

    def value(key: str, end: str = " ") -> str:
        match = re.search(rf"(?:^| ){key}=(.*?)(?:{end}|$)", line)
        return match[1] if match else ""

    array = value("ArrayJobId")
    task = value("ArrayTaskId")
    ids = f"{array}_{task if task.isdigit() else f'[{task}]'}" if array else value("JobId")
    state = value("JobState")
    for job_id in _expand(ids) if state else []:  # a newline in the name cuts the line short
        yield Job(
            job_id=job_id,
            state=state,
            reason=value("Reason").replace("None", ""),
            name=value("JobName", end=" UserId="),
            node=value("NodeList"),
            source="scontrol",
        )


def _rows(answer: str, *, columns: int) -> Iterator[list[str]]:
    """The cells of lines `id|STATE|...`, one row per id; steps and parts of names are dropped."""
    for line in answer.splitlines():
        cells = line.split("|", columns - 1)
        if len(cells) == columns and cells[1]:
            state = cells[1].split()[0].rstrip("+")  # `CANCELLED by 1000`, `CANCELLED+`
            for job_id in _expand(cells[0].strip()):
                yield [job_id, state, *cells[2:]]


def _expand(text: str) -> list[str]:
    """`12_[3-5,9%2]` -> 12_3, 12_4, 12_5, 12_9; empty for what is no id (`12.batch`, `Reason`)."""
    if re.fullmatch(r"\d+(_\d+)?", text):
        return [text]
    match = re.fullmatch(r"(\d+)_\[([\d,:-]+)(?:%\d+)?\]", text)
    if match is None:
        return []
    tasks: list[int] = []
    for part in filter(None, match[2].split(",")):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        tasks += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{match[1]}_{task}" for task in tasks]


# the job at hand ----------------------------------------------------------------------------------
def end_time(job_id: str) -> float | None:
    """When the job's time limit ends it, seconds since the epoch; None: never, or not known.

    SLURM is asked first: the limit can be changed while the job's environment variable stays.
    """
    try:
        left = ask(["squeue", "-h", "-a", "-r", "-j", job_id, "-o", "%i|%L"], tries=1)
    except SlurmError:
        end = os.environ.get("SLURM_JOB_END_TIME", "")  # of our own job; since release 22.05
        return float(end) if end.isdigit() else None
    for id_, seconds in _rows(left, columns=2):
        if id_ == job_id and SPAN.fullmatch(seconds):
            return time.time() + to_seconds(seconds)
    return None


# the site ---------------------------------------------------------------------------------------
def max_array_size() -> int:
    """How many tasks an array may have; 1 if the site has no arrays (MaxArraySize=0)."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.M)
    return max(1, int(match[1])) if match else ARRAY


def time_limit(partition: str) -> tuple[int, str] | None:
    """The longest limit of these partitions (`a,b`; empty: the default one) in minutes, and as
    SLURM writes it; None if there is no limit, or no answer."""
    try:
        rows = [row.split("|") for row in ask(sinfo(partition, "%P|%l")).splitlines()]
    except SlurmError:
        return None
    limits = {row[1].strip() for row in rows if partition or row[0].endswith("*")}
    if not limits or not all(SPAN.fullmatch(limit) for limit in limits):
        return None  # `infinite`
    return max((to_seconds(limit) // 60, limit) for limit in limits)


def sinfo(partition: str, form: str) -> list[str]:
    """The query on some partitions, or on all: -a and -p exclude each other."""
    return ["sinfo", "-h", *(["-p", partition] if partition else ["-a"]), "-o", form]


def to_seconds(span: str) -> int:
    match = SPAN.fullmatch(span)
    assert match is not None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


# acting -----------------------------------------------------------------------------------------
def may_requeue(job_id: str) -> bool:
    """Whether a job that was signalled to end should requeue itself.

    Yes while it runs (a warning, the grace period of a preemption) and if its time is up. Otherwise
    SLURM requeues it by itself, or its user has cancelled it, which a requeue would undo.
    """
    answer = ""
    for _ in range(5):
        answer = ask(["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T|%r"]).split("\n")[0]
        if answer:
            break
        time.sleep(0.3)  # while it ends a job, the controller may not list it
    state, _, reason = answer.partition("|")
    return state == "RUNNING" or (state == "COMPLETING" and reason.startswith("TimeLimit"))


def cancel(job_ids: Iterable[str]) -> None:
    """End these jobs; those already over are no error."""
    ids = sorted(_well_formed(job_ids), key=lambda job_id: _number(_base(job_id)))
    for start in range(0, len(ids), 500):  # bounds the command line
        ask(["scancel", "-Q", *ids[start : start + 500]], forgive=FORGOTTEN)


def requeue(job_id: str) -> None:
    """Put a job back into the queue. Its processes are killed at once, so save first."""
    ask(["scontrol", "requeue", job_id], tries=3, forgive=PENDING)


def ask(command: Sequence[str], *, tries: int = 2, forgive: re.Pattern[str] | None = None) -> str:
    """What the tool prints; tried again if the controller was busy."""
    for left in reversed(range(tries)):
        try:
            return _run_tool(command, forgive=forgive)
        except SlurmError as error:
            if not left or not BUSY.search(str(error)):
                raise
        time.sleep(PAUSE_S)
    raise AssertionError("at least one try")


def _run_tool(command: Sequence[str], *, forgive: re.Pattern[str] | None) -> str:
    tool = command[0]
    # A user's SQUEUE_PARTITION, SCANCEL_STATE and the like would hide jobs.
    environment = {k: v for k, v in os.environ.items() if not is_an_option(k)}
    environment["SLURM_TIME_FORMAT"] = "standard"
    environment["SLURM_BITSTR_LEN"] = "0"  # else long lists of an array's tasks are cut
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise SlurmError(f"{tool} did not answer: {error.strerror or error}") from None
    with process:
        answer, errors = _communicate(process, tool=tool)
    if process.returncode == 0:
        return answer
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if forgive is not None:
        lines = [line for line in lines if not forgive.search(line)]
        if not lines:
            return answer
    reasons = "; ".join(_without_prefix(line, tool=tool) for line in lines)
    raise SlurmError(f"{tool}: {reasons or f'exit code {process.returncode}'}")


def _communicate(process: subprocess.Popen[str], *, tool: str) -> tuple[str, str]:
    """What the tool prints; a line on stderr if that takes long, SlurmError if too long."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=min(PATIENCE_S, ANSWER_S))
        if ANSWER_S > PATIENCE_S:
            print(f"waiting for SLURM's {tool} (up to {ANSWER_S:.0f} s)", file=sys.stderr)
        return process.communicate(timeout=max(0.0, ANSWER_S - PATIENCE_S))
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{tool} did not answer within {ANSWER_S:.0f} s") from None
    finally:
        if process.poll() is None:
            process.kill()


def _without_prefix(line: str, *, tool: str) -> str:
    """`sbatch: error: Batch job ...` -> `Batch job ...`"""
    return line.removeprefix(f"{tool}: ").removeprefix("error: ").removeprefix("fatal: ")

"""What a job asks of SLURM: the launcher's options and a run's own, and checks of both.

Hydra reads this module at every start, so it imports little.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from relora_core import costs
from relora_core.config import ConfigError, RunConfig, needs_gpu
from sweeps.planning.kinds import kinds_in

# The metadata of an option, by which the other modules know what to do with it.
SBATCH = {"sbatch": True}
"""It goes to sbatch under its own name, if it is set."""
SITE = {**SBATCH, "site": True}
"""Likewise; if it is not set, the user's SBATCH_ variable of that name counts."""
COUNT = {"ge": 1}
"""It must be at least 1."""
FROM_0 = {"ge": 0}
"""It must be at least 0."""

NAMED = {
    **{name: name for name in ("time", "partition", "account", "qos", "constraint", "reservation")},
    **{name: name for name in ("mail_type", "mail_user", "dependency")},
    **{name: name for name in ("nodes", "gpus_per_node", "cpus_per_task")},
    "ntasks_per_node": "tasks_per_node",
    "mem": "mem_gb",
}
"""sbatch's option, with underscores -> ours: in `extra`, it is that."""
COUNTS = ("nodes", "gpus_per_node", "cpus_per_task", "tasks_per_node")
RESERVED = {
    "job_name": "by their own names the next command finds jobs",
    "signal": "at this signal a run saves; hydra.launcher.signal_delay_s says when it comes",
    "requeue": "jobs are always requeued, so that a killed run goes on",
    "no_requeue": "a killed run goes on only if its job is requeued",
    "output": "`python -m sweeps logs` and each run's folder have the logs",
    "error": "`python -m sweeps logs` and each run's folder have the logs",
    "clusters": "squeue and scancel would ask another cluster; SLURM_CLUSTERS tells all of them",
    "array": "each task has its runs; hydra.launcher.max_parallel says how many may run at a time",
}
"""sbatch's options that saving and recovering rest on -> why they stay as they are."""


@dataclass(kw_only=True)
class SlurmOptions:
    """What a job asks of SLURM; `resources.*` of a run overrides the shape for that run."""

    partition: str | None = field(default=None, metadata=SITE)
    account: str | None = field(default=None, metadata=SITE)
    qos: str | None = field(default=None, metadata=SITE)
    constraint: str | None = field(default=None, metadata=SITE)
    reservation: str | None = field(default=None, metadata=SITE)
    time: str = "1:00:00"
    """Limit of one job: minutes, MM:SS, H:MM:SS, D-H, D-HH:MM:SS. A run may take several jobs."""
    nodes: int = field(default=1, metadata=COUNT)
    """Machines of one run."""
    gpus_per_node: int = field(default=1, metadata=FROM_0)
    """0: the CPU."""
    tasks_per_node: int | None = None
    """Processes of a run on each node (DDP); null: one per GPU."""
    cpus_per_task: int = field(default=4, metadata=COUNT)
    """Left out where `extra` has cpus_per_gpu."""
    mem_gb: float | None = None
    """Memory of each node; null: the partition's default."""
    exclusive: bool = False
    max_parallel: int | None = field(default=None, metadata=COUNT)
    """Runs at a time; null: as many as SLURM allows."""
    runs_per_job: int = field(default=1, metadata=COUNT)
    """Small runs that share a job, each with its part of the GPUs and cores."""
    gpu_memory_gb: float | None = None
    """Of one GPU: more runs per job than fit are refused. null: not checked."""
    signal_delay_s: int = field(default=120, metadata=FROM_0)
    """From SLURM's warning to its kill: time for the current step and a checkpoint."""
    max_stalled: int = field(default=5, metadata=COUNT)
    """Attempts of one job without a new checkpoint, after which its run has failed."""
    mail_type: str | None = field(default=None, metadata=SBATCH)
    """As sbatch's: END,FAIL, ARRAY_TASKS, ..."""
    mail_user: str | None = field(default=None, metadata=SBATCH)
    dependency: str | None = field(default=None, metadata=SBATCH)
    """As sbatch's: afterok:123."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch: {gres: "gpu:a100:1", licenses: x}; true is a flag. One that has a
    name above is that."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run: module load ..., export ..."""
    teardown: list[str] = field(default_factory=list)
    """Shell lines after it."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun."""
    python: str | None = None
    """Command in place of this Python: `singularity exec --nv image.sif python`."""
    snapshot_limit_mb: float = 50.0
    """Of the frozen copy of the code: more is refused, as something large is not git-ignored."""


def sbatch_options(options: SlurmOptions) -> dict[str, Any]:
    """Options that go to sbatch under their own names."""
    names = [option.name for option in fields(options) if option.metadata.get("sbatch")]
    return {name: value for name in names if (value := getattr(options, name))}


def settled(options: SlurmOptions) -> SlurmOptions:
    """The same, where what `extra` has under a name of sbatch's that has one here is under ours.

    ConfigError if the two differ. Then checks, prices and `resources.*` hold for it, too.
    """
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in options.extra.items():
        own = own_option(key, value)
        if own is None:
            extra[key] = value
            continue
        name, new = own
        before = values.get(name, getattr(options, name))
        if before != getattr(SlurmOptions(), name) and not _same(name, before, new):
            raise ConfigError(
                f"hydra.launcher.{name}={before} and hydra.launcher.extra.{key}={value} disagree: "
                "leave one out"
            )
        values[name] = new
        if name == "gpus_per_node" and ":" in str(value):
            extra[key] = value  # for its kind of GPU (`gpu_kind`)
    return replace(options, extra=extra, **values)


def own_option(key: str, value: Any) -> tuple[str, Any] | None:
    """(name, value) of ours that is this option of sbatch's; None if it has no name here."""
    name = NAMED.get(plain(key))
    if name is None or value is None:
        return None
    text = str(value)
    if name == "mem_gb":
        return name, _gigabytes(key, text)
    if name not in COUNTS:
        return name, text
    match = re.fullmatch(r"([\w.-]+:)?(\d+)", text)  # a100:2
    if match is None or (match[1] and name != "gpus_per_node"):
        raise ConfigError(f"hydra.launcher.extra.{key} must be an integer, got {text!r}")
    return name, int(match[2])


def plain(key: str) -> str:
    """sbatch's option with underscores, as submitit takes it; sbatch has dashes."""
    return key.replace("-", "_")


def _same(name: str, one: Any, other: Any) -> bool:
    return minutes(one) == minutes(other) if name == "time" else one == other


def _gigabytes(key: str, text: str) -> float:
    """sbatch's notation of memory (64G, 512M; without a unit megabytes) as `mem_gb`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    if match is None:
        raise ConfigError(f"hydra.launcher.extra.{key} must be like 64G or 512M, got {text!r}")
    return float(match[1]) * 1024.0 ** ("KMGT".index(match[2] or "M") - 2)


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """What one job asks for: runs of one shape share an array."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    mem_gb: float | None
    minutes: int
    by_gpu: bool = False
    """sbatch is given cpus_per_gpu, from which cpus_per_task follows."""

    @property
    def processes(self) -> int:
        return self.nodes * self.tasks_per_node


def minutes(text: str, *, key: str = "hydra.launcher.time") -> int:
    """SLURM's notation of a time limit in whole minutes, rounded up; ConfigError otherwise."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(text))
    if match is None:
        raise ConfigError(
            f"{key} must be minutes, H:MM:SS or D-HH:MM:SS, got {text!r}; for example 4:00:00"
        )
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, secs = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, secs = numbers
    else:  # M or M:S
        hours, (mins, secs) = 0, [*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + secs
    return -(-total // 60)


def shape_of(config: RunConfig, options: SlurmOptions) -> Shape:
    """What a run's job asks for: the run's own `resources`, else the launcher's options."""

    def pick(name: str) -> Any:
        own = getattr(config.resources, name)
        return getattr(options, name) if own is None else own

    key = "hydra.launcher.time" if config.resources.time is None else "resources.time"
    gpus = pick("gpus_per_node")
    each = 1 if options.runs_per_job > 1 else max(1, gpus)  # runs that share a job have a process
    tasks, cpus = pick("tasks_per_node") or each, pick("cpus_per_task")
    per_gpu = cpus_per_gpu(options)
    by_gpu = bool(per_gpu and gpus) and cpus == SlurmOptions.cpus_per_task
    by_gpu = by_gpu and config.resources.cpus_per_task is None
    if by_gpu:
        cpus = max(1, per_gpu * gpus // (tasks * options.runs_per_job))
    return Shape(
        nodes=pick("nodes"),
        gpus_per_node=gpus,
        tasks_per_node=tasks,
        cpus_per_task=cpus,
        mem_gb=pick("mem_gb"),
        minutes=minutes(pick("time"), key=key),
        by_gpu=by_gpu,
    )


def cpus_per_gpu(options: SlurmOptions) -> int:
    """Of `extra`; 0: none."""
    text = next((str(v) for k, v in options.extra.items() if plain(k) == "cpus_per_gpu"), "0")
    if not text.isdecimal():
        raise ConfigError(f"hydra.launcher.extra.cpus_per_gpu must be an integer, got {text!r}")
    return int(text)


def gpu_kind(options: SlurmOptions) -> str:
    """The kind of GPU in `extra`'s gpus_per_node (a100:2), or nothing."""
    values = [str(v) for k, v in options.extra.items() if plain(k) == "gpus_per_node"]
    return values[0].rpartition(":")[0] if values else ""


def partition_of(options: SlurmOptions) -> str:
    """Empty: the default one."""
    return options.partition or ""


def gpu_kinds(options: SlurmOptions) -> tuple[str, ...]:
    """Kinds of GPU that jobs ask for, by gres (`gpu:a100:1`) or else by constraint or partition;
    none if these say nothing."""
    extra = {key.replace("_", "-"): str(value) for key, value in options.extra.items()}
    typed = re.findall(r"\bgpu:([A-Za-z][\w.-]*)", extra.get("gres", ""))
    for key in ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"):
        typed += re.findall(r"([A-Za-z][\w.-]*):\d+", extra.get(key, ""))
    if typed:
        return tuple(dict.fromkeys(typed))
    return kinds_in(options.constraint or "") or kinds_in(partition_of(options))


# checks, before anything is written -------------------------------------------------------------
def check_options(options: SlurmOptions) -> None:
    """ConfigError for options that no cluster could grant."""
    for option in fields(options):
        value, least = getattr(options, option.name), option.metadata.get("ge")
        if least is not None and value is not None and value < least:
            raise ConfigError(
                f"hydra.launcher.{option.name} must be >= {least}, got {value}; "
                f"nearest valid: {least}"
            )
    if options.max_parallel is not None and options.runs_per_job > options.max_parallel:
        raise ConfigError(
            f"hydra.launcher.runs_per_job must be <= max_parallel={options.max_parallel}, got "
            f"{options.runs_per_job}; nearest valid: {options.max_parallel}"
        )
    _check_time(options.time, key="hydra.launcher.time", delay_s=options.signal_delay_s)
    for key, value in options.extra.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(f"hydra.launcher.extra.{key} must be one value, got {value}")
        if plain(key) in RESERVED and (plain(key), value) != ("requeue", True):
            why = RESERVED[plain(key)]
            raise ConfigError(f"hydra.launcher.extra.{key} must be left out, got {value!r}: {why}")


def _check_time(text: str, *, key: str, delay_s: int) -> None:
    if minutes(text, key=key) * 60 <= delay_s:
        raise ConfigError(
            f"{key} must be longer than signal_delay_s={delay_s} (the part of it that saving may "
            f"take), got {text!r}; nearest valid: {delay_s // 60 + 5}"
        )


def check_cell(config: RunConfig, options: SlurmOptions) -> None:
    """ConfigError if the run does not suit its processes or its time."""
    shape = shape_of(config, options)
    if config.resources.time is not None:
        _check_time(config.resources.time, key="resources.time", delay_s=options.signal_delay_s)
    if config.train.batch_size % shape.processes:
        good = max(1, round(config.train.batch_size / shape.processes)) * shape.processes
        raise ConfigError(
            f"train.batch_size must be divisible by the {shape.processes} processes "
            f"({shape.nodes} nodes of {shape.tasks_per_node}), got {config.train.batch_size}; "
            f"nearest valid: {good}"
        )
    setting = needs_gpu(config)
    if setting and not shape.gpus_per_node and not options.extra:
        other = ", or runtime.device=cpu" if config.runtime.device == "cuda" else ""
        raise ConfigError(
            f"hydra.launcher.gpus_per_node must be >= 1 with {setting}, got 0; nearest valid: 1"
            f"{other}"
        )
    every = config.checkpoint.every_minutes
    if every is not None and every >= shape.minutes:
        raise ConfigError(
            f"hydra.launcher.time must be longer than checkpoint.every_minutes={every:g}, got "
            f"{shape.minutes} min; nearest valid: {int(2 * every) + 1}"
        )
    if options.runs_per_job == 1:
        return
    if shape.processes > 1:
        raise ConfigError(
            "hydra.launcher.runs_per_job must be 1 for a run of several nodes or processes, got "
            f"{options.runs_per_job} with {shape.nodes} x {shape.tasks_per_node}"
        )
    if options.gpu_memory_gb is not None and shape.gpus_per_node:
        compiled = config.runtime.compile != "off"
        each = costs.memory_bytes(config, compiled=compiled)["total"] / 1e9
        per_gpu = -(-options.runs_per_job // shape.gpus_per_node)
        if each * per_gpu > options.gpu_memory_gb:
            fits = max(1, int(options.gpu_memory_gb / each) * shape.gpus_per_node)
            raise ConfigError(
                f"hydra.launcher.runs_per_job must be <= {fits} ({each:.3g} GB for each run, "
                f"{options.gpu_memory_gb:g} GB on each of {shape.gpus_per_node} GPUs), got "
                f"{options.runs_per_job}; nearest valid: {fits}"
            )

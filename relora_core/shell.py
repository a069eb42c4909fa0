"""What a process takes from the shell that started it: its place in a group, and nothing else.

Launchers speak through environment variables, and so does a user's profile, by accident. This is
the only place that reads them for a run. Not for: SLURM's job ids, or paths and credentials.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from relora_core.config import ConfigError, RunConfig

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
PLACE = (*NUMBERS, *ADDRESS)
"""Together the place of a process in its group, as torchrun, `accelerate launch` and our jobs name
it."""
ELASTIC = ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
ELASTIC += ("NODE_RANK", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "FORK_LAUNCHED")
"""What launchers name beside it: of no use to us, and false in another process."""
ELASTIC_PREFIXES = ("TORCHELASTIC_",)
ACCELERATE_PREFIXES = ("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""accelerate takes settings from these wherever its caller names none."""
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
"""ACCELERATE_USE_... of what keeps weights or optimizer state elsewhere, or is no DDP of torch."""
TASKS = {
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "PMIX_RANK": "PMIX_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_RANK": "JSM_NAMESPACE_SIZE",
    "FLUX_TASK_RANK": "FLUX_JOB_SIZE",
    "SLURM_PROCID": "SLURM_STEP_NUM_TASKS",
}
"""Rank and size as mpirun, srun and their like name them: of processes that know of no group."""
TASK_NAMES = (*TASKS, *TASKS.values(), "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
TASK_NAMES += ("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_RANK")
TASK_NAMES += ("MV2_COMM_WORLD_LOCAL_SIZE", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
START = "start one process, or several by torchrun"
PRECISION, USE_CPU = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"
OPTIONS = (PRECISION, USE_CPU)
"""Options of `accelerate launch`: left in the environment, compared with each config."""
_QUIET = ("", "no", "false", "default", "0")
"""Values that `accelerate launch` sets where nothing was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A process's place among those that share one run; the default is a process alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among those on the same node."""
    local_world: int = 1
    address: str = ""
    """host:port of rank 0."""
    served: bool = False
    """By torchrun itself, not by rank 0."""
    start: str = "0"
    """How often torchrun has started these processes before; what it serves outlives them."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world} processes at {self.address}"


def is_place(name: str) -> bool:
    """Whether a variable is part of a place in a group of torchrun or its like."""
    return name in (*PLACE, *ELASTIC) or name.startswith(ELASTIC_PREFIXES)


def is_accelerate(name: str) -> bool:
    """Whether accelerate would take a setting from it."""
    return name.startswith(ACCELERATE_PREFIXES)


def strip_group(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process of ours that is in no group: without every variable of one."""
    return {
        name: value
        for name, value in environment.items()
        if not (is_place(name) or is_accelerate(name) or name in TASK_NAMES)
    }


def group(environment: Mapping[str, str]) -> Group:
    """The group that this process is in; ConfigError where the variables leave it in doubt.

    | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT | the process is |
    | all six, consistent (torchrun, `accelerate launch`, our own jobs)        | in a group     |
    | WORLD_SIZE is 1, and the numbers that are there agree                    | alone          |
    | one of the four numbers (RANK=8 for a LoRA), or none, MASTER_* or not    | alone          |
    | anything else: some of them, no numbers, a rank beyond the size          | refused        |
    | none of a group, but one of several tasks of mpirun, srun and their like | refused        |

    An empty variable counts as none.
    """
    texts = {name: text for name in PLACE if (text := environment.get(name, "").strip())}
    numbers = [name for name in NUMBERS if name in texts]
    if len(numbers) < 2:
        _refuse_tasks(environment)
        return Group()
    variables = " ".join(f"{name}={text}" for name, text in texts.items())
    place = {name: _parse_number(name, texts[name], variables=variables) for name in numbers}
    world, local = place.get("WORLD_SIZE"), place.get("LOCAL_WORLD_SIZE")
    for name, size, of in (
        ("RANK", world, "WORLD_SIZE"),
        ("LOCAL_RANK", local, "LOCAL_WORLD_SIZE"),
    ):
        if size is not None and place.get(name, 0) >= max(size, 1):
            raise ConfigError(f"{name} must be below {of}, got {variables}; {START}, or unset them")
    if world == 0 or local == 0 or (world and local and local > world):
        raise ConfigError(
            f"LOCAL_WORLD_SIZE must be in [1, WORLD_SIZE], got {variables}; {START}, or unset them"
        )
    if world == 1:
        _refuse_tasks(environment)
        return Group()
    if missing := [name for name in PLACE if name not in texts]:
        raise ConfigError(
            f"a group of processes must be named by {', '.join(PLACE)}, got {variables} without "
            f"{', '.join(missing)}; {START}, or unset them"
        )
    port = _parse_number("MASTER_PORT", texts["MASTER_PORT"], variables=variables)
    assert world is not None
    return Group(
        rank=place["RANK"],
        world=world,
        local_rank=place["LOCAL_RANK"],
        local_world=place["LOCAL_WORLD_SIZE"],
        address=f"{texts['MASTER_ADDR']}:{port}",
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        start=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _parse_number(name: str, text: str, *, variables: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name} must be a whole number, got {variables}; {START}, or unset them")
    return int(text)


def _refuse_tasks(environment: Mapping[str, str]) -> None:
    """Refuse tasks of mpirun or srun: each would train the full run, all in one folder."""
    for rank, size in TASKS.items():
        place, of = (environment.get(name, "").strip() for name in (rank, size))
        if any(text.isdigit() and int(text) > least for text, least in ((place, 0), (of, 1))):
            variables = " ".join(f"{n}={t}" for n, t in ((rank, place), (size, of)) if t)
            raise ConfigError(
                f"processes of one run must be named by {', '.join(PLACE)}, got {variables} alone "
                f"(mpirun or srun): {START} (on SLURM: hydra/launcher=slurm with "
                "hydra.launcher.tasks_per_node)"
            )


def take_group(environment: MutableMapping[str, str] | None = None) -> Group:
    """The group that this process is in. Other variables of launchers are removed from its
    environment, so that nothing reads them, and named in one line on stderr."""
    environment = os.environ if environment is None else environment
    for what in SHARDED:
        name = f"ACCELERATE_USE_{what}"
        if environment.get(name, "").strip().lower() not in _QUIET:
            raise ConfigError(
                "distributed type must be DDP or a single process, got "
                f"{name}={environment[name]}: a restart edits weights and optimizer state that "
                "others keep elsewhere; unset it, or launch without"
            )
    dynamo = "ACCELERATE_DYNAMO_BACKEND"
    if environment.get(dynamo, "").strip().lower() not in _QUIET:
        raise ConfigError(
            f"{dynamo} must be no (a run is not compiled), got {environment[dynamo]!r}; unset it"
        )
    place = group(environment)
    others = {n: v for n, v in environment.items() if is_accelerate(n) and n not in OPTIONS}
    if place.world == 1:
        others |= {name: v for name, v in environment.items() if is_place(name)}
    for name in others:
        del environment[name]
    if ignored := _list_effective(others):
        print(f"warning: set aside from the environment: {ignored}", file=sys.stderr)
    return place


def _list_effective(others: Mapping[str, str]) -> str:
    """The variables that could have an effect; those of one process, and defaults, could not."""
    is_one = others.get("WORLD_SIZE") == "1"
    place = "" if is_one else _assignments(others, [n for n in PLACE if n in others])
    settings = _assignments(others, [n for n in others if is_accelerate(n)])
    place += " (no group of processes: this one is alone)" if place else ""
    settings += " (settings are the config's)" if settings else ""
    return ", ".join(filter(None, (place, settings)))


def _assignments(others: Mapping[str, str], names: list[str]) -> str:
    return " ".join(f"{n}={others[n]}" for n in names if others[n].strip().lower() not in _QUIET)


def require_one_process(what: str) -> None:
    """ConfigError in a process of a group: each of them would do the same."""
    place = take_group()
    if place.world > 1:
        raise ConfigError(
            f"{what} must be started as one process, got {place}: it starts processes of its own; "
            "run it without torchrun (several processes for each run: hydra/launcher=slurm)"
        )


def check_options(config: RunConfig, *, gpu: bool) -> None:
    """ConfigError where `accelerate launch` was asked for what the config does not say.

    `gpu`: whether the run would take one.
    """
    asked = os.environ.get(PRECISION, "").strip().lower()
    if asked not in _QUIET and asked != config.train.precision:
        nearest = f"; nearest valid: train.precision={asked}" if asked == "bf16" else ""
        raise ConfigError(
            f"train.precision must be what {PRECISION}={asked} asks for, got "
            f"{config.train.precision!r}{nearest}; or launch with --mixed_precision no"
        )
    if gpu and os.environ.get(USE_CPU, "").strip().lower() not in _QUIET:
        raise ConfigError(
            f"runtime.device must be cpu where {USE_CPU} asks for it, got "
            f"{config.runtime.device!r}; or launch without --cpu"
        )


@contextlib.contextmanager
def hide_options() -> Iterator[None]:
    """Inside the block the options of `accelerate launch` are not in the environment."""
    asked = {name: os.environ.pop(name) for name in OPTIONS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)

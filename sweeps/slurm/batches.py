"""Which runs go into which job array, and how many tasks run at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sweeps.planning.plan import Cell
from sweeps.slurm import cluster
from sweeps.slurm.options import Shape, SlurmOptions, shape_of

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class Batch(Generic[T]):
    """What one sbatch submits."""

    shape: Shape
    tasks: list[list[T]]
    """The runs, or other work, of each task of the array."""
    lane: int = 0
    """Arrays of one lane run one after another, if `max_parallel` limits them."""
    at_once: int | None = None
    """Tasks that may run at a time; None: all."""

    @property
    def cells(self) -> list[T]:
        return [cell for task in self.tasks for cell in task]

    def request(self, options: SlurmOptions) -> tuple[SlurmOptions, Shape]:
        """What its jobs ask for: cores and GPUs for no more runs than its largest task has."""
        if options.runs_per_job == 1:
            return options, self.shape
        runs = max(len(task) for task in self.tasks)
        gpus = min(self.shape.gpus_per_node, runs)
        return (
            dataclasses.replace(options, runs_per_job=runs),
            dataclasses.replace(self.shape, gpus_per_node=gpus),
        )


def batches(
    cells: Sequence[Cell], *, options: SlurmOptions, max_array_size: int | None
) -> list[Batch[Cell]]:
    """One array per shape, split at the largest size of an array; they share `max_parallel`."""
    by_shape: dict[Shape, list[Cell]] = {}
    for cell in cells:
        by_shape.setdefault(shape_of(cell.config, options), []).append(cell)
    k, most = options.runs_per_job, max_array_size or cluster.ARRAY
    cap = None if options.max_parallel is None else max(1, options.max_parallel // k)
    made: list[Batch[Cell]] = []
    shorts: list[tuple[Batch[Cell], Batch[Cell]]] = []  # (a task with fewer runs, its array)
    for shape, members in by_shape.items():
        tasks = [members[i : i + k] for i in range(0, len(members), k)]
        short = tasks.pop() if len(tasks) > 1 and len(tasks[-1]) < k else None
        made += [Batch(shape=shape, tasks=tasks[i : i + most]) for i in range(0, len(tasks), most)]
        if short is not None:
            shorts.append((Batch(shape=shape, tasks=[short]), made[-1]))
    _share_cap(made, jobs=cap)
    for short, main in shorts:  # after its array if there is a cap, so that it takes no share
        short.lane, short.at_once = main.lane, None if cap is None else 1
        made.insert(made.index(main) + 1, short)
    return made


def arrays(tasks: list[list[T]], *, shape: Shape, cap: int | None) -> list[Batch[T]]:
    """Tasks of one shape, split at the largest size of an array; at most `cap` run at a time."""
    size = cluster.max_array_size()
    parts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    made = [Batch(shape=shape, tasks=part) for part in parts]
    _share_cap(made, jobs=cap)
    return made


def _share_cap(made: Sequence[Batch[T]], *, jobs: int | None) -> None:
    """At most `jobs` tasks at once over all arrays; SLURM limits each array by itself only."""
    if jobs is None:
        return
    lanes = min(jobs, len(made))
    for index, batch in enumerate(made):
        batch.lane = index % lanes
        batch.at_once = jobs // lanes + (batch.lane < jobs % lanes)

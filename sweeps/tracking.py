"""Keeps MLflow up to date with an output folder while its runs are at work.

Not for: how it looks in MLflow (`experiments/tracking/`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments import addresses
from experiments.disk.output_dir import run_at
from experiments.disk.state import RunState
from experiments.tracking.tracker import Pass, Tracker
from sweeps.planning.plan import Plan
from sweeps.slurm.survey import survey


def bring_up_to_date(
    output_dir: Path | str,
    sweeps: Sequence[str] | None = None,
    *,
    tracking_uri: str | None = None,
    states: Mapping[str, RunState] | None = None,
    final: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Pass]:
    """Show sweeps (None: all, and runs of none) as they are now; see Tracker."""
    shower = tracker(output_dir, tracking_uri=tracking_uri)
    return shower.bring_up_to_date(sweeps, states=states, final=final, progress=progress)


def tracker(
    output_dir: Path | str, *, tracking_uri: str | None = None, servers: bool = True
) -> Tracker:
    """One that asks SLURM, where runs are its."""
    return Tracker(output_dir, survey=survey, tracking_uri=tracking_uri, servers=servers)


def shown(output_dir: Path | str, sweep: str) -> list[Pass]:
    """What came of showing the sweep; none, and a line on stderr, where its plan cannot be read."""
    try:
        return bring_up_to_date(output_dir, [sweep])
    except Exception as error:  # whatever it is: the runs go on, and a later sync can succeed
        line = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"tracking: {line}; `python -m sweeps sync` tries again", file=sys.stderr)
        return []


def complaints(passes: Sequence[Pass]) -> Iterator[str]:
    """What is wrong, in lines of which each is said once in a process."""
    for one in passes:
        for line in (one.problem, one.files):
            if line and line not in _SAID:
                _SAID.add(line)
                yield line


_SAID: set[str] = set()


STORE_S = 120.0
"""Longest wait for MLflow's store when all runs have ended."""


@contextlib.contextmanager
def follow(plan: Plan, output_dir: Path) -> Iterator[None]:
    """Keep the sweep's runs in MLflow up to date; its means when all have ended.

    In a thread: a store may take a second for each run, or not answer at all.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(plan, output_dir, ended), daemon=True)
    if not any(cell.config.tracking.enabled for cell in plan.cells):
        yield
        return
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(STORE_S)
        if thread.is_alive():
            line = f"tracking: not ready {STORE_S:.0f} s after the runs; `python -m sweeps sync` is"
            print(f"{line} what is left to do", file=sys.stderr)


def _follow(plan: Plan, output_dir: Path, ended: threading.Event) -> None:
    """Show all runs, follow them by a child process until `ended`, show all again."""
    from experiments.tracking import follower

    tracked = [cell for cell in plan.cells if cell.config.tracking.enabled]
    config = tracked[0].config
    place = (addresses.store_uri(config), addresses.experiment_name(config))
    passes = shown(output_dir, plan.name)
    here = next((one for one in passes if (one.uri, one.experiment) == place), None)
    if not ended.is_set():
        with follower.follow(
            [run_at(output_dir, cell.run_id) for cell in tracked],
            config=config,
            names=here.names if here else {cell.run_id: cell.name for cell in tracked},
            parent=here.parent if here else None,
            warn=lambda _: None,  # a pass over all of it follows
        ):
            ended.wait()
    for line in complaints(shown(output_dir, plan.name)):
        print(line, file=sys.stderr)

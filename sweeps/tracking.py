"""Keeps MLflow up to date with an output folder, also while its runs are at work.

Not for: what MLflow shows (`experiments/tracking/`), nor a run of this process (`attempt.follow`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments.disk.state import RunState
from experiments.tracking.tracker import Pass, Tracker
from sweeps.planning.plan import Plan
from sweeps.slurm.survey import survey

LONGEST_S = 60.0
"""Longest pause after an update with a problem."""
INTERRUPTED_S = 10.0
"""Longest wait for an update at work after Ctrl-C."""
LOCAL_S = 5.0
"""Pause between two updates while runs of this machine are at work."""
STORE_S = 120.0
"""Longest wait for MLflow's store when all runs have ended."""
_REPORTED: set[str] = set()
"""Problems that this process has printed."""


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
    tracker = make_tracker(output_dir, tracking_uri=tracking_uri)
    return tracker.bring_up_to_date(sweeps, states=states, final=final, progress=progress)


def make_tracker(
    output_dir: Path | str, *, tracking_uri: str | None = None, servers: bool = True
) -> Tracker:
    """A Tracker that asks SLURM about runs that were submitted to it."""
    return Tracker(output_dir, survey=survey, tracking_uri=tracking_uri, servers=servers)


def try_to_update(
    tracker: Tracker,
    sweeps: Sequence[str] | None,
    *,
    states: Mapping[str, RunState] | None = None,
    final: bool = True,
) -> list[Pass]:
    """What came of showing the sweeps; an exception becomes the `problem` of a single Pass."""
    try:
        return tracker.bring_up_to_date(sweeps, states=states, final=final)
    except Exception as error:  # of any kind: the runs go on, and a later sync can succeed
        line = next(iter(str(error).splitlines()), type(error).__name__)
        line = line if line.startswith("tracking") else f"tracking: {line}"
        problem = f"{line}; `python -m sweeps sync` tries again"
        place = {"uri": "", "experiment": "", "sweep": None}
        return [Pass(**place, names={}, colours={}, problem=problem)]


def show(output_dir: Path | str, sweep: str) -> list[Pass]:
    """Show the sweep as it is now; what came of it."""
    return try_to_update(make_tracker(output_dir), [sweep])


def problems(passes: Sequence[Pass]) -> list[str]:
    return [one.problem for one in passes if one.problem]


def new_problems(passes: Sequence[Pass]) -> Iterator[str]:
    """Lines on what is wrong, each once in this process."""
    for one in passes:
        for line in (one.problem, one.files):
            if line and line not in _REPORTED:
                _REPORTED.add(line)
                yield line


def print_problems(passes: Sequence[Pass]) -> None:
    for line in new_problems(passes):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def keep_up_to_date(
    output_dir: Path | str,
    sweeps: Sequence[str] | None,
    *,
    every_s: float,
    report: Callable[[Sequence[Pass]], None],
    report_all: bool = True,
    states: Callable[[], Mapping[str, RunState] | None] = lambda: None,
    servers: bool = True,
    last_s: float | None = None,
) -> Iterator[None]:
    """Keep MLflow up to date while the body runs, and bring it up to date once more at its end.

    In a thread: a store may take a second for each run, or not answer at all. The thread works at
    most a fifth of the time, and pauses longer after a problem. `report` gets what came of each
    update; without `report_all`, of the last one only. `states` returns the caller's, which saves
    asking the scheduler. The last update may take `last_s` seconds; after Ctrl-C there is none.
    """
    tracker = make_tracker(output_dir, servers=servers)
    over, interrupted = threading.Event(), threading.Event()

    def repeat() -> None:
        pause = every_s
        while not interrupted.is_set():
            final, began = over.is_set(), time.monotonic()
            passes = try_to_update(tracker, sweeps, states=states(), final=final)
            if final or report_all:
                report(passes)
            if final:
                return
            pause = min(2 * pause, LONGEST_S) if problems(passes) else every_s
            over.wait(max(pause, 4 * (time.monotonic() - began)))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        interrupted.set()
        raise
    finally:
        over.set()
        thread.join(INTERRUPTED_S if interrupted.is_set() else last_s)
        if thread.is_alive() and not interrupted.is_set():
            line = f"tracking: not ready {last_s:.0f} s after the runs; `python -m sweeps sync` is"
            print(f"{line} what is left to do", file=sys.stderr)


@contextlib.contextmanager
def follow(plan: Plan, output_dir: Path) -> Iterator[None]:
    """Keep the sweep's runs up to date while the body runs; means over seeds come at its end."""
    if not plan.is_tracked:
        yield
        return
    with keep_up_to_date(
        output_dir,
        [plan.name],
        every_s=LOCAL_S,
        report=print_problems,
        report_all=False,
        last_s=STORE_S,
    ):
        yield

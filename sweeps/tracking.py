"""Keeps MLflow up to date with an output folder while its runs are at work.

Not for: how it looks in MLflow (`experiments/tracking/`), nor for a run in this very process, which
a child process follows (`attempt.followed`).
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
    """One that asks SLURM if runs were submitted to it."""
    return Tracker(output_dir, survey=survey, tracking_uri=tracking_uri, servers=servers)


def pass_over(
    shower: Tracker,
    sweeps: Sequence[str] | None,
    *,
    states: Mapping[str, RunState] | None = None,
    final: bool = True,
) -> list[Pass]:
    """The results of a pass; if the plans cannot be read, that is its only problem."""
    try:
        return shower.bring_up_to_date(sweeps, states=states, final=final)
    except Exception as error:  # whatever it is: the runs go on, and a later sync can succeed
        line = next(iter(str(error).splitlines()), type(error).__name__)
        line = line if line.startswith("tracking") else f"tracking: {line}"
        problem = f"{line}; `python -m sweeps sync` tries again"
        place = {"uri": "", "experiment": "", "sweep": None}
        return [Pass(**place, names={}, colours={}, problem=problem)]


def show(output_dir: Path | str, sweep: str) -> list[Pass]:
    """What came of showing the sweep as it is now."""
    return pass_over(tracker(output_dir), [sweep])


def problems(passes: Sequence[Pass]) -> list[str]:
    return [one.problem for one in passes if one.problem]


def complaints(passes: Sequence[Pass]) -> Iterator[str]:
    """Lines on what is wrong; each line once per process."""
    for one in passes:
        for line in (one.problem, one.files):
            if line and line not in _SAID:
                _SAID.add(line)
                yield line


_SAID: set[str] = set()


def complain(passes: Sequence[Pass]) -> None:
    for line in complaints(passes):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def keep_up_to_date(
    output_dir: Path | str,
    sweeps: Sequence[str] | None,
    *,
    every_s: float,
    hear: Callable[[Sequence[Pass]], None],
    meanwhile: bool = True,
    states: Callable[[], Mapping[str, RunState] | None] = lambda: None,
    servers: bool = True,
    last_s: float | None = None,
) -> Iterator[None]:
    """Keep MLflow up to date while the body runs, and bring it up to date once more at its end.

    In a thread: a store may take a second for each run, or not answer at all. Passes take at most a
    fifth of the time, and after one with a problem the next one waits longer. `hear` gets what came
    of each pass, of the last one alone unless `meanwhile`. `states`, as the caller has them, spare
    asking the scheduler. The end is awaited for `last_s` seconds; after Ctrl-C there is no last
    pass.
    """
    shower = tracker(output_dir, servers=servers)
    over, cut = threading.Event(), threading.Event()

    def repeat() -> None:
        pause = every_s
        while not cut.is_set():
            final, began = over.is_set(), time.monotonic()
            passes = pass_over(shower, sweeps, states=states(), final=final)
            if final or meanwhile:
                hear(passes)
            if final:
                return
            pause = min(2 * pause, LONGEST_S) if problems(passes) else every_s
            over.wait(max(pause, 4 * (time.monotonic() - began)))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        cut.set()
        raise
    finally:
        over.set()
        thread.join(CUT_S if cut.is_set() else last_s)
        if thread.is_alive() and not cut.is_set():
            line = f"tracking: not ready {last_s:.0f} s after the runs; `python -m sweeps sync` is"
            print(f"{line} what is left to do", file=sys.stderr)


LONGEST_S = 60.0
"""Longest pause after a pass with a problem."""
CUT_S = 10.0
"""Longest wait for the pass at work after Ctrl-C."""
LOCAL_S = 5.0
"""Pause between two passes while runs of this machine are at work."""
STORE_S = 120.0
"""Longest wait for MLflow's store when all runs have ended."""


@contextlib.contextmanager
def follow(plan: Plan, output_dir: Path) -> Iterator[None]:
    """Keep the sweep's runs in MLflow up to date; its means when all have ended."""
    if not any(cell.config.tracking.enabled for cell in plan.cells):
        yield
        return
    with keep_up_to_date(
        output_dir, [plan.name], every_s=LOCAL_S, hear=complain, meanwhile=False, last_s=STORE_S
    ):
        yield

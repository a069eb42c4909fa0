"""`watch`: the view of `status`, live; also keeps MLflow up to date. Ending it ends no run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.tracking.tracker import Pass
from relora_core.config import ConfigError
from sweeps import display, tracking
from sweeps.commands import selection, status
from sweeps.commands.selection import Observer, Run

HELP = "a live table of the runs, until they have ended"
EXAMPLES = """examples:
  python -m sweeps watch                        everything; Ctrl-C ends the watch, never a run
  python -m sweeps watch SWEEP && echo done     exit code 0 when all ended well, 1 when some did not
  python -m sweeps watch --once                 one look, and MLflow brought up to date
"""
SYNC_S = 15.0
"""Shortest time between two updates of MLflow."""


def configure(parser: argparse.ArgumentParser) -> None:
    selection.add_runs(parser)
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between looks (5)"
    )
    parser.add_argument("--once", action="store_true", help="look once and return")


def run(args: argparse.Namespace) -> int:
    """0 when every run has ended well, 1 when some have not, 130 on Ctrl-C."""
    if args.interval <= 0:
        raise ConfigError(f"--interval must be > 0 s, got {args.interval:g}; nearest valid: 1")
    if not (runs := selection.named_runs(args.output_dir, args.sweep)):
        print(selection.no_runs(args.output_dir))
        return 0
    sweeps = [args.sweep] if args.sweep in runs[0].sweeps else None
    view, console = View(), display.make_console()
    if args.once:
        view.states = selection.survey(runs)
        tracker = tracking.make_tracker(args.output_dir, servers=False)
        view.report(tracking.try_to_update(tracker, sweeps, states=view.states))
        console.print(_all(runs, view))
        return int(any(state.state.bad for state in view.states.values()))
    try:
        # Servers are left to `sync`: they may be slow, and not the user's alone.
        with tracking.keep_up_to_date(
            args.output_dir,
            sweeps,
            every_s=SYNC_S,
            report=view.report,
            states=lambda: view.states or None,
            servers=False,
        ):
            _watch(args, runs, view=view, console=console)
        if view.problem:
            print(view.problem, file=sys.stderr)
    except KeyboardInterrupt:
        print("the watch has ended; the runs go on", file=sys.stderr)
        return 130
    well = (State.FINISHED, State.PRUNED)
    return int(any(state.state not in well for state in view.states.values()))


@dataclass(slots=True)
class View:
    """What is shown, as of the last look."""

    states: Mapping[str, RunState] = field(default_factory=dict)
    problem: str | None = None
    """What is wrong with MLflow, in one line."""

    def report(self, passes: Sequence[Pass]) -> None:
        self.problem = next(iter(tracking.problems(passes)), None)


def _watch(args: argparse.Namespace, runs: Sequence[Run], *, view: View, console: Console) -> None:
    """Look until nothing is queued or running.

    A failure counts only if the second look confirms it: SLURM shows a job as failed for a moment
    before it requeues it.
    """
    observer, over = Observer(), False
    with Table(console) if console.is_terminal else Lines(console) as show:
        while True:
            if observer.due:  # the sweep may have been widened meanwhile
                runs = selection.named_runs(args.output_dir, args.sweep)
            states = view.states = observer.look(runs, ask=over)
            show(runs, view)
            before, over = over, not any(s.state.in_flight for s in states.values())
            if over and (before or all(s.state.done for s in states.values())):
                return
            time.sleep(args.interval)


# showing ----------------------------------------------------------------------------------------
def _all(runs: Sequence[Run], view: View, *, height: int | None = None) -> Group:
    parts = [status.view(runs, view.states, height=height)]
    if view.problem:
        parts.append(Group(Text(view.problem, style="yellow")))
    return Group(*parts)


class Table:
    """For a terminal: redraws the view in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Table:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, runs: Sequence[Run], view: View) -> None:
        self.live.update(_all(runs, view, height=self.console.height - 2), refresh=True)


class Lines:
    """For files and pipes: a line per run with a new state, and the totals if they changed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.states: dict[str, str] = {}
        self.sums = ""
        self.problem: str | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, runs: Sequence[Run], view: View) -> None:
        states, problem = view.states, view.problem
        for run in runs:
            state = states[run.run_id]
            if self.states and self.states.get(run.run_id) != state.state:
                why = f": {state.reason}" if state.reason else ""
                display.say(self.console, f"{state.state:<9} {run.name}{why}")
        self.states = {run_id: state.state for run_id, state in states.items()}
        done, steps = (sum(getattr(s, k) for s in states.values()) for k in ("step", "steps"))
        sums = f"{selection.counts(list(states.values()))}; step {done}/{steps} in all"
        for line, before in ((sums, self.sums), (problem, self.problem)):
            if line and line != before:
                display.say(self.console, line)
        self.sums, self.problem = sums, problem

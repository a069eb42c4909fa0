"""`watch`: the view of `status`, live, while MLflow is kept up to date. Ending it ends no run."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.disk.state import RunState
from experiments.disk.states import State
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
"""Shortest time between two passes over MLflow."""


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
    whole = args.sweep in runs[0].sweeps
    mirror = Mirror(args.output_dir, sweep=args.sweep if whole else None)
    console = display.make_console()
    if args.once:
        states = mirror.states = selection.survey(runs)
        mirror.pass_over(final=True)
        console.print(_whole(runs, states, mirror=mirror))
        return int(any(state.state.bad for state in states.values()))
    try:
        states = _watch(args, runs, mirror=mirror, console=console)
        mirror.pass_over(final=True)
        if mirror.problem:
            print(mirror.problem, file=sys.stderr)
    except KeyboardInterrupt:
        print("the watch has ended; the runs go on", file=sys.stderr)
        return 130
    return int(any(state.state is not State.FINISHED for state in states.values()))


def _watch(
    args: argparse.Namespace, runs: Sequence[Run], *, mirror: Mirror, console: Console
) -> Mapping[str, RunState]:
    """Look until nothing is queued or running; the last states.

    A failure is believed at the second look only: SLURM shows a job as failed for a moment before
    it requeues it.
    """
    observer, show, over = Observer(), _shower(console), False
    mirror.start()
    try:
        with show:
            while True:
                if observer.due:  # the sweep may have been widened meanwhile
                    runs = selection.named_runs(args.output_dir, args.sweep)
                states = mirror.states = observer.look(runs, ask=over)
                show(runs, states, mirror)
                before, over = over, not any(s.state.in_flight for s in states.values())
                if over and (before or all(s.state.done for s in states.values())):
                    return states
                time.sleep(args.interval)
    finally:
        mirror.end()


# showing ----------------------------------------------------------------------------------------
def _whole(
    runs: Sequence[Run],
    states: Mapping[str, RunState],
    *,
    mirror: Mirror,
    height: int | None = None,
) -> Group:
    parts = [status.view(runs, states, height=height)]
    if mirror.problem:
        parts.append(Group(Text(mirror.problem, style="yellow")))
    return Group(*parts)


class Table:
    """A terminal: the whole view, again and again in the same place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Table:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, runs: Sequence[Run], states: Mapping[str, RunState], mirror: Mirror) -> None:
        height = self.console.height - 2
        self.live.update(_whole(runs, states, mirror=mirror, height=height), refresh=True)


class Lines:
    """Elsewhere: a line for each run whose state has changed, and the sums when anything moved."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.states: dict[str, str] = {}
        self.sums = ""
        self.problem: str | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, runs: Sequence[Run], states: Mapping[str, RunState], mirror: Mirror) -> None:
        for run in runs:
            state = states[run.run_id]
            if self.states and self.states.get(run.run_id) != state.state:
                why = f": {state.reason}" if state.reason else ""
                self._line(f"{state.state:<9} {run.name}{why}")
        self.states = {run_id: state.state for run_id, state in states.items()}
        done, steps = (sum(getattr(s, k) for s in states.values()) for k in ("step", "steps"))
        sums = f"{selection.counts(list(states.values()))}; step {done}/{steps} in all"
        for line, before in ((sums, self.sums), (mirror.problem, self.problem)):
            if line and line != before:
                self._line(line)
        self.sums, self.problem = sums, mirror.problem

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shower(console: Console) -> Table | Lines:
    return Table(console) if console.is_terminal else Lines(console)


# MLflow -----------------------------------------------------------------------------------------
class Mirror:
    """Keeps the local MLflow stores of the runs up to date, beside the table; harms nothing.

    Tracking servers are left to `sync`: a slow one must not be asked every few seconds.
    """

    def __init__(self, output_dir: str, *, sweep: str | None = None) -> None:
        self.sweeps = None if sweep is None else [sweep]
        self.states: Mapping[str, RunState] | None = None
        """As the table has them; None: not looked yet."""
        self.problem: str | None = None
        """What is wrong, in one line."""
        self._tracker = tracking.tracker(output_dir, servers=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Let the pass at work end, if that does not take long."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _repeat(self) -> None:
        while not self._stop.is_set():
            self.pass_over()
            self._stop.wait(SYNC_S)

    def pass_over(self, *, final: bool = False) -> None:
        """Send what is new; `final` awaits another process that is at it."""
        try:
            passes = self._tracker.bring_up_to_date(self.sweeps, states=self.states, final=final)
            problems = [one.problem for one in passes if one.problem]
            self.problem = problems[0] if problems else None
        except Exception as error:  # whatever it is: the runs and the watch go on
            line = next(iter(str(error).splitlines()), type(error).__name__)
            self.problem = line if line.startswith("tracking") else f"tracking: {line}"

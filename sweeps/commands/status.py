"""`status`: every run, on one screen: arms of large sweeps, runs of small ones. Reads only."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from experiments.disk.plans import read_sweep
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.metrics import LOSS, columns, percent, scale_of
from experiments.run.sinks import clock
from experiments.stats import interval
from sweeps import display
from sweeps.commands import selection
from sweeps.commands.selection import Run
from sweeps.planning.plan import command

HELP = "state, step and loss of every run; changes nothing"
EXAMPLES = """examples:
  python -m sweeps status                        every sweep; one line per arm when runs are many
  python -m sweeps status model-relora.r --runs  one line per run, with its SLURM job
  python -m sweeps status --json                 {"runs": [...], "notes": {SWEEP: [...]}}
"""
FEW = 20
"""Up to so many runs each has its own line."""
MOST_FAILURES = 10
"""Most failures that are printed; --json has all."""
States = Mapping[str, RunState]


def configure(parser: argparse.ArgumentParser) -> None:
    selection.add_runs(parser)
    parser.add_argument("--runs", action="store_true", help="one line per run, however many")
    parser.add_argument("--json", action="store_true", help="runs and notes, for scripts")


def run(args: argparse.Namespace) -> int:
    """Print the states; the exit code says only whether they could be read."""
    runs = selection.named_runs(args.output_dir, args.sweep)
    states = selection.survey(runs)
    if args.json:
        entries = [entry(one, states[one.run_id]) for one in runs]
        json.dump({"runs": entries, "notes": _notes(args.output_dir, runs)}, sys.stdout, indent=2)
        print()
    elif not runs:
        print(selection.no_runs(args.output_dir))
    else:
        by_run = True if args.runs else None
        console = display.make_console()
        console.print(view(runs, states, by_run=by_run))
        notes = _notes(args.output_dir, runs)
        lines = [
            f"{sweep}: {note}" if len(notes) > 1 else note
            for sweep, of_sweep in notes.items()
            for note in of_sweep
        ]
        display.show_notes(lines, console=console)
    return 0


def _notes(output_dir: Path | str, runs: Sequence[Run]) -> dict[str, list[str]]:
    """Sweep -> the notes of its plan, of each sweep that is shown."""
    sweeps = list(dict.fromkeys(run.sweep for run in runs if run.sweep))
    return {sweep: read_sweep(output_dir, sweep).notes for sweep in sweeps}


def entry(run: Run, state: RunState) -> dict[str, object]:
    """A run in the JSON."""
    fields = ("name", "sweep", "sweeps", "arm_id", "seed")
    return dataclasses.asdict(state) | {key: getattr(run, key) for key in fields}


# the view ---------------------------------------------------------------------------------------
def view(
    runs: Sequence[Run], states: States, *, by_run: bool | None = None, height: int | None = None
) -> Group:
    """Header, a table per sweep, and what went wrong; cut to `height` lines, what is done first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.sweep or "(single runs)", []).append(run)
    by_run = len(runs) <= FEW if by_run is None else by_run
    parts: list[RenderableType] = []
    if len(groups) > 1:
        parts.append(
            Text.assemble(f"{len(runs)} runs: ", _counted([states[r.run_id] for r in runs]))
        )
    failures = [Text(line, overflow="fold") for line in failure_lines(runs, states)]
    lines = None
    if height is not None:
        lines = max(3, (height - len(parts) - len(failures)) // len(groups) - 3)
    for title, members in groups.items():
        heading = Text.assemble(
            (f"{title}: ", "bold"), _counted([states[r.run_id] for r in members])
        )
        parts.append(heading)
        parts.append((_run_table if by_run else _arm_table)(members, states, lines=lines))
    return Group(*parts, *failures)


def _counted(states: Sequence[RunState]) -> Text:
    """`3 finished, 1 running`, coloured."""
    parts = [
        Text(part, style=display.COLOURS.get(part.split()[1], ""))
        for part in selection.counts(states).split(", ")
    ]
    return Text(", ").join(parts)


def failure_lines(runs: Sequence[Run], states: States) -> list[str]:
    """What went wrong with the first few, and where to read more."""
    failed = [run for run in runs if states[run.run_id].state in (State.FAILED, State.LOST)]
    lines = [
        f"{states[run.run_id].state} {run.name}: {_why(run, states[run.run_id])}"
        for run in failed[:MOST_FAILURES]
    ]
    if len(failed) > MOST_FAILURES:
        lines.append(f"... and {len(failed) - MOST_FAILURES} more (--json has all)")
    return lines


def _why(run: Run, state: RunState) -> str:
    why = display.error_line(run.dir, attempts=state.attempts, reason=state.reason or state.state)
    if state.job_id and not run.dir.log_path(max(state.attempts, 1)).exists():
        logs = command("logs", run.run_id, "--slurm", output_dir=run.dir.path.parents[1])
        why += f" ({logs})"
    return why


Row = tuple[int, list[str | Text]]
"""(position in ATTENTION, cells)."""
ATTENTION = (
    State.FAILED,
    State.LOST,
    State.DIVERGED,
    State.RUNNING,
    State.QUEUED,
    State.PLANNED,
    State.CANCELLED,
    State.PRUNED,
    State.FINISHED,
)
"""States in the order in which rows are kept if there is no space for all."""


def _attention(states: Iterable[RunState]) -> int:
    return min(ATTENTION.index(state.state) for state in states)


def _table(
    heads: Sequence[str], rows: list[Row], *, lines: int | None, what: str
) -> RenderableType:
    """Rows below `heads` (with a leading `<` for text), without empty columns."""
    shown = rows
    if lines is not None and len(rows) > lines:
        shown = sorted(rows, key=lambda row: row[0])[: lines - 1]
    used = [i for i in range(len(heads)) if i < 1 or any(cells[i] for _, cells in rows)]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for i in used:
        left = heads[i].startswith("<")
        table.add_column(
            heads[i].removeprefix("<"),
            justify="left" if left else "right",
            overflow="fold" if left else "ellipsis",
            no_wrap=not left,
        )
    for _, cells in shown:
        table.add_row(*(_text(cells[i], nothing="" if heads[i][0] == "<" else "-") for i in used))
    if shown is rows:
        return table
    return Group(table, Text(f"... and {len(rows) - len(shown)} more {what}", style="dim"))


def _text(cell: str | Text, *, nothing: str) -> Text:
    """Not as markup: names hold brackets."""
    return cell if isinstance(cell, Text) else Text(cell or nothing)


def _run_table(runs: Sequence[Run], states: States, *, lines: int | None) -> RenderableType:
    heads = ("<run", "<state", "<job", "attempts", "step", "loss", "tokens/s", *display.SHARES)
    heads = (*heads, "left", "<note")
    rows = []
    for run in runs:
        state = states[run.run_id]
        running = state.state is State.RUNNING
        rate = state.tokens_per_s if running else None
        cells = [
            run.name,
            Text(state.state, style=display.COLOURS.get(state.state, "")),
            state.job_id or "",
            str(state.attempts),
            f"{state.step}/{state.steps}",
            "" if state.loss is None else f"{state.loss:.3f}",
            display.abbreviate(rate) if rate else "",
            *(percent(mfu) if running and mfu else "" for mfu in (state.mfu, state.mfu_6n)),
            _left([state]),
            state.reason or "",
        ]
        rows.append((_attention([state]), cells))
    return _table(heads, rows, lines=lines, what="runs")


def _arm_table(runs: Sequence[Run], states: States, *, lines: int | None) -> RenderableType:
    heads = ("<arm", "seeds", "<state", "step", *columns(), "left", "heartbeat", "<note")
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm_id, []).append(run)
    rows = []
    for members in arms.values():
        arm_states = [states[run.run_id] for run in members]
        cells = [
            members[0].arm,
            str(len(members)),
            _counted(arm_states),
            f"{statistics.mean(s.step for s in arm_states):.0f}/{max(s.steps for s in arm_states)}",
            *_figures(members, arm_states),
            _left(arm_states),
            _heartbeat_age(arm_states),
            _note(arm_states),
        ]
        rows.append((_attention(arm_states), cells))
    return _table(heads, rows, lines=lines, what="arms")


def _figures(runs: Sequence[Run], states: Sequence[RunState]) -> list[str]:
    """Of the seeds that are done: loss as mean +- sd, the other metrics as means, as reports have
    them; n where values that are not finite are left out."""
    results = [
        ({} if state.loss is None else {LOSS.key: state.loss})
        | (run.dir.result() or {}).get("metrics", {})
        for run, state in zip(runs, states, strict=True)
        if state.state is State.FINISHED
    ]
    figures = []
    for name, key in columns().items():
        values = [metrics[key] for metrics in results if key in metrics]
        mean = interval(values, scale=scale_of(key), ends=False) if values else None
        text = f"{mean.mean:.4g}" if mean and mean.n else ""
        if mean and name == "loss" and mean.sd is not None:
            text += f" ± {mean.sd:.2g}"
        if mean and mean.n and mean.left_out:
            text += f" (n = {mean.n})"
        figures.append(text)
    return figures


def _left(states: Sequence[RunState]) -> str:
    """Of the run that needs longest."""
    return _longest(states, lambda state: state.eta_s)


def _heartbeat_age(states: Sequence[RunState]) -> str:
    """Of the running run that has been silent for longest."""
    now = time.time()
    return _longest(states, lambda state: now - state.heartbeat if state.heartbeat else None)


def _longest(states: Sequence[RunState], of: Callable[[RunState], float | None]) -> str:
    running = [of(state) for state in states if state.state is State.RUNNING]
    seconds_left = [seconds for seconds in running if seconds is not None]
    return clock(max(seconds_left)) if seconds_left else ""


def _note(states: Sequence[RunState]) -> str:
    """The reason of the first failure, else of the first run that has one."""
    order = sorted(states, key=lambda state: not state.state.bad)
    return next((state.reason for state in order if state.reason and not state.state.done), "")

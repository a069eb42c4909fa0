"""What a terminal shows of many runs: the plan, the progress and the closing table.

Not for: output that scripts read (`--json`).
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.disk.output_dir import run_at, runs_folder
from experiments.disk.run_dir import RunDir, Status
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.metrics import LOSS, MFU, MFU_6N, columns, percent
from experiments.run.sinks import clock
from relora_core import costs
from relora_core.config import RunConfig
from relora_core.devices import A100
from sweeps.planning import budget
from sweeps.planning.budget import Estimate, tokens
from sweeps.planning.plan import Cell, Plan, command

PLAIN_EVERY_S = 10.0
REFRESH_S = 0.5
COLOURS: dict[str, str] = {
    State.FINISHED: "green",
    State.RUNNING: "cyan",
    State.FAILED: "red",
    State.LOST: "red",
    State.DIVERGED: "magenta",
    State.CANCELLED: "yellow",
    State.PRUNED: "yellow",
}
SHARES = {"MFU": MFU, "MFU by 6N": MFU_6N}
"""Heading -> metric of what a run takes of its GPUs' peak."""
A100_SHARE = 0.1
"""Of an A100's peak, if nothing was measured: small models do not use all of it."""


def make_console() -> Console:
    """As wide as the terminal; in a file, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def abbreviate(number: float) -> str:
    """1234567 -> `1.23M`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def error_line(run_dir: RunDir, *, attempts: int, reason: str | None) -> str:
    """Why a run failed, and the file with more."""
    killed = (reason or "").startswith(("killed", "stopped"))
    log = run_dir.log_path(max(attempts, 1))
    detail = run_dir.error_path if run_dir.error_path.exists() and not killed else log
    return f"{reason or 'failed'}" + (f" ({detail})" if detail.exists() else "")


def _state(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


# plan -------------------------------------------------------------------------------------------
def describe_action(state: RunState | None, *, after: int = 0) -> str:
    """What the command will do with a planned run; `after`: step of its newest checkpoint."""
    if state is None or (state.state is State.PLANNED and not after):
        return "new"
    if state.state.done:
        return "done" if state.state is State.FINISHED else f"done ({state.state})"
    if not budget.to_run(state):
        return "in flight" if state.state is State.RUNNING else state.state
    return f"{state.state} -> " + (f"resumes after step {after}" if after else "runs again")


def disk_bytes(config: RunConfig) -> int:
    """Of the checkpoints that a run keeps at most."""
    return costs.checkpoint_bytes(config) * config.checkpoint.keep_last


def plan_table(
    plan: Plan,
    *,
    states: Mapping[str, RunState],
    estimates: Mapping[str, Estimate | None] | None = None,
    unit: str = "GPU",
    output_dir: Path | str | None = None,
    most: int | None = None,
) -> Table:
    """A row for each run: its size, its cost and what the command will do with it.

    `estimates` are those of the runs that the command would queue (`budget.estimates`); without
    them there is no column of hours. `output_dir` is where the runs are now, if they were moved.
    At most `most` rows.
    """
    title = f"sweep {plan.name}: {len(plan.cells)} runs"
    cells = plan.cells if most is None else plan.cells[:most]
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("run", overflow="fold")
    hours = [] if estimates is None else [f"{unit}-hours"]
    for name in ("parameters", "trainable", "steps", "tokens", *hours, "disk"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("state")
    for cell in cells:
        sizes, state = costs.parameters(cell.config), states.get(cell.run_id)
        run_dir = run_at(output_dir or cell.config.output_dir, cell.run_id)
        after = run_dir.newest_step() if budget.to_run(state) else 0
        table.add_row(
            Text(cell.name),
            abbreviate(sizes.total),
            abbreviate(sizes.trainable),
            str(cell.config.train.steps),
            abbreviate(tokens(cell.config)),
            *([] if estimates is None else [_hours(cell, estimates)]),
            f"{abbreviate(disk_bytes(cell.config))}B",
            describe_action(state, after=after),
        )
    return table


def _hours(cell: Cell, estimates: Mapping[str, Estimate | None]) -> str:
    """`-` for a run that needs no more, `?` if nothing was measured."""
    if cell.run_id not in estimates:
        return "-"
    estimate = estimates[cell.run_id]
    return "?" if estimate is None else budget.interval(estimate)


def totals_line(
    plan: Plan,
    *,
    states: Mapping[str, RunState],
    estimates: Mapping[str, Estimate | None] | None = None,
    unit: str = "GPU",
    max_hours: float | None = None,
) -> str:
    """`to run: 4 of 6 runs, 1.2M tokens, 2.1 (1.5-2.8) GPU-hours by ..., 90MB of checkpoints`."""
    cells = [cell for cell in plan.cells if budget.to_run(states.get(cell.run_id))]
    parts = [f"to run: {len(cells)} of {len(plan.cells)} runs"]
    if cells:
        parts.append(f"{abbreviate(sum(tokens(cell.config) for cell in cells))} tokens")
        if estimates is not None:
            hours = _total_hours([estimates.get(cell.run_id) for cell in cells], unit=unit)
            parts.append(hours or f"{unit}-hours unknown ({_unmeasured(cells)})")
        parts.append(
            f"{abbreviate(sum(disk_bytes(cell.config) for cell in cells))}B of checkpoints"
        )
    if max_hours is not None:
        parts.append(f"budget {max_hours:g} {unit}-hours")
    return ", ".join(parts)


def _total_hours(estimates: Sequence[Estimate | None], *, unit: str) -> str:
    """Empty if nothing was measured."""
    hours, unknown = budget.total(estimates), estimates.count(None)
    if hours is None:
        return ""
    more = f" and {unknown} runs not known" if unknown else ""
    return f"{budget.interval(hours)} {unit}-hours by {hours.basis}{more}"


def _unmeasured(cells: Sequence[Cell]) -> str:
    """The cost before any run has finished on such a device: FLOPs, and hours of an A100."""
    flops = sum(budget.training_flops(cell.config) for cell in cells)
    text = f"no finished run on such a device; {flops:.2g} training FLOPs"
    hours = flops / (A100.bf16 * A100_SHARE) / 3600
    if hours < 1:
        return text
    return f"{text}: {hours:,.0f} hours of an A100 at {A100_SHARE:.0%} of its peak"


def show_plan(
    plan: Plan,
    *,
    states: Mapping[str, RunState],
    console: Console,
    estimates: Mapping[str, Estimate | None] | None = None,
    unit: str = "GPU",
    max_hours: float | None = None,
    output_dir: Path | str | None = None,
    stored: bool = True,
) -> None:
    """Print the plan, its totals and why there are fewer runs than points.

    Of more than 40 runs a terminal shows 20. So does a file if the plan is stored: a command shows
    all of it.
    """
    most = 20 if len(plan.cells) > 40 and (stored or console.is_terminal) else None
    common = {"states": states, "estimates": estimates, "unit": unit}
    console.print(plan_table(plan, **common, output_dir=output_dir, most=most))
    if most:
        shows_all = command("plan", plan.name, output_dir=output_dir or "outputs")
        hint = shows_all if stored else "`| less` after the command shows all"
        say(console, f"... and {len(plan.cells) - most} more runs ({hint})")
    for line in [totals_line(plan, **common, max_hours=max_hours), *plan.collapsed]:
        console.print(line, markup=False, highlight=False)


def say(console: Console, text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_notes(notes: Sequence[str], *, console: Console) -> None:
    for note in notes:
        say(console, f"note: {note}")


class LiveView:
    """What a terminal shows live and removes at the end; elsewhere there are plain lines, fewer."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(Text(""), refresh=True)
            self.live.stop()

    def is_due(self) -> bool:
        """Whether the last time is long enough ago; then the next wait begins."""
        now = time.monotonic()
        if now - self._shown < (REFRESH_S if self.live else PLAIN_EVERY_S):
            return False
        self._shown = now
        return True


class Counter(LiveView):
    """How far a long task is with many runs."""

    def __init__(self, doing: str, *, console: Console) -> None:
        super().__init__(console)
        self.doing = doing
        self._of: str | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._of:
            self._of, self._began, self._first = what, time.monotonic(), done
        if not self.is_due():
            return
        seconds = time.monotonic() - self._began
        line = f"{self.doing} {what}: {done} of {total} runs, {clock(seconds)}"
        if left := total - done:
            line += f", about {clock(seconds * left / max(done - self._first, 1))} left"
        if self.live:
            self.live.update(Text(line), refresh=True)
        else:
            say(self.console, line)


# closing ----------------------------------------------------------------------------------------
def closing_table(cells: Sequence[Cell], *, states: Mapping[str, str], output_dir: Path) -> Table:
    """A row for each run: how it ended and its final metrics; `states` by run_id."""
    table = Table(box=None, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    runs = [run_at(output_dir, cell.run_id) for cell in cells]
    results = [run_dir.result() or {} for run_dir in runs]
    on_gpus = any(MFU in result.get("metrics", {}) for result in results)
    shares = SHARES if on_gpus else {}
    for name in ("steps", *columns(), "tokens/s", *shares, "time"):
        table.add_column(name, justify="right")
    for cell, run_dir, result in zip(cells, runs, results, strict=True):
        status = run_dir.status()
        rate = result.get("metrics", {}).get("perf/tokens_per_s", status.tokens_per_s)
        table.add_row(
            Text(cell.name),
            _state(states[cell.run_id]),
            f"{status.step}/{cell.config.train.steps}",
            *_metric_cells(result, status),
            "-" if rate is None else abbreviate(rate),
            *(percent(result.get("metrics", {}).get(key)) for key in shares.values()),
            clock(result.get("attempt_seconds")),
        )
    return table


def _metric_cells(result: Mapping[str, Any], status: Status) -> list[str]:
    metrics = dict(result.get("metrics", {}))
    if status.loss is not None:
        metrics.setdefault(LOSS.key, status.loss)
    return [f"{metrics[key]:.4g}" if key in metrics else "-" for key in columns().values()]


def show_closing(
    plan: Plan, *, states: Mapping[str, RunState], output_dir: Path, console: Console
) -> None:
    """Print the closing table, the errors, and where things are."""
    ends = {id_: state.state for id_, state in states.items()}
    console.print(closing_table(plan.cells, states=ends, output_dir=output_dir))
    line = partial(say, console)
    for cell in plan.cells:
        state = states[cell.run_id]
        if state.state in (State.FAILED, State.DIVERGED):
            run_dir = run_at(output_dir, cell.run_id)
            why = error_line(run_dir, attempts=state.attempts, reason=state.reason)
            what = why if state.state is State.FAILED else run_dir.path
            line(f"{state.state} {cell.name}: {what}")
    counts = [f"{count} {state}" for state, count in collections.Counter(ends.values()).items()]
    line(f"{', '.join(counts)}; runs in {runs_folder(output_dir)}, plan in sweeps/{plan.name}")

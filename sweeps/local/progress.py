"""What a local sweep shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.disk.output_dir import run_at
from experiments.disk.run_dir import Status
from experiments.run.sinks import clock
from sweeps.display import LiveView, abbreviate, say
from sweeps.planning.plan import Cell


class Progress(LiveView):
    """Shows the runs that are at work."""

    def __init__(self, cells: Sequence[Cell], *, output_dir: Path, console: Console) -> None:
        super().__init__(console)
        self.cells, self.output_dir = cells, output_dir
        self._began = time.monotonic()

    def started(self, cell: Cell, *, attempt: int) -> None:
        self.say(f"start    {cell.name}" + (f" (attempt {attempt})" if attempt > 1 else ""))

    def ended(self, cell: Cell, *, state: str, reason: str | None) -> None:
        self.say(f"{state:<8} {cell.name}" + (f": {reason}" if reason else ""))

    def tick(self, active: Sequence[Cell], *, counts: Mapping[str, int]) -> None:
        """Show them, unless the last time was a moment ago."""
        if not self.is_due():
            return
        statuses = [(cell, run_at(self.output_dir, cell.run_id).status()) for cell in active]
        if self.live:
            self.live.update(self._table(statuses, counts), refresh=True)
            return
        for cell, status in statuses:
            self.say(progress_line(cell.name, status))
        self.say(self._total(counts))

    def say(self, text: str) -> None:
        say(self.console, text)

    def _total(self, counts: Mapping[str, int]) -> str:
        states = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        return f"{states} of {len(self.cells)} runs, {clock(time.monotonic() - self._began)}"

    def _table(self, statuses: list[tuple[Cell, Status]], counts: Mapping[str, int]) -> Table:
        table = Table(box=None, caption=self._total(counts), caption_justify="left")
        table.add_column("run", overflow="ellipsis", no_wrap=True, ratio=3)
        table.add_column("", width=16)
        for name in ("step", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for cell, status in statuses:
            table.add_row(
                Text(cell.name),
                ProgressBar(total=max(status.steps, 1), completed=status.step, width=16),
                f"{status.step}/{status.steps}",
                "-" if status.loss is None else f"{status.loss:.3f}",
                "-" if status.tokens_per_s is None else abbreviate(status.tokens_per_s),
                status.phase if status.phase not in ("", "train") else clock(status.eta_s),
            )
        return table


def progress_line(name: str, status: Status) -> str:
    """`model=tiny  step 40/100  loss 5.123  12.3k tokens/s  0:31 left`."""
    parts = [name, f"step {status.step}/{status.steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.tokens_per_s is not None:
        parts.append(f"{abbreviate(status.tokens_per_s)} tokens/s")
    if status.phase not in ("", "train"):
        parts.append(status.phase)
    elif status.eta_s is not None:
        parts.append(f"{clock(status.eta_s)} left")
    return "  ".join(parts)

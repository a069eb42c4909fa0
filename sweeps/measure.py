"""`run.py --plan --measure`: times some steps of each shape whose speed nobody has measured."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from experiments.disk import frozen
from experiments.disk.output_dir import check_output_dir, refuse_unwritable
from experiments.disk.state import RunState
from experiments.identity import config_to_json
from experiments.run.timing import Result
from relora_core import atomic, costs, shared
from relora_core.sources import code_hash
from sweeps import display
from sweeps.launchers import Launcher
from sweeps.outlook import prepare_data
from sweeps.planning import budget, rates
from sweeps.planning.plan import Cell, Plan
from sweeps.planning.rates import Rate
from sweeps.timing import Timings


def measure(
    plan: Plan,
    *,
    states: Mapping[str, RunState],
    launcher: Launcher,
    output_dir: Path,
    console: Console,
) -> None:
    """Time, where the runs to come would run, one of each shape without a rate on such a device.

    Rates are stored below `output_dir`, as `rates.read_rates` reads them; no run is recorded. A
    shape that cannot be timed is named and left out. Raises KeyboardInterrupt after Ctrl-C, with
    nothing left at work.
    """
    launcher.check(plan, estimates={})
    todo = [cell for cell in plan.cells if budget.to_run(states.get(cell.run_id))]
    cells = unmeasured(todo, launcher=launcher, known=rates.read_rates(output_dir))
    if not cells:
        display.say(console, "nothing to time: the speed of every shape has been measured")
        return
    check_output_dir(output_dir)
    prepare_data(dataclasses.replace(plan, cells=cells), output_dir, console=console)
    folder = (rates.timed_folder(output_dir) / uuid.uuid4().hex[:8]).absolute()

    def report(index: int, result: Result) -> None:
        display.say(console, _report(cells[index], result, launcher=launcher, out=output_dir))

    try:
        with refuse_unwritable(output_dir):
            shared.make_folder(folder)
            files = [folder / f"{index}.json" for index in range(len(cells))]
            configs = [frozen.absolute(cell.config) for cell in cells]
            for file, config in zip(files, configs, strict=True):
                atomic.write_text(file, config_to_json(config))
            work = Timings(
                folder=folder,
                names=[cell.name for cell in cells],
                configs=configs,
                files=files,
                runs=len(todo),
                report=report,
                reported=set(),
            )
            launcher.time(work, name=plan.name, output_dir=output_dir, console=console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it has rates
            folder.parent.rmdir()


def unmeasured(cells: Sequence[Cell], *, launcher: Launcher, known: Sequence[Rate]) -> list[Cell]:
    """The first cell of each shape that has no rate of its own where it would run."""
    first: dict[str, Cell] = {}
    for cell in cells:
        place = launcher.place(cell.config)
        if not budget.is_measured(cell.config, rates=known, place=place):
            where = (place.kinds, place.partition, place.gpus > 0)
            key = repr((rates.shape(cell.config, processes=place.processes), where))
            first.setdefault(key, cell)
    return list(first.values())


def _report(cell: Cell, result: Result, *, launcher: Launcher, out: Path) -> str:
    """Store the rate; a line on it."""
    if result.error is not None:
        return f"cannot time {cell.name}: {result.error}"
    config, place = cell.config, launcher.place(cell.config)
    flops = costs.flops_per_token(config)
    per_s = result.tokens / result.seconds
    rate = Rate(
        run_id="",
        label=config.model.name,
        device=result.device,
        partition=place.partition,
        shape=rates.shape(config, processes=result.world),
        forward_flops=flops.forward,
        flops_per_s=flops.train * per_s / result.world,
        overhead_s=None,
        timed_steps=result.steps,
    )
    rates.store_timed(rate, output_dir=out, code=code_hash())
    return (
        f"timed {cell.name}: {display.abbreviate(per_s)} tokens/s on {result.device} "
        f"({result.steps} steps)"
    )

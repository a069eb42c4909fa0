"""How long a run takes to its first training step: `python benchmarks/startup.py`.

Starts workers as the local launcher does, in turns cold (a process that imports torch) and warm (a
fork of a process that has done so), and reads times in the runs' records. Evals are off.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from experiments import schema
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.environment import cores, cpu, packages
from experiments.identity import run_id
from experiments.run.complete import complete
from sweeps.local import warm
from sweeps.local.launcher import WORKERS
from sweeps.local.slots import Slots

PHASES = {
    "imports": "process start, Python, torch",
    "setup": "accelerate, model, data, optimizer",
    "step": "first step: what torch imports and makes then",
}
SETTINGS = (
    *("eval=none", "tracking=none", "train.steps=2"),
    *("schedule.warmup_steps=1", "runtime.log_every_steps=1"),
)
"""Of each run; the demo's otherwise."""
LIMIT_S = 5.0


def prepared(model: str, *, folder: Path, number: int) -> RunDir:
    """A run that has not begun."""
    words = [f"model={model}", f"seed={number}", f"output_dir={folder}", *SETTINGS]
    config = complete(schema.compose(words))
    run = RunDir(runs_folder(folder) / run_id(config))
    run.create(config)
    return run


def cold(run: RunDir, *, slots: Slots) -> int:
    with open(run.log_path(1), "ab") as log:
        return subprocess.Popen(
            [*WORKERS.command, str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=slots.environment(0),
            start_new_session=True,
        ).wait()


def measure(run: RunDir, *, start: Callable[[RunDir], int]) -> dict[str, float]:
    """Seconds of each phase, and of the process."""
    began = time.time()
    code = start(run)
    ended = time.time()
    if code:
        raise RuntimeError(f"exit code {code}:\n{run.log_path(1).read_text()[-2000:]}")
    times = {(e["kind"], e["step"]): e["time"] for e in run.events()}
    imported, ready = run.attempt_records()[0]["started"], times["start", 0]
    first = times["train", 1]
    return {
        "imports": imported - began,
        "setup": ready - imported,
        "step": first - ready,
        "to_first_step": first - began,
        "whole": ended - began,
    }


def compare(models: Sequence[str], *, rounds: int) -> list[dict[str, Any]]:
    """Medians of `rounds` runs of each model, cold and warm in turns."""
    folder = Path(tempfile.mkdtemp(prefix="startup-"))
    slots = Slots.of(1, runs=1, devices=["cpu"])
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    number = 0
    try:
        began = time.time()
        with warm.open_parent(warm.COMMAND, environment=slots.shared()) as parent:
            while parent.importing:
                time.sleep(0.01)
            parent_s = time.time() - began
            ways = {
                "cold": lambda run: cold(run, slots=slots),
                "warm": lambda run: parent.fork(
                    run.path, log=run.log_path(1), environment=slots.environment(0)
                ).wait(),
            }
            for _ in range(rounds):
                for model in models:
                    for way, start in ways.items():
                        run, number = prepared(model, folder=folder, number=number), number + 1
                        measured.setdefault((model, way), []).append(measure(run, start=start))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"the warm parent took {parent_s:.2f} s, once for a sweep", file=sys.stderr)
    return [
        {"model": model, "start": way, "runs": len(runs)}
        | {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
        for (model, way), runs in measured.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("model", "start", *PHASES, "to first step", "whole process"):
        shown.add_column(head, justify="left" if head in ("model", "start") else "right")
    for row in rows:
        seconds = [row[key] for key in (*PHASES, "to_first_step", "whole")]
        shown.add_row(row["model"], row["start"], *(f"{s:.2f} s" for s in seconds))
    return shown


def main() -> int:
    phases = "\n".join(f"  {name:<8} {what}" for name, what in PHASES.items())
    parser = argparse.ArgumentParser(
        description="Time a run from the start of its job to its first training step.",
        epilog=f"phases:\n{phases}\n\nMedians; the limit is {LIMIT_S:g} s. The last line is JSON.\n"
        "  python benchmarks/startup.py --models nano --rounds 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", default="nano,tiny", help="options of model (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    args = parser.parse_args()
    rows = compare(args.models.split(","), rounds=args.rounds)
    threads = Slots.of(1, runs=1, devices=["cpu"]).threads
    machine = {"cpu": cpu(), "cores": cores(), "threads": threads}
    machine |= {"torch": packages().get("torch"), "python": platform.python_version()}
    Console(width=120).print(table(rows))
    print(json.dumps({"limit_s": LIMIT_S, "machine": machine, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

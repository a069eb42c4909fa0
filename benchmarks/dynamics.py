"""What dynamics add to training: `python benchmarks/dynamics.py`.

Trains the demo (embedded grammar, its batch and method) for a few steps with every choice of
dynamics in turn. One measurement costs what `perf/dynamics_seconds` says and what its step took
longer than the others, since gradients of effective weights are summed up there. The share is that
of the whole demo at the default cadence: the measurements of its steps, that at step 0 included,
over the time of its training steps. Not for: what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from experiments import schema
from experiments.run.complete import complete
from relora_core.config import RunConfig
from relora_core.events import Event
from relora_core.train import train


class Laps:
    """Seconds of training steps, and of what was measured."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.dynamics: list[float] = []

    def emit(self, event: Event) -> None:
        if event.kind == "train":
            self.train[event.step] = event.metrics["perf/train_seconds"]
        elif event.kind == "dynamics":
            self.dynamics.append(event.metrics["perf/dynamics_seconds"])

    def steps(self) -> dict[int, float]:
        """Step -> its own seconds; the first ones warm up and do not count."""
        return {s: t - self.train[s - 1] for s, t in self.train.items() if s > 2}


def measure(config: RunConfig, *, every: int, folder: Path) -> dict[str, float]:
    """Seconds of a plain step, and of one measurement."""
    laps = Laps()
    short = replace(config, dynamics=replace(config.dynamics, every_steps=every))
    torch.set_num_threads(config.runtime.threads or 1)
    train(short, checkpoints=folder / "checkpoints", cache_dir=folder, sink=laps)
    taken = laps.steps()
    plain = [seconds for step, seconds in taken.items() if step % every]
    tapped = [seconds for step, seconds in taken.items() if not step % every]
    step_s = statistics.median(plain)
    return {
        "step_s": step_s,
        "measurement_s": min(laps.dynamics[1:]) + max(0.0, min(tapped) - step_s),
    }


def settings(model: str, dynamics: str, *, threads: int, steps: int) -> tuple[RunConfig, int, int]:
    """A short demo, how many measurements the whole one takes, and its steps."""
    words = [f"model={model}", f"dynamics={dynamics}", "eval=none", f"runtime.threads={threads}"]
    config = complete(schema.compose(words))
    every = config.dynamics.every_steps
    assert every is not None
    whole = config.train.steps
    count = 1 + whole // every
    # Restarts as often as there are measurements, so that no difference is trivially zero.
    config = replace(
        config,
        train=replace(config.train, steps=steps),
        relora=replace(config.relora, reset_frequency=3, restart_warmup_steps=0),
        schedule=replace(config.schedule, warmup_steps=1),
        checkpoint=replace(config.checkpoint, every_steps=10**9),
        runtime=replace(config.runtime, log_every_steps=1, device="cpu"),
    )
    return config, count, whole


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,small")
    parser.add_argument("--dynamics", default="weights,paper", help="options of conf/dynamics")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each trial")
    parser.add_argument("--every", type=int, default=4, help="steps between two measurements")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; the fastest counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    cases = [(m, d) for m in args.models.split(",") for d in args.dynamics.split(",")]
    best: dict[tuple[str, str], dict[str, float]] = {}
    for _ in range(args.rounds):
        for model, dynamics in cases:
            config, _, _ = settings(model, dynamics, threads=args.threads, steps=args.steps)
            with tempfile.TemporaryDirectory(prefix="dynamics-") as folder:
                found = measure(config, every=args.every, folder=Path(folder))
            known = best.setdefault((model, dynamics), found)
            best[model, dynamics] = {name: min(known[name], found[name]) for name in found}
    rows: list[dict[str, Any]] = []
    for (model, dynamics), found in best.items():
        _, count, steps = settings(model, dynamics, threads=args.threads, steps=args.steps)
        step_s = min(f["step_s"] for (m, _), f in best.items() if m == model)
        share = count * found["measurement_s"] / (steps * step_s)
        rows.append(
            {
                "model": model,
                "dynamics": dynamics,
                "step_s": step_s,
                "measurement_s": found["measurement_s"],
                "measurements": count,
                "steps": steps,
                "percent": 100 * share,
            }
        )
    table = Table(title="dynamics at the default cadence")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    machine = {"threads": args.threads, "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"rows": rows, **machine, "cpu": cpu_model(), "date": time.strftime("%F")}))
    return 0


def cpu_model() -> str:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")


if __name__ == "__main__":
    raise SystemExit(main())

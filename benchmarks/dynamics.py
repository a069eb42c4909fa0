"""What dynamics add to training: `python benchmarks/dynamics.py`.

Trains the demo for a few steps with each choice of dynamics. A measurement costs what
`perf/dynamics_seconds` says, and by how much its step is slower than others, which do not sum up
gradients. The share is that of all measurements of the demo, at its cadence, in its training time.
Not for: what the numbers mean.
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

from benchmarks.tables import show
from experiments import schema
from experiments.environment import cpu
from experiments.run.complete import complete
from relora_core.config import RunConfig
from relora_core.events import Event
from relora_core.train import train


class Laps:
    """A sink: seconds of training steps and of measurements."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.dynamics: list[float] = []

    def emit(self, event: Event) -> None:
        if event.kind == "train":
            self.train[event.step] = event.metrics["perf/train_seconds"]
        elif event.kind == "dynamics":
            self.dynamics.append(event.metrics["perf/dynamics_seconds"])

    def steps(self) -> dict[int, float]:
        """Step -> seconds of it alone, without the first steps, which warm up."""
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
    """(a shortened demo, the demo's number of measurements, its number of steps)."""
    words = [f"model={model}", f"dynamics={dynamics}", "eval=none", f"runtime.threads={threads}"]
    config = complete(schema.compose(words))
    every = config.dynamics.every_steps
    assert every is not None
    all_steps = config.train.steps
    count = 1 + all_steps // every
    # Restarts as often as there are measurements, so that no difference is trivially zero.
    config = replace(
        config,
        train=replace(config.train, steps=steps),
        relora=replace(config.relora, reset_frequency=3, restart_warmup_steps=0),
        schedule=replace(config.schedule, warmup_steps=1),
        checkpoint=replace(config.checkpoint, every_steps=10**9),
        runtime=replace(config.runtime, log_every_steps=1, device="cpu"),
    )
    return config, count, all_steps


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
                seconds = measure(config, every=args.every, folder=Path(folder))
            least = best.setdefault((model, dynamics), seconds)
            best[model, dynamics] = {name: min(least[name], seconds[name]) for name in seconds}
    rows: list[dict[str, Any]] = []
    for (model, dynamics), seconds in best.items():
        _, count, steps = settings(model, dynamics, threads=args.threads, steps=args.steps)
        step_s = min(f["step_s"] for (m, _), f in best.items() if m == model)
        share = count * seconds["measurement_s"] / (steps * step_s)
        rows.append(
            {
                "model": model,
                "dynamics": dynamics,
                "step_s": step_s,
                "measurement_s": seconds["measurement_s"],
                "measurements": count,
                "steps": steps,
                "percent": 100 * share,
            }
        )
    show(rows, title="dynamics at the default cadence")
    machine = {"threads": args.threads, "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"rows": rows, **machine, "cpu": cpu(), "date": time.strftime("%F")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

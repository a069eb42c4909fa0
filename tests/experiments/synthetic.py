"""A sweep as its runs would have recorded it, in milliseconds, with numbers that are known."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import arm_id, run_id
from experiments.run.runner import make_result
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig
from relora_core.events import Event

T0 = 1_700_000_000.0
STEPS, EVERY = 40, 10
TOKENS = 4 * 16
"""Per step."""
SECONDS = 90.0
"""Of training per step."""
PHENOMENA = ("agreement", "binding")


def a_config(*, method: str = "relora", r: int = 4, seed: int = 0, **changes: Any) -> RunConfig:
    config = RunConfig(
        experiment="demo",
        seed=seed,
        method=method,
        model=ModelConfig(
            name="nano", d_model=24, d_ff=32, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=64
        ),
        relora=ReLoRAConfig(r=r, reset_frequency=20),
        train=TrainConfig(steps=STEPS, batch_size=4),
        data=DataConfig(seq_len=16),
    )
    return dataclasses.replace(config, **changes)


def name_of(config: RunConfig) -> str:
    words = [f"method={config.method}"]
    if config.method == "relora":
        words.append(f"relora.r={config.relora.r}")
    return " ".join([*words, f"seed={config.seed}"])


def loss_of(config: RunConfig) -> float:
    """Final loss: the arm's own, and a part that a seed has in every arm."""
    own = 3.0 if config.method == "full_rank" else 3.0 + 0.1 * config.relora.r
    return own + 0.01 * config.seed + (0.001 * config.seed**2 if config.method == "relora" else 0)


def a_sweep(output_dir: Path, configs: Sequence[RunConfig], *, name: str = "mine") -> list[RunDir]:
    """The plan of these runs; nothing has run."""
    cells = [
        {
            "run_id": run_id(config),
            "arm_id": arm_id(config),
            "name": name_of(config),
            "config": dataclasses.asdict(config),
        }
        for config in configs
    ]
    folder = output_dir / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"name": name, "cells": cells, "points": len(cells), "collapsed": []}
    plan |= {"commands": ["python run.py -m seed=0,1"], "created": T0}
    (folder / "plan.json").write_text(json.dumps(plan))
    runs = [RunDir(runs_folder(output_dir) / cell["run_id"]) for cell in cells]
    for run, config in zip(runs, configs, strict=True):
        if not run.path.exists():
            run.create(config)
    return runs


def record(
    run: RunDir,
    *,
    state: str = "finished",
    loss: Callable[[RunConfig], float] = loss_of,
    code: str = "c0de",
    world: int = 1,
    perf: dict[str, float] | None = None,
) -> None:
    """One attempt, from the first step to the last; each train event says `perf`, too."""
    config = run.config()
    run.write_attempt(1, {"host": "here", "code_hash": code, "packages": {"torch": "2"}})
    log = EventLog(run, 1)
    ends = {"loss": loss(config), "state": state}
    emit(log, config, start=0, stop=STEPS, **ends, world=world, perf=perf)
    if state in ("finished", "diverged"):
        log.emit(Event(kind="end", step=STEPS, data={"state": state}, time=T0 + 9000))
        run.write_result(make_result(run, state=state, attempt=1, seconds=1.0))
    log.close()
    run.update_status(state=state, attempts=1, step=STEPS, host="elsewhere")


def attempt(run: RunDir, number: int, **changes: Any) -> None:
    """One attempt that ends without a result; see `emit`."""
    log = EventLog(run, number)
    emit(log, run.config(), **changes)
    log.close()


def emit(
    log: EventLog,
    config: RunConfig,
    *,
    start: int,
    stop: int,
    loss: float,
    state: str = "running",
    world: int = 1,
    perf: dict[str, float] | None = None,
) -> None:
    """The events of an attempt; the loss falls to `loss` at the last step."""
    data = {"resumed": start > 0, "world": world}
    log.emit(Event(kind="start", step=start, data=data, time=T0 + 100 * start))
    for step in range(start + EVERY, stop + 1, EVERY):
        value = loss + (STEPS - step) / STEPS
        if state == "diverged" and step == STEPS:
            value = math.nan
        now = T0 + 100 * step
        metrics = {"train/loss": value, "perf/train_seconds": SECONDS * step, **(perf or {})}
        if config.method == "relora" and step % config.relora.reset_frequency == 0:
            changes = {"restart/loss_before": value, "restart/loss_after": value}
            log.emit(Event(kind="restart", step=step, metrics=changes, time=now))
        log.emit(Event(kind="train", step=step, metrics=metrics, time=now))
        evals(log, step=step, loss=value, time=now)


def evals(log: EventLog, *, step: int, loss: float, time: float) -> None:
    share = 1 - loss / 10
    rows = [
        {"uid": f"{p}_{i}", "phenomenon": p, "pairs": 100, "no_bos": share + 0.01 * i}
        | {"eos_prefix": share, "ties": 0, "field": "syntax"}
        for p in PHENOMENA
        for i in range(3)
    ]
    metrics: dict[str, float] = {"eval/paloma/perplexity": math.exp(loss)}
    for variant in ("no_bos", "eos_prefix"):
        metrics[f"eval/blimp/{variant}/accuracy"] = sum(r[variant] for r in rows) / len(rows)
        for p in PHENOMENA:
            own = [r[variant] for r in rows if r["phenomenon"] == p]
            metrics[f"eval/blimp/{variant}/{p}"] = sum(own) / len(own)
    log.emit(Event(kind="eval", step=step, metrics=metrics, time=time))
    data = {"name": "blimp_paradigms", "rows": rows}
    log.emit(Event(kind="table", step=step, data=data, time=time))


def arms(*ranks: int, seeds: Sequence[int] = (0, 1, 2)) -> list[RunConfig]:
    """Full rank and ReLoRA at each rank, all at these seeds."""
    full = [a_config(method="full_rank", seed=seed) for seed in seeds]
    return full + [a_config(r=r, seed=seed) for r in ranks for seed in seeds]

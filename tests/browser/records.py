"""A sweep's records without its training: more runs than a test has time to train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import (
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from relora_core.events import Event
from sweeps.planning.plan import Cell, make_plan, store

STEPS = 50
T0 = 1_700_000_000.0


def record_sweep(output_dir: Path, *, name: str, ranks: list[int], seeds: list[int]) -> None:
    """Plan, configs, events and results as a sweep of finished runs leaves them."""
    points = [
        ({"relora.r": str(r), "seed": str(seed)}, _config(output_dir, r=r, seed=seed))
        for r in ranks
        for seed in seeds
    ]
    plan = make_plan(points, name=name, command=f"python run.py -m sweep.name={name}")
    store(plan, output_dir=output_dir)
    for cell in plan.cells:
        _finish(RunDir(runs_folder(output_dir) / cell.run_id), cell)


def _config(output_dir: Path, *, r: int, seed: int) -> RunConfig:
    sizes = {"d_model": 64, "d_ff": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    return RunConfig(
        seed=seed,
        output_dir=str(output_dir),
        model=ModelConfig(name="nano", vocab_size=64, **sizes),
        relora=ReLoRAConfig(r=r),
        train=TrainConfig(steps=STEPS, batch_size=4),
        data=DataConfig(seq_len=16),
        tracking=TrackingConfig(enabled=True),
    )


def loss(config: RunConfig, step: int) -> float:
    """Falls with the step, is lower for larger ranks and differs by seed."""
    return 2 + 4 / (1 + step / 10) + 1 / config.relora.r + 0.1 * config.seed


def _finish(run: RunDir, cell: Cell) -> None:
    run.create(dataclasses.replace(cell.config))
    log, final = EventLog(run, 1), {}
    log.emit(Event(kind="start", step=0, data={"resumed": False, "world": 1}, time=T0))
    for step in range(0, STEPS + 1, 5):
        value = loss(cell.config, step)
        train = {"train/loss": value, "train/tokens": 64.0 * step, "perf/train_seconds": step / 10}
        evals = {"eval/paloma/perplexity": 2**value, "eval/blimp/no_bos/accuracy": 1 / value}
        log.emit(Event(kind="eval", step=step, metrics=evals, time=T0 + step))
        if step:
            log.emit(Event(kind="train", step=step, metrics=train, time=T0 + step))
        final = {**train, **evals}
    log.emit(Event(kind="end", step=STEPS, time=T0 + STEPS + 1))
    log.close()
    run.write_result({"state": "finished", "step": STEPS, "metrics": final})
    run.update_status(
        state="finished", attempts=1, step=STEPS, steps=STEPS, loss=final["train/loss"]
    )

"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from places import Place, checkpoints

from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from relora_core.config import RunConfig
from sweeps.planning.plan import make_plan, store


@pytest.fixture
def place(tmp_path: Path, nano: Callable[..., RunConfig]) -> Place:
    out, outside = tmp_path / "out", tmp_path / "outside"
    configs = [nano(seed=seed, output_dir=str(out)) for seed in (0, 1)]
    for config in configs:
        config.tracking.enabled = False
    plan = store(make_plan([({}, config) for config in configs], name="s"), output_dir=out)
    runs = [RunDir(runs_folder(out) / cell.run_id) for cell in plan.cells]
    for run, cell in zip(runs, plan.cells, strict=True):
        run.create(cell.config)
        run.update_status(state="failed", attempts=1, step=3, error="boom")
        run.log_path(1).write_text("words\n")
        checkpoints(run.checkpoints)
    victim = RunDir(outside)
    victim.create(configs[0])
    victim.update_status(state="failed", attempts=1, step=3)
    victim.log_path(1).write_text("private\n")
    checkpoints(victim.checkpoints)
    return Place(out=out, outside=outside, runs=runs)

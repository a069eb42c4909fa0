"""How fast runs were, or steps that were timed. Not for: the price of a plan (`budget.py`).

OUTPUT_DIR/.measure/rates/*.json   the rates of `run.py --plan --measure`, one of each shape,
                                   device and code; not runs, so no other command lists them
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import json_files
from experiments.disk.output_dir import all_runs
from experiments.disk.run_dir import RunDir
from experiments.disk.states import State
from relora_core import atomic, costs, shared
from relora_core.config import EVALS, RunConfig, runs_eval
from relora_core.sources import code_hash

CPU = "cpu"


@dataclass(kw_only=True, slots=True)
class Rate:
    """How fast a finished run was, or some steps that were timed."""

    run_id: str
    """Empty of timed steps."""
    label: str
    """Name of its model."""
    device: str
    """Name of the GPU, or `cpu`."""
    partition: str | None = None
    """SLURM's, if its attempts were jobs of one; of timed steps as the launcher names it."""
    shape: str
    forward_flops: int
    """Per token."""
    flops_per_s: float
    """Training FLOPs of each process in a second of training."""
    overhead_s: float | None
    """Process-seconds of each pause (start, eval, dynamics); None: unknown."""
    timed_steps: int | None = None
    """How many were timed; None: a finished run's."""


def read_rates(output_dir: Path | str) -> list[Rate]:
    """Of runs below `output_dir` that have ended and recorded what they ran on; and timed ones."""
    finished = [rate for run_dir in all_runs(output_dir) if (rate := _rate(run_dir))]
    return finished + _read_timed(Path(output_dir))


# timed steps ------------------------------------------------------------------------------------
def timed_folder(output_dir: Path | str) -> Path:
    return Path(output_dir) / ".measure"


def store_timed(rate: Rate, *, output_dir: Path | str, code: str) -> None:
    """In place of an older one of this shape, device and code."""
    folder = shared.make_folder(timed_folder(output_dir) / "rates")
    key = repr((rate.shape, rate.device, rate.partition, code))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    atomic.write_json(folder / f"{name}.json", {"code": code, **dataclasses.asdict(rate)})


def _read_timed(output_dir: Path) -> list[Rate]:
    """Those that were timed with today's code of relora_core."""
    files = sorted((timed_folder(output_dir) / "rates").glob("*.json"))
    rates = []
    code = code_hash() if files else ""
    for file in files:
        with contextlib.suppress(*json_files.READ_ERRORS):  # then it is timed again
            raw = json_files.read(file)
            if raw["code"] == code and raw["flops_per_s"] > 0 and raw["timed_steps"]:
                rates.append(Rate(**json_files.read_fields(Rate, raw)))
    return rates


# finished runs ----------------------------------------------------------------------------------


def _rate(run_dir: RunDir) -> Rate | None:
    result = run_dir.result() or {}
    if result.get("state") not in (State.FINISHED, State.DIVERGED):
        return None
    try:
        config, records = run_dir.config(), run_dir.attempt_records()
        places = {(_device(record, config), int(record["world"])) for record in records}
        partitions = {record.get("slurm", {}).get("partition") for record in records}
        trained = result["metrics"]["train/tokens"]
        seconds = result["metrics"]["perf/train_seconds"]
    except (AttributeError, KeyError, TypeError, ValueError):  # an earlier version's, or damaged
        return None
    if len(places) != 1 or not seconds > 0:  # attempts on different machines have no one speed
        return None
    device, world = places.pop()
    flops = costs.flops_per_token(config)
    overhead = None
    if result["attempts"] == 1 and result["state"] == State.FINISHED:
        overhead = max(result["attempt_seconds"] - seconds, 0.0) * world / count_pauses(config)
    return Rate(
        run_id=run_dir.run_id,
        label=config.model.name,
        device=device,
        partition=partitions.pop() if len(partitions) == 1 else None,
        shape=shape(config, processes=world),
        forward_flops=flops.forward,
        flops_per_s=flops.train * trained / seconds / world,
        overhead_s=overhead,
    )


def _device(record: Mapping[str, Any], config: RunConfig) -> str:
    """The device of an attempt; KeyError if it is not recorded."""
    gpus = record["gpus"]
    return CPU if config.runtime.device == "cpu" or not gpus else str(gpus[0])


def shape(config: RunConfig, *, processes: int) -> str:
    """Model, method, lengths, evals and dynamics: where equal, so is the speed in FLOP/s."""
    model = dataclasses.replace(config.model, name="")
    evals = [getattr(config.eval, name) for name in EVALS]
    evals = [dataclasses.replace(section, every_steps=None, path=None) for section in evals]
    dynamics = config.dynamics if config.dynamics.every_steps else None
    kinds = dynamics and (dynamics.what, dynamics.kinds)
    micro = costs.micro_batch(config, processes=processes)
    train = (config.method, config.data.seq_len, micro, config.train.precision, processes)
    return repr((model, train, *evals, kinds))


def count_pauses(config: RunConfig, *, done: int = 0) -> int:
    """How often a run stops training after step `done`: its start, evals, measures of dynamics."""
    steps, count = config.train.steps, 1

    def times(every: int) -> int:
        return steps // every - done // every + (done == 0)

    for name in EVALS:
        if runs_eval(config, name):
            every = getattr(config.eval, name).every_steps
            count += times(every) + bool(steps % every) if every else 1
    if every := config.dynamics.every_steps:
        count += times(every)
    return count

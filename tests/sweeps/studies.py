"""Studies without training: specs, and what the runs of a trial would leave on disk."""

from __future__ import annotations

import math
import os

from experiments.disk.output_dir import study_folder
from sweeps.search import arms
from sweeps.search.config import normalise
from sweeps.search.space import Float, Int
from sweeps.search.spec import Spec
from sweeps.search.study import Study
from sweeps.search.trial import Worker
from tests.sweeps.records import end_run

LR = Float(low=1e-4, high=1e-1, log=True)
DECADES = {"name": "grid", "per_decade": 1}
"""A sampler that tries 1e-4, 1e-3, 1e-2 and 1e-1 of LR."""


def spec_of(make, *, space=None, groups=(), bases=None, **search):
    """A spec over train.lr and relora.r; keywords change the search."""
    return Spec(
        config=normalise({"objectives": "train/loss", "sampler": "random", **search}),
        space=space or {"train.lr": LR, "relora.r": Int(low=2, high=8)},
        groups=list(groups),
        bases=bases or {"": make()},
        command="python run.py",
    )


def begin_arms(output_dir, specs):
    """The folder of a search called s with these arms."""
    for arm, one in specs.items():
        Study.open(study_folder(output_dir, name="s", arm=arm), create=one)
    folder = study_folder(output_dir, name="s")
    arms.write_arms(folder, list(specs))
    return folder


def taker(job=None, pid=None):
    return Worker(host="h", pid=pid or os.getpid(), job_id=job)


def loss_of(params):
    return abs(math.log10(params["train.lr"]) + 2)


def leave_runs(trial, *, loss=None, state="finished"):
    """Make what running the trial would leave on disk."""
    loss = loss_of(trial.params) if loss is None else loss
    for seed, run in zip(trial.seeds, trial.runs, strict=True):
        run.create(trial.config(seed))
        if not run.ended():
            end_run(run, loss=loss, state=state)
    trial.write_records()


def finish(trial, **how):
    """Run and end it; its verdict."""
    leave_runs(trial, **how)
    return trial.finish()


def finish_all(study, **how):
    """Take, run and end all trials that are left; their numbers."""
    numbers = []
    while trial := study.take(taker()):
        finish(trial, **how)
        numbers.append(trial.number)
    return numbers


def contents(study):
    """All that a study knows, comparable: times to the microsecond."""
    return [as_dict(frozen) for frozen in study.optuna.get_trials(deepcopy=False)]


def as_dict(frozen):
    return {
        "number": frozen.number,
        "state": frozen.state,
        "values": frozen.values,
        "params": frozen.params,
        "distributions": frozen.distributions,
        "intermediate": frozen.intermediate_values,
        "user_attrs": frozen.user_attrs,
        "system_attrs": dict(frozen.system_attrs),
        "started": frozen.datetime_start,
        "ended": frozen.datetime_complete,
    }

"""Studies without training: specs, and what running a trial would leave on disk."""

from __future__ import annotations

import math
import os

from sweeps.search.config import normalise
from sweeps.search.space import Float, Int
from sweeps.search.spec import Spec
from sweeps.search.trial import Worker
from tests.sweeps.records import end_run

LR = Float(low=1e-4, high=1e-1, log=True)


def spec_of(make, *, space=None, groups=(), bases=None, **search):
    """A spec over train.lr and relora.r; keywords change the search."""
    return Spec(
        config=normalise({"objectives": "train/loss", "sampler": "random", **search}),
        space=space or {"train.lr": LR, "relora.r": Int(low=2, high=8)},
        groups=list(groups),
        bases=bases or {"": make()},
        command="python run.py",
    )


def taker(job=None, pid=None):
    return Worker(host="h", pid=pid or os.getpid(), job_id=job)


def loss_of(params):
    return abs(math.log10(params["train.lr"]) + 2)


def leave_runs(trial, *, loss=None, state="finished"):
    """What running the trial leaves on disk."""
    loss = loss_of(trial.params) if loss is None else loss
    for seed, run in zip(trial.seeds, trial.runs, strict=True):
        run.create(trial.config(seed))
        if not run.ended():
            end_run(run, loss=loss, state=state)
    trial.write_records()


def finish_all(study, **how):
    """One worker does all that is left; the trials' numbers."""
    numbers = []
    while trial := study.take(taker()):
        leave_runs(trial, **how)
        trial.finish()
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

"""The value of a trial: against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from relora_core import costs
from relora_core.events import Event
from sweeps.search.config import Objective, normalise
from sweeps.search.objective import config_cost, judge, value


def events(*losses, metric="x/y"):
    return [{"metrics": {metric: loss, "other": 9.0}} for loss in losses]


@pytest.mark.parametrize(
    ("direction", "reduce", "k", "expected"),
    [
        ("minimize", "last", 1, 5.0),
        ("minimize", "best", 1, 1.0),
        ("maximize", "best", 1, 7.0),
        ("minimize", "mean", 2, 6.0),
        ("minimize", "mean", 3, 13 / 3),
        ("maximize", "mean", 99, 4.0),
    ],
)
def test_a_metric_is_reduced_as_asked(direction, reduce, k, expected):
    objective = Objective(metric="x/y", direction=direction, reduce=reduce, k=k)
    logged = [*events(3.0), *events(4.0, metric="z"), *events(1.0, 7.0, 5.0)]
    assert value(objective, logged) == pytest.approx(expected)


@given(
    logged=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    direction=st.sampled_from(["minimize", "maximize"]),
)
def test_the_best_is_never_worse_than_the_last_or_a_mean(logged, direction):
    def of(reduce, k=1):
        objective = Objective(metric="x/y", direction=direction, reduce=reduce, k=k)
        reduced = value(objective, events(*logged))
        assert reduced is not None
        return reduced if direction == "minimize" else -reduced

    assert of("best") <= of("last")
    assert of("best") <= of("mean", 3) + 1e-6
    assert of("mean", 1) == of("last")


def test_nan_is_the_worst_and_what_was_never_logged_is_nothing():
    objective = Objective(metric="x/y", direction="maximize")
    assert value(objective, events(1.0, math.nan)) == -math.inf
    assert value(objective, events(1.0, metric="z")) is None


@pytest.fixture
def ran(make, tmp_path):
    """A run that has ended in this way."""

    def build(*, seed=0, losses=(2.0, 1.0), state="finished", seconds=7200.0, **changes):
        config = make(seed=seed, **changes)
        run = RunDir(runs_folder(tmp_path / "out") / run_id(config))
        run.create(config)
        log = EventLog(run, 1)
        for step, loss in enumerate(losses):
            log.emit(Event(kind="train", step=step, metrics={"train/loss": loss}))
        log.close()
        run.write_attempt(1, {"world": 3})
        if state in ("finished", "diverged"):
            run.write_result({"state": state, "metrics": {"perf/train_seconds": seconds}})
        run.update_status(state=state, error=None if state != "failed" else "boom")
        return run

    return build


def test_seeds_are_averaged_and_kept_one_by_one(ran):
    search = normalise({"objectives": "train/loss"})
    verdict = judge(search, [ran(seed=0), ran(seed=1, losses=[4.0])])
    assert verdict.values == [2.5]
    assert verdict.by_seed == {"0": [1.0], "1": [4.0]}
    assert verdict.reason is None


def test_several_objectives_keep_their_order_and_costs_are_computed(ran):
    search = normalise(
        {"objectives": ["cost/gpu_hours", "train/loss max best", "cost/trainable", "cost/flops"]}
    )
    runs = [ran(seed=0, seconds=3600), ran(seed=1, seconds=7200)]
    config = runs[0].config()
    hours, best, trainable, flops = judge(search, runs).values
    assert hours == pytest.approx((1 * 3 + 2 * 3) / 2)
    assert best == 2.0
    assert trainable == costs.parameters(config).trainable
    assert flops == costs.flops_per_token(config).train * 4 * 2 * 8


def test_a_seed_that_diverged_makes_the_trial_the_worst_but_not_its_cost(ran):
    for direction, worst in (("min", math.inf), ("max", -math.inf)):
        search = normalise({"objectives": [f"train/loss {direction}", "cost/parameters"]})
        verdict = judge(search, [ran(seed=0), ran(seed=1, state="diverged")])
        assert verdict.values[0] == worst
        assert math.isfinite(verdict.values[1])


@pytest.mark.parametrize("state", ["failed", "running", "cancelled"])
def test_a_seed_without_a_result_leaves_no_value_and_says_why(ran, state):
    run = ran(seed=1, state=state)
    verdict = judge(normalise({"objectives": "train/loss"}), [ran(seed=0), run])
    assert verdict.values is None
    assert run.run_id in verdict.reason
    assert state in verdict.reason
    assert ("boom" in verdict.reason) == (state == "failed")


def test_a_metric_that_was_never_logged_is_named_with_the_nearest(ran):
    verdict = judge(normalise({"objectives": "train/los"}), [ran()])
    assert verdict.values is None
    assert "train/los was never logged" in verdict.reason
    assert "Did you mean 'train/loss'" in verdict.reason


def test_constraints_tell_by_how_much_they_are_broken(ran):
    search = normalise(
        {
            "objectives": "train/loss",
            "constraints": ["train/loss >= 3", "cost/gpu_hours <= 5", "train/loss <= 3"],
        }
    )
    verdict = judge(search, [ran(losses=[1.0]), ran(seed=1, losses=[2.0])])
    assert list(verdict.constraints.values()) == pytest.approx([1.5, 1.0, -1.5])
    diverged = judge(search, [ran(), ran(seed=2, state="diverged")])
    assert diverged.constraints["train/loss <= 3"] == math.inf
    assert diverged.constraints["train/loss >= 3"] == math.inf


def test_costs_of_the_config_follow_the_rank(make):
    small, large = (config_cost("cost/trainable", make(r=r)) for r in (2, 8))
    assert small < large
    assert config_cost("cost/parameters", make(r=8)) > large

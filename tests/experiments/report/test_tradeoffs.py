"""What arms reach for what they take: the front is what no arm beats, and where it is shown."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments.metrics import LOSS
from experiments.report import page, tradeoffs
from experiments.report.data import Arm, Cost, RunData, Sweep
from experiments.report.figures import catalogue
from experiments.report.figures.fronts import fronts
from experiments.report.tradeoffs import COSTS, Point
from experiments.stats import Interval
from relora_core import costs
from relora_core.config import GaLoreConfig, ReLoRAConfig, RunConfig
from relora_core.evals.blimp import ACCURACY
from tests.experiments.synthetic import a_config, a_sweep, arms, record

BY_KEY = {cost.key: cost for cost in COSTS}


def arm(name: str, config: RunConfig, losses: dict[int, float], *, hours: float = 1.0) -> Arm:
    runs = [
        RunData(
            run_id=f"{name}-{seed}",
            arm_id=name,
            name=name,
            seed=seed,
            state="finished",
            config=dataclasses.replace(config, seed=seed),
            metrics={LOSS.key: loss},
            cost=Cost(gpu_hours=hours + seed / 10, tokens=640),
        )
        for seed, loss in losses.items()
    ]
    return Arm(arm_id=name, name=name, colour="#000000", runs=runs)


def point(cost: float, value: float) -> Point:
    means = [Interval(mean=mean, low=None, high=None, n=1, sd=None) for mean in (cost, value)]
    return Point(arm=Arm(arm_id="", name="", colour=""), cost=means[0], value=means[1])


# the front --------------------------------------------------------------------------------------
pairs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@given(pairs, st.sampled_from([LOSS, ACCURACY]))
def test_the_front_is_beaten_by_none_and_beats_all_others(pairs, metric):
    made = [point(*pair) for pair in pairs]
    front = tradeoffs.front(made, metric=metric)
    sign = 1 if metric is LOSS else -1
    for one in made:
        rivals = [
            other
            for other in made
            if other.cost.mean <= one.cost.mean
            and sign * other.value.mean <= sign * one.value.mean
            and (other.cost.mean, other.value.mean) != (one.cost.mean, one.value.mean)
        ]
        assert any(one is best for best in front) == (not rivals)
    assert [one.cost.mean for one in front] == sorted(one.cost.mean for one in front)
    values = [sign * one.value.mean for one in front]
    assert values == sorted(values, reverse=True)  # what costs more on the front is better


# where it is shown ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"r": 8}, False),
        ({"method": "full_rank"}, True),
        ({"model": {"d_ff": 64}}, True),
        ({"model": {"name": "another"}}, False),
        ({"train": {"optimizer": "muon"}}, True),
        ({"train": {"lr": 1.0}}, False),
    ],
)
def test_only_arms_of_several_methods_or_sizes_are_set_against_what_they_take(other, shown):
    one, two = a_config(), a_config(**{k: v for k, v in other.items() if k in ("r", "method")})
    for section in ("model", "train"):
        changes = other.get(section, {})
        setattr(two, section, dataclasses.replace(getattr(two, section), **changes))
    sweep = Sweep(name="s", arms=[arm("one", one, {0: 3.0}), arm("two", two, {0: 2.9})])
    assert bool(tradeoffs.tradeoffs(sweep)) == shown
    names = catalogue.catalogue(sweep, x="tokens", published=None, pairs=[])
    assert ("fronts" in names) == shown


# what arms take ---------------------------------------------------------------------------------
def test_what_arms_take_is_counted_from_their_configs():
    full, low = a_config(method="full_rank"), a_config()
    galore = a_config(method="galore", galore=GaLoreConfig(r=2))
    warm = a_config(relora=ReLoRAConfig(r=4, reset_frequency=20, warm_start_steps=10))
    duty = a_config(
        relora=ReLoRAConfig(r=4, reset_frequency=20, full_rank_steps=5, low_rank_steps=5)
    )

    def takes(config: RunConfig, key: str) -> float | None:
        taken = BY_KEY[key].of(arm("x", config, {0: 1.0}))
        return taken and taken.mean

    assert takes(full, "trainable") == costs.parameters(full).total
    assert takes(low, "trainable") == costs.parameters(low).trainable < costs.parameters(full).total
    assert takes(galore, "trainable") == takes(full, "trainable")
    assert takes(galore, "moment_bytes") < takes(full, "moment_bytes")  # type: ignore[operator]
    assert takes(full, "moment_bytes") == 8 * costs.parameters(full).total
    for phases in (warm, duty):  # at their largest, as memory must hold them
        assert takes(phases, "trainable") == takes(full, "trainable")
        assert takes(phases, "moment_bytes") == takes(full, "moment_bytes")
    assert takes(full, "tokens") == 640


def test_the_table_has_each_arm_with_its_interval_and_its_fronts():
    sweep = Sweep(
        name="s",
        arms=[
            arm("full", a_config(method="full_rank"), {0: 2.0, 1: 2.2, 2: 2.1}, hours=1),
            arm("low", a_config(), {0: 3.0, 1: 3.1, 2: 3.3}, hours=2),
            arm("worse", a_config(r=8), {0: 4.0, 1: 4.1, 2: 4.3}, hours=3),
            arm("none", a_config(method="lora"), {}),
        ],
    )
    sweep.arms[3].runs = [dataclasses.replace(sweep.arms[0].runs[0], state="running", metrics={})]
    [table] = tradeoffs.tradeoffs(sweep)
    assert table.data is not None  # type: ignore[union-attr]
    rows = {row["arm"]: row for row in table.data}  # type: ignore[union-attr]
    assert set(rows) == {"full", "low", "worse"}
    assert rows["full"]["fronts"] == "trainable moment_bytes gpu_hours"
    assert rows["low"]["fronts"] == "trainable moment_bytes"
    assert rows["worse"]["fronts"] == ""
    values = [3.0, 3.1, 3.3]
    ends = scipy_stats.t.interval(0.95, 2, sum(values) / 3, scipy_stats.sem(values))
    assert (rows["low"]["low"], rows["low"]["high"]) == pytest.approx(ends)
    assert "All arms take the same: training tokens." in table.note  # type: ignore[union-attr]


def test_an_arm_whose_losses_must_not_be_compared_beats_none():
    """It is of another vocabulary, cheaper and lower in loss."""
    other = a_config()
    other.model.vocab_size = 32
    sweep = Sweep(
        name="s",
        arms=[
            arm("full", a_config(method="full_rank"), {0: 3.0}, hours=2),
            arm("low", a_config(), {0: 3.1}, hours=2),
            arm("other", other, {0: 1.0}, hours=1),
        ],
    )
    [table] = tradeoffs.tradeoffs(sweep)
    rows = {row["arm"]: row["fronts"] for row in table.data}  # type: ignore[union-attr]
    assert rows["full"] == "trainable moment_bytes gpu_hours"
    assert rows["low"] == "trainable moment_bytes"
    assert rows["other"] == ""
    assert "their losses must not be compared" in table.note  # type: ignore[union-attr]
    drawing = fronts(sweep)
    named = {text.get_text() for ax in drawing.canvas.axes for text in ax.texts}
    assert named == {"full", "low"}
    assert "their losses must not be compared" in drawing.caption


def test_the_figure_names_the_arms_on_each_front():
    sweep = Sweep(
        name="s",
        arms=[
            arm("full", a_config(method="full_rank"), {0: 2.0, 1: 2.2}, hours=1),
            arm("low", a_config(), {0: 3.0, 1: 3.1}, hours=2),
        ],
    )
    drawing = fronts(sweep)
    shown = {ax.get_xlabel(): {text.get_text() for text in ax.texts} for ax in drawing.canvas.axes}
    assert shown == {
        "trained parameters": {"full", "low"},
        "optimizer state (bytes)": {"full", "low"},
        "device-hours of training": {"full"},
    }


def test_a_diverged_arm_and_a_lost_seed_leave_the_others(tmp_path: Path):
    sweep = Sweep(
        name="s",
        arms=[
            arm("full", a_config(method="full_rank"), {0: 2.0, 1: 2.2}),
            arm("low", a_config(), {0: 3.0, 1: 3.1}),
            arm("odd", a_config(method="lora"), {0: math.nan}),
        ],
    )
    [table] = tradeoffs.tradeoffs(sweep)
    assert [row[0] for row in table.rows] == ["full", "low", "odd"]  # type: ignore[union-attr]
    assert fronts(sweep).canvas.axes


def test_the_report_has_the_table_and_its_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "draw", lambda *_: [])
    for run in a_sweep(tmp_path, arms(2, 4)):
        record(run)
    report = page.write(tmp_path, "mine")
    assert "What arms reach for what they take" in report.read_text()
    with open(report.parent / "tables" / "tradeoffs.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} >= {LOSS.key, ACCURACY.key}
    assert len({row["arm"] for row in rows}) == 3
    for row in rows:
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])

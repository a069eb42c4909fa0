"""What a plan costs: judged by runs whose speed is known, since the tests made them up."""

import dataclasses
import io
import math
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.disk.state import RunState
from experiments.identity import run_id
from experiments.run.complete import complete
from experiments.run.runner import run_experiment
from relora_core import costs
from relora_core.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PalomaConfig,
    RunConfig,
    TrainConfig,
)
from sweeps import display
from sweeps.local.launcher import LocalLauncher
from sweeps.planning import budget, rates
from sweeps.planning.budget import Estimate, Place, check_budget, estimate, estimates
from sweeps.planning.plan import make_plan
from sweeps.planning.rates import Rate, count_pauses, read_rates, shape
from sweeps.search.launch import Part, SearchOutlook
from tests.sweeps.conftest import planned

GPU = "NVIDIA A100"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def finish(out):
    """Leave a finished run behind that trained at `speed` FLOP/s and lost `beside` seconds."""

    def leave(
        config,
        *,
        speed=1e6,
        beside=0.0,
        gpus=(),
        world=1,
        attempts=1,
        state="finished",
        partition=None,
    ):
        tokens = config.train.steps * config.train.batch_size * config.data.seq_len
        seconds = costs.flops_per_token(config).train * tokens / speed
        run_dir = RunDir(runs_folder(out) / run_id(config))
        run_dir.create(config)
        for attempt in range(1, attempts + 1):
            where = {"slurm": {"partition": partition} if partition else {}}
            run_dir.write_attempt(attempt, {"gpus": list(gpus), "world": world, **where})
        metrics = {"train/tokens": float(tokens), "perf/train_seconds": seconds}
        took = {"attempts": attempts, "attempt_seconds": seconds + beside}
        run_dir.write_result({"state": state, "metrics": metrics, **took})
        return seconds + beside

    return leave


def run_state(cell, state, **changes):
    return RunState(run_id=cell.run_id, state=state, **changes)


def expected(hours):
    """Estimates of these hours."""
    return [one and Estimate(hours=one, low=one / 2, high=one * 2, basis="tests") for one in hours]


def nano(**changes):
    """A config outside any folder, for rates that no run has left."""
    model = ModelConfig(name="nano", d_model=24, d_ff=48, vocab_size=64)
    train = TrainConfig(**{"steps": 4, "batch_size": 2, **changes})
    return RunConfig(method="full_rank", model=model, train=train, data=DataConfig(seq_len=8))


def rate_of(config=None, *, processes=1, **changes):
    config = config or nano()
    facts = {"device": "cpu", "flops_per_s": 1e6, "overhead_s": 0.0, "label": "nano"}
    forward = costs.flops_per_token(config).forward
    facts |= {"shape": shape(config, processes=processes), "forward_flops": forward}
    return Rate(**{"run_id": "x", **facts, **changes})


# rates and estimates
@pytest.mark.parametrize(("gpus", "world"), [((), 1), ((GPU, GPU), 2)])
def test_a_run_that_is_measured_is_estimated_to_take_what_it_took(make, finish, out, gpus, world):
    took = finish(make(), speed=3e5, beside=7.0, gpus=gpus, world=world)
    one = estimate(
        make(seed=1), rates=read_rates(out), place=Place(processes=world, gpus=len(gpus))
    )
    assert one.hours == pytest.approx(took * world / 3600)
    assert one.low < one.hours < one.high


@given(factor=st.integers(1, 50))
def test_steps_multiply_training_and_not_the_start(factor):
    rate = rate_of(flops_per_s=1e6, overhead_s=40.0)
    once, more = (estimate(c, rates=[rate]) for c in (nano(steps=4), nano(steps=4 * factor)))
    start = 40.0 / 3600
    assert more.hours - start == pytest.approx(factor * (once.hours - start))


@given(speeds=st.lists(st.floats(1e5, 1e7), min_size=1, max_size=30))
def test_the_interval_holds_the_middle_and_most_of_what_was_measured(speeds):
    one = estimate(nano(), rates=[rate_of(flops_per_s=s) for s in speeds])
    work = costs.flops_per_token(nano()).train * 4 * 2 * 8
    took = sorted(work / s / 3600 for s in speeds)
    assert one.hours == pytest.approx(statistics.median(took))
    assert 0 < one.low < one.hours < one.high
    inside = sum(one.low * 0.999 <= t <= one.high * 1.001 for t in took)
    assert inside >= 0.8 * len(took) - 2


def test_more_runs_of_one_speed_are_trusted_more_and_never_wholly():
    width = [
        (one := estimate(nano(), rates=[rate_of()] * n)).high / one.hours - 1 for n in (1, 4, 100)
    ]
    assert width == pytest.approx([0.3, 0.15, 0.03])


def test_another_shape_is_scaled_by_flops_with_more_doubt_and_says_so(make, finish, out):
    finish(make(), speed=1e6)
    wide = make(model=ModelConfig(name="wide", d_model=48, d_ff=96, vocab_size=64))
    same, other = (estimate(c, rates=read_rates(out)) for c in (make(seed=1), wide))
    flops = [costs.flops_per_token(c).train for c in (make(), wide)]
    assert other.hours / same.hours == pytest.approx(flops[1] / flops[0])
    assert other.high / other.hours > 2 > same.high / same.hours
    assert other.basis == "1 finished run of nano on cpu, scaled by FLOPs"
    assert same.basis == "1 finished run of nano on cpu"


def test_runs_of_the_same_shape_are_preferred_then_those_of_the_nearest_size():
    sizes = {name: nano() for name in ("near", "far")}
    sizes["near"].model.d_model, sizes["far"].model.d_model = 48, 480
    rates = [rate_of(c, flops_per_s=1e6, label=name) for name, c in sizes.items()]
    assert estimate(nano(), rates=rates).basis.endswith("of near on cpu, scaled by FLOPs")
    assert estimate(sizes["far"], rates=rates).basis.endswith("of far on cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"batch_size": 4},
        {"micro_batch_size": 1},
    ],
    ids=str,
)
def test_what_changes_the_speed_is_another_shape(change):
    assert shape(nano(**change), processes=1) != shape(nano(), processes=1)
    assert "scaled" in estimate(nano(**change), rates=[rate_of()]).basis


def test_seed_steps_rate_and_rank_are_not():
    before = shape(nano(), processes=1)
    config = dataclasses.replace(nano(steps=99, lr=1.0), seed=5, output_dir="elsewhere")
    config.relora.r, config.eval.paloma.every_steps, config.model.name = 2, 7, "other"
    assert shape(config, processes=1) == before


def test_a_gpu_says_nothing_of_a_cpu_nor_the_reverse(make, finish, out):
    finish(make(), gpus=[GPU])
    assert estimate(make(seed=1), rates=read_rates(out)) is None
    assert GPU in estimate(make(seed=1), rates=read_rates(out), place=Place(gpus=1)).basis


H100, RTX = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 9999"


def on(*kinds, **changes):
    return Place(gpus=1, kinds=kinds, **changes)


def test_the_kind_that_a_run_gets_prices_it_whatever_was_measured_on_others():
    rates = [rate_of(device=GPU, flops_per_s=1e6), rate_of(device=H100, flops_per_s=3e6)]
    slow, fast = (estimate(nano(), rates=rates, place=on(kind)) for kind in (GPU, H100))
    assert slow.hours == pytest.approx(3 * fast.hours)
    assert slow.basis == f"1 finished run of nano on {GPU}"
    alone = estimate(nano(), rates=rates[:1], place=on(GPU))
    assert (alone.low, alone.hours, alone.high) == (slow.low, slow.hours, slow.high)


def test_another_shape_on_its_kind_comes_before_its_shape_on_another_kind():
    near = nano()
    near.model.d_model = 48
    rates = [rate_of(near, device=H100, label="near"), rate_of(device=GPU)]
    basis = estimate(nano(), rates=rates, place=on("h100")).basis
    assert basis == f"1 finished run of near on {H100}, scaled by FLOPs"


@pytest.mark.parametrize(("precision", "ratio"), [("bf16", 989 / 312), ("fp32", 67 / 19.5)])
def test_a_rate_of_another_kind_is_scaled_by_peaks_with_doubt_and_named(precision, ratio):
    config = nano(precision=precision)
    rates = [rate_of(config, device=GPU), rate_of(config, device=RTX, flops_per_s=9e9)]
    own, other = (estimate(config, rates=rates, place=on(kind)) for kind in (GPU, "h100"))
    assert own.hours / other.hours == pytest.approx(ratio)
    assert other.high / other.hours == pytest.approx(2 * own.high / own.hours)
    assert other.low / other.hours == pytest.approx(own.low / own.hours / 2)
    assert other.basis == f"1 finished run of nano on {GPU}, none on h100: scaled by peaks"


def test_without_a_peak_another_kind_counts_as_equally_fast_with_more_doubt_still():
    own, other = (estimate(nano(), rates=[rate_of(device=GPU)], place=on(k)) for k in (GPU, RTX))
    assert other.hours == pytest.approx(own.hours)
    assert other.high / other.hours == pytest.approx(5 * own.high / own.hours)
    assert "a peak is not known" in other.basis


def test_a_run_that_may_get_either_kind_has_an_interval_for_both():
    rates = [rate_of(device=GPU, flops_per_s=1e6), rate_of(device=H100, flops_per_s=3e6)]
    slow, fast = (estimate(nano(), rates=rates, place=on(kind)) for kind in (GPU, H100))
    for place in (on("a100", "h100"), on(partition="gpu"), on()):
        either = estimate(nano(), rates=rates, place=place)
        assert (either.low, either.high) == (fast.low, slow.high)
        assert fast.hours < either.hours < slow.hours
        assert f"on {GPU} and 1 finished run of nano on {H100}" in either.basis


def test_a_job_of_no_named_kind_gets_what_its_partition_gave_before(make, finish, out):
    finish(make(), gpus=[GPU], partition="old", speed=1e6)
    finish(make(seed=1), gpus=[H100], partition="new", speed=3e6)
    rates = read_rates(out)
    for partition, device in (("old", GPU), ("new", H100)):
        one = estimate(make(seed=2), rates=rates, place=on(partition=partition))
        assert one.hours == estimate(make(seed=2), rates=rates, place=on(device)).hours
        assert one.basis == f"1 finished run of nano on {device}; the partition may have others"
    assert GPU in estimate(make(), rates=rates, place=on(partition="other")).basis
    assert H100 in estimate(make(), rates=rates, place=on(partition="other")).basis


def test_packed_runs_are_charged_their_share_of_the_gpu():
    rates = [rate_of(device=GPU)]
    one, half = (estimate(nano(), rates=rates, place=Place(gpus=n)).hours for n in (1, 0.5))
    assert half == pytest.approx(one / 2)


def test_a_resumed_run_costs_what_is_left():
    config, rates = nano(steps=100), [rate_of()]
    whole, rest = (estimate(config, rates=rates, done=n).hours for n in (0, 75))
    assert rest == pytest.approx(whole / 4)


def test_evals_are_charged_as_often_as_they_happen():
    config = nano(steps=10)
    config.eval = EvalConfig(paloma=PalomaConfig(enabled=True))
    assert count_pauses(config) == 2  # the start, and the eval at the end
    config.eval.paloma.every_steps = 4
    assert count_pauses(config) == 1 + 4  # at 0, 4, 8 and 10
    assert count_pauses(config, done=4) == 1 + 2
    config.eval.paloma.every_steps, config.dynamics.every_steps = 5, 5
    assert count_pauses(config) == 1 + 3 + 3  # the end is a multiple
    rates = [rate_of(config, overhead_s=3.0, flops_per_s=1e15)]
    assert estimate(config, rates=rates).hours == pytest.approx(7 * 3.0 / 3600)


def test_runs_that_do_not_say_where_they_ran_or_ran_in_two_places_measure_nothing(
    make, finish, out
):
    for seed in (0, 1, 2):
        finish(make(seed=seed), attempts=2)
    dirs = [RunDir(runs_folder(out) / run_id(make(seed=s))) for s in (0, 1)]
    dirs[0].write_attempt(1, {"host": "old"})
    dirs[1].write_attempt(2, {"gpus": [GPU], "world": 1})
    assert [rate.run_id for rate in read_rates(out)] == [run_id(make(seed=2))]


def test_without_anything_measured_the_cost_is_unknown():
    assert estimate(nano(), rates=[]) is None
    assert estimate(nano(), rates=[], place=Place(processes=4, gpus=4)) is None


@pytest.mark.slow
def test_a_real_run_is_measured_and_foretells_its_twin(nano_run, tmp_path):
    rates = read_rates(tmp_path / "out")
    assert [rate.device for rate in rates] == ["cpu"]
    one = estimate(nano_run.config(), rates=rates)
    assert one.hours == pytest.approx(nano_run.result()["attempt_seconds"] / 3600, rel=0.01)


@pytest.fixture
def nano_run(make, tmp_path):
    config = make(steps=20)
    config.model.vocab_size, config.runtime.device = None, "cpu"
    config = complete(config)
    run_dir = RunDir(runs_folder(tmp_path / "out") / run_id(config))
    run_experiment(config, run_dir)
    return run_dir


# a plan
@pytest.mark.parametrize("state", ["finished", "diverged", "running", "queued"])
def test_what_is_done_or_in_flight_costs_nothing_more(make, out, state):
    plan = planned(make, [0, 1])
    states = {plan.cells[0].run_id: run_state(plan.cells[0], state)}
    asked = estimates(plan.cells, states=states, output_dir=out, rates=[rate_of(make())])
    assert list(asked) == [plan.cells[1].run_id]


@pytest.mark.parametrize("state", ["failed", "cancelled", "lost", "planned"])
def test_a_run_is_charged_from_its_newest_checkpoint_on_whatever_it_last_said(make, out, state):
    cell = planned(make, [0], steps=100).cells[0]
    states = {cell.run_id: run_state(cell, state, step=90, steps=100)}
    arguments = {"states": states, "output_dir": out, "rates": [rate_of(cell.config)]}
    anew = estimates([cell], **arguments)[cell.run_id]
    (RunDir(runs_folder(out) / cell.run_id).checkpoints / "step-00000050").mkdir(parents=True)
    (RunDir(runs_folder(out) / cell.run_id).checkpoints / ".tmp-step-00000080-1").mkdir()
    resumed = estimates([cell], **arguments)[cell.run_id]
    assert resumed.hours == pytest.approx(anew.hours / 2)
    assert (anew.steps, resumed.steps) == (100, 50)


def test_a_search_is_charged_for_each_seed_of_trials_that_take_turns(make, spec, out):
    points = [({}, make(steps=steps)) for steps in (100, 50)]
    plan = make_plan(points)
    part = Part(
        arm=None,
        folder=out / "sweeps" / "s" / "study",
        spec=spec(seeds=2),
        points=points,
        cells=plan.cells,
        n_trials=3,
        left=3,
        notes=[],
    )
    long, short = expected([2.0, 1.0])
    costs = {cell.run_id: c for cell, c in zip(plan.cells, (long, short), strict=True)}
    outlook = SearchOutlook(
        plan=plan, output_dir=out, launcher=LocalLauncher(), costs=costs, parts=[part]
    )
    assert outlook.bill == [long, short] * 3


def test_each_run_is_charged_for_the_place_it_is_given(make, out):
    cells = planned(make, [0, 1]).cells
    found = estimates(
        cells,
        states={},
        output_dir=out,
        rates=[rate_of(cells[0].config, device=GPU)],
        place=lambda c: Place(gpus=1 + c.seed),
    )
    one, two = (found[c.run_id].hours for c in cells)
    assert two == pytest.approx(2 * one)


HOURS = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=20)


@given(hours=HOURS, limit=st.floats(0.01, 1e5))
def test_a_budget_refuses_exactly_what_is_expected_to_exceed_it(hours, limit):
    asked = expected(hours)
    assume(not any(math.isclose(sum(sorted(hours)[:n]), limit) for n in range(len(hours) + 1)))
    if sum(hours) <= limit:
        check_budget(asked, max_gpu_hours=limit)
        return
    with pytest.raises(ConfigError, match=r"^sweep\.max_gpu_hours must be >= ") as error:
        check_budget(asked, max_gpu_hours=limit)
    text = str(error.value)
    assert "\n" not in text
    check_budget(asked, max_gpu_hours=float(re.findall(r">= (\S+)", text)[0]))  # as it advises
    fit = int(re.findall(r"(\d+) of them fit", text)[0])
    check_budget(expected(sorted(hours)[:fit]), max_gpu_hours=limit)
    with pytest.raises(ConfigError):
        check_budget(expected(sorted(hours)[: fit + 1]), max_gpu_hours=limit)


def test_the_refusal_names_value_estimate_interval_and_what_fits():
    with pytest.raises(ConfigError) as error:
        check_budget(expected([4.0, 4.0, 4.0]), max_gpu_hours=9)
    assert str(error.value) == (
        "sweep.max_gpu_hours must be >= 12 for 3 runs (12 (6-24) GPU-hours by tests), got 9; "
        "2 of them fit"
    )


def test_a_budget_refuses_what_nothing_is_known_of_and_says_what_helps():
    with pytest.raises(ConfigError, match=r"got 1e\+06; finish one run on a GPU first"):
        check_budget(expected([1.0, None]), max_gpu_hours=1e6)


@pytest.mark.parametrize("asked", [[], expected([5.0, None])])
def test_no_budget_and_nothing_to_run_refuse_nothing(asked):
    check_budget(asked, max_gpu_hours=None if asked else 1.0)


def test_totals_are_the_sums_and_keep_the_sources_apart():
    parts = [
        Estimate(hours=1, low=0.5, high=2, basis="a"),
        None,
        Estimate(hours=2, low=1, high=3, basis="b"),
        Estimate(hours=2, low=1, high=3, basis="b"),
    ]
    whole = budget.total(parts)
    assert (whole.hours, whole.low, whole.high, whole.basis) == (5, 2.5, 8, "a; b")
    assert budget.total([None]) is None


# what is shown
def shown(plan, **options):
    text = io.StringIO()
    display.show_plan(plan, console=Console(file=text, width=200), **options)
    return text.getvalue()


@pytest.mark.parametrize(
    ("state", "after", "words"),
    [
        (None, 0, "new"),
        ("planned", 0, "new"),
        ("finished", 0, "done"),
        ("diverged", 0, "done (diverged)"),
        ("running", 0, "in flight"),
        ("queued", 0, "queued"),
        ("failed", 0, "failed -> runs again"),
        ("failed", 40, "failed -> resumes after step 40"),
        ("cancelled", 40, "cancelled -> resumes after step 40"),
        ("lost", 0, "lost -> runs again"),
    ],
)
def test_the_plan_says_what_will_happen_to_each_run(make, out, state, after, words):
    plan = planned(make, [0], steps=90)
    cell = plan.cells[0]
    if after:
        folder = RunDir(runs_folder(out) / cell.run_id).checkpoints / f"step-{after:08d}"
        folder.mkdir(parents=True)
    states = {cell.run_id: run_state(cell, state, step=77)} if state else {}
    row = next(line for line in shown(plan, states=states).splitlines() if "90" in line)
    assert row.rstrip().endswith(words)


def test_the_plan_shows_hours_disk_and_totals_of_all_runs_though_rows_are_cut(make, out):
    plan = planned(make, range(50))
    states = {c.run_id: run_state(c, "finished") for c in plan.cells[:10]}
    rates = [rate_of(make(), flops_per_s=1e3)]
    asked = estimates(plan.cells, states=states, output_dir=out, rates=rates)
    text = shown(plan, states=states, estimates=asked, unit="CPU", max_hours=500)
    total = budget.total(asked.values())
    assert "CPU-hours" in text
    assert f"sweep {plan.name}: 50 runs" in text
    assert f"... and 30 more runs (python -m sweeps plan {plan.name})" in text
    elsewhere = shown(plan, states=states, output_dir="a b")
    where = Path("a b").absolute()
    assert f"(python -m sweeps plan {plan.name} --output-dir '{where}')" in elsewhere
    unstored = shown(plan, states=states, stored=False)
    assert "more runs" not in unstored
    assert all(cell.name in unstored for cell in plan.cells)
    assert "to run: 40 of 50 runs, 2.56k tokens" in text
    assert f"{budget.interval(total)} CPU-hours by 1 finished run of nano on cpu" in text
    assert total.hours == pytest.approx(40 * asked[plan.cells[20].run_id].hours)
    disk = 2 * costs.checkpoint_bytes(plan.cells[0].config)
    assert f"{display.abbreviate(40 * disk)}B of checkpoints, budget 500 CPU-hours" in text


def test_what_is_not_known_is_said_to_be_unknown(make):
    plan = planned(make, [0, 1])
    nothing = dict.fromkeys(c.run_id for c in plan.cells)
    text = shown(plan, states={}, estimates=nothing)
    assert " ? " in text
    assert "GPU-hours unknown" in text
    assert "hours" not in shown(plan, states={})


def test_unmeasured_cost_is_told_by_arithmetic(make):
    """1e18 FLOPs: 1e18 / (0.1 * 312e12) s are 8.9 hours of an A100 at a tenth of its peak."""
    train = TrainConfig(steps=1, batch_size=1000)
    config = make(train=train)
    step = costs.flops_per_token(config).train * config.data.seq_len * 1000
    plan = planned(make, [0], train=TrainConfig(steps=round(1e18 / step), batch_size=1000))
    text = " ".join(shown(plan, states={}, estimates={plan.cells[0].run_id: None}).split())
    assert "1e+18 training FLOPs: 9 hours of an A100 at 10% of its peak" in text
    assert "A100" not in shown(planned(make, [0]), states={}, estimates={})


@pytest.mark.parametrize(
    ("hours", "words"),
    [
        (1234.0, "1234 (617-2468)"),
        (1.24, "1.2 (0.6-2.5)"),
        (0.0126, "0.013 (0.006-0.025)"),
        (1e-5, "< 0.001"),
    ],
)
def test_hours_have_two_digits_at_every_size(hours, words):
    one = Estimate(hours=hours, low=hours / 2, high=hours * 2, basis="")
    assert budget.interval(one) == words


# timed steps
def test_finished_runs_count_before_timed_steps_and_say_what_a_pause_takes():
    timed = rate_of(timed_steps=10, overhead_s=None, flops_per_s=5e6, run_id="")
    alone = estimate(nano(), rates=[timed])
    assert alone.basis == "10 timed steps of nano on cpu, start and evals not counted"
    assert alone.hours == pytest.approx(budget.training_flops(nano()) / 5e6 / 3600)
    both = estimate(nano(), rates=[timed, rate_of(overhead_s=0.0)])
    assert both.basis == "1 finished run of nano on cpu"
    wide = nano()
    wide.model.d_model = 48
    forward = [costs.flops_per_token(c).forward for c in (nano(), wide)]
    other = estimate(nano(), rates=[timed, rate_of(wide, overhead_s=30.0)])
    assert other.basis == "10 timed steps of nano on cpu"
    assert other.hours - alone.hours == pytest.approx(30 * forward[0] / forward[1] / 3600)


@pytest.mark.parametrize(
    ("place", "measured"),
    [
        (on(GPU), True),
        (on("a100"), True),
        (on(H100), False),
        (on("a100", "h100"), False),
        (on(partition="gpu"), True),
        (on(partition="other"), False),
        (on(partition=""), False),
        (Place(), False),
    ],
    ids=str,
)
def test_a_shape_is_measured_only_on_every_kind_that_it_may_get(place, measured):
    rates = [rate_of(device=GPU, partition="gpu")]
    assert budget.is_measured(nano(), rates=rates, place=place) is measured
    other = dataclasses.replace(nano(), method="lora")
    assert not budget.is_measured(other, rates=rates, place=place)


def test_a_timed_rate_is_read_back_until_the_code_changes(out, monkeypatch):
    rate = rate_of(timed_steps=7, overhead_s=None, partition="")
    rates.store_timed(rate, output_dir=out, code=rates.code_hash())
    rates.store_timed(dataclasses.replace(rate, device="x"), output_dir=out, code="older")
    assert read_rates(out) == [rate]
    for file in (out / ".measure" / "rates").iterdir():
        file.write_text(file.read_text()[:-9])
    assert read_rates(out) == []

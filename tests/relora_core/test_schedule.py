import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_core.config import ConfigError, validate
from relora_core.redraws import notices
from relora_core.schedule import is_full_rank, lr_factor, redraws, restart_steps

STEPS = [0, 1, 1000, 1999, 2000, 2001, 2050, 2100, 3999, 4000, 4050, 4100, 10000, 19999]
TABLE = {
    # Factors of the published scheduler by horizon (w = F = 2000, R = 100, floor 0.1).
    ("relora", 20_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.009999, 0.499966, 0.999931, 0.972889,
        0, 0.485056, 0.970111, 0, 0.1,
    ],
    ("relora", 30_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.01, 0.499986, 0.999972, 0.988729,
        0, 0.493783, 0.987566, 0, 0.354798,
    ],
    ("relora", 200_000): [
        0, 0.0005, 0.5, 0.9995, 0, 0.01, 0.5, 0.999999, 0.999774,
        0, 0.499875, 0.99975, 0, 0.981774,
    ],
    ("full_rank", 20_000): [
        0, 0.0004, 0.4, 0.7996, 0.8, 0.8004, 0.82, 0.84, 0.914343,
        0.914286, 0.911429, 0.908571, 0.571429, 0.000057,
    ],
    ("full_rank", 200_000): [
        0, 0.0004, 0.4, 0.7996, 0.8, 0.8004, 0.82, 0.84, 0.99241,
        0.992405, 0.992152, 0.991899, 0.962025, 0.911397,
    ],
}  # fmt: skip


def paper(nano, method, horizon):
    return nano(
        method=method,
        train={"steps": 20_000},
        relora={"reset_frequency": 2000, "restart_warmup_steps": 100},
        schedule={
            "name": "cosine" if method == "relora" else "linear",
            "warmup_steps": 2000 if method == "relora" else 2500,
            "min_ratio": 0.1,
            "total_steps": horizon,
        },
    )


@pytest.mark.parametrize(("method", "horizon"), TABLE)
def test_factors_are_the_published_ones(nano, method, horizon):
    config = paper(nano, method, horizon)
    got = [round(lr_factor(k, config=config), 6) for k in STEPS]
    assert got == pytest.approx(TABLE[method, horizon], abs=1e-6)


def test_nine_restarts_in_the_papers_run(nano):
    assert restart_steps(paper(nano, "relora", None)) == list(range(2000, 20_000, 2000))
    assert restart_steps(paper(nano, "full_rank", None)) == []
    assert restart_steps(paper(nano, "lora", None)) == []


@given(
    steps=st.integers(1, 400),
    frequency=st.integers(1, 100),
    warmup=st.integers(0, 100),
    rewarm=st.integers(0, 100),
    floor=st.floats(0, 1),
    name=st.sampled_from(["cosine", "linear"]),
)
def test_the_factor_is_a_share_and_vanishes_only_where_it_should(
    steps, frequency, warmup, rewarm, floor, name
):
    from tests.conftest import nano_config

    config = nano_config(
        train={"steps": steps},
        relora={"reset_frequency": frequency, "restart_warmup_steps": min(rewarm, frequency)},
        schedule={"warmup_steps": min(warmup, frequency, steps), "min_ratio": floor, "name": name},
    )
    factors = [lr_factor(k, config=config) for k in range(steps)]
    assert all(0 <= f <= 1 for f in factors)
    if config.relora.restart_warmup_steps:
        assert all(factors[k] == 0 for k in restart_steps(config))


@pytest.mark.parametrize(
    ("knobs", "redrawn", "restarts"),
    [
        ({}, [10, 20, 30], [10, 20, 30]),
        # At the end of a warm start B is 0 as drawn a moment ago.
        ({"warm_start_steps": 10}, [10, 20, 30], [20, 30]),
        ({"warm_start_steps": 9}, [10, 20, 30], [10, 20, 30]),
        # One update later, but its rate is 0; without a re-warm-up it has one.
        ({"warm_start_steps": 10, "restart_offset": 1}, [11, 21, 31], [21, 31]),
        (
            {"warm_start_steps": 10, "restart_offset": 1, "restart_warmup_steps": 0},
            [11, 21, 31],
            [11, 21, 31],
        ),
        ({"full_rank_steps": 10, "low_rank_steps": 20}, [10, 20], [20]),
        ({"full_rank_steps": 10, "low_rank_steps": 10}, [10, 30], []),
        # The phase has folded the adapters when the restart comes.
        (
            {"full_rank_steps": 10, "low_rank_steps": 11, "restart_offset": 1},
            [11, 21],
            [],
        ),
        ({"init_a": "zero"}, [10, 20, 30], [10, 20, 30]),  # as published, the first merges zero
    ],
)
def test_a_restart_that_follows_a_full_rank_phase_at_once_is_none(nano, knobs, redrawn, restarts):
    base = {"reset_frequency": 10, "restart_warmup_steps": 3}
    config = nano(relora=base | knobs, train={"steps": 40})
    assert list(redraws(config)) == redrawn
    assert restart_steps(config) == restarts
    numbers = [number for number in redraws(config).values() if number is not None]
    assert numbers == list(range(len(restarts)))


def test_the_rate_is_rewarmed_where_adapters_begin(nano):
    """As before: the updates that follow the end of a warm start at a multiple of F."""
    knobs = {"reset_frequency": 10, "restart_warmup_steps": 4, "warm_start_steps": 10}
    config = nano(relora=knobs, train={"steps": 40})
    rates = [lr_factor(k, config=config) for k in range(10, 15)]
    assert rates[0] == 0
    assert rates[2] == pytest.approx(rates[4] / 2)
    assert is_full_rank(9, config=config)


def test_a_long_warm_up_may_wait_for_a_late_first_restart(nano):
    knobs = {"reset_frequency": 4, "first_restart": 8}
    validate(nano(relora=knobs, schedule={"warmup_steps": 8}))
    with pytest.raises(ConfigError, match=r"warmup_steps must be <= relora.first_restart=8 .* 9;"):
        validate(nano(relora=knobs, schedule={"warmup_steps": 9}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"method": "full_rank"}, None),
        ({"relora": {"warm_start_steps": 6}}, None),
        ({"relora": {"init_a": "zero"}}, None),
        ({"relora": {"init_a": "zero"}, "train": {"steps": 4}}, "14 of 14 adapters learn nothing"),
        # Groups of the third turn are drawn at 12 for the first time.
        ({"relora": {"init_a": "zero", "restart_groups": 3}}, "4 of 14 adapters learn nothing"),
        ({"relora": {"init_a": "zero", "warm_start_steps": 2}}, None),
        # 10 full-rank updates of 11, and the one with adapters is the one of rate 0.
        (
            {
                "relora": {
                    "warm_start_steps": 1, "full_rank_steps": 3, "low_rank_steps": 1,
                    "restart_warmup_steps": 2,
                }
            },
            "adapters learn nothing: every update of them has learning rate 0",
        ),
        (
            {"train": {"steps": 1}, "schedule": {"warmup_steps": 1}},
            "every update of train.steps=1 has learning rate 0",
        ),
        (
            {
                "relora": {"reset_frequency": 1, "restart_warmup_steps": 1},
                "schedule": {"warmup_steps": 1},
            },
            "every update of train.steps=12 has learning rate 0",
        ),
        ({"relora": {"optimizer_state": "keep"}}, "reset_adam_step has no say"),
        ({"relora": {"optimizer_state": "keep", "reset_adam_step": False}}, None),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_said_before_it_runs(nano, changes, words):
    config = nano(**changes)
    validate(config)
    lines = [line for line in notices(config) if "never restart" not in line]
    lines = [line for line in lines if not line.startswith("no restart")]
    assert len(lines) == bool(words)
    assert not words or words in lines[0]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),  # 12 steps, restarts at 4 and 8
        (
            {"relora": {"reset_frequency": 12}},
            "no restart within train.steps=12: the first would be at step 12 "
            "(relora.reset_frequency=12), so method=relora does what method=lora does",
        ),
        ({"relora": {"first_restart": 9}}, "the first would be at step 12"),
        ({"relora": {"warm_start_steps": 11}}, "it has none to merge"),
        ({"relora": {"reset_frequency": 100}, "method": "lora"}, None),
        ({"relora": {"reset_frequency": 100}, "method": "full_rank"}, None),
        (
            {"relora": {"restart_groups": 3}},
            "relora.restart_groups=3 take turns in 2 restarts: the others never restart",
        ),
        (
            {"relora": {"rank_schedule": [[8, 2], [9, 3]]}},
            "relora.rank_schedule never comes to [9, 3]: the last restart is at step 8",
        ),
        (
            {"schedule": {"total_steps": 6, "min_ratio": 0.0}},
            "the learning rate is 0 from step 6 of train.steps=12 on: schedule.total_steps=6",
        ),
        ({"schedule": {"total_steps": 6, "min_ratio": 0.1}}, None),
        (
            {"dynamics": {"every_steps": 13}},
            "weights are measured before the first step alone: dynamics.every_steps=13 of",
        ),
    ],
)
def test_what_lies_beyond_the_end_is_said(nano, changes, line):
    config = nano(**changes)
    validate(config)
    lines = notices(config)
    assert len(lines) == bool(line)
    assert not line or line in lines[0]

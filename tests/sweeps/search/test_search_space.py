"""Spaces: what is drawn lies in them, what does not apply is absent, mistakes are one line."""

from __future__ import annotations

import json

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.identity import run_id
from relora_core.config import ConfigError, get
from sweeps.search import samplers
from sweeps.search.space import (
    Choice,
    Float,
    Int,
    base_key,
    check_dimension,
    check_space,
    from_json,
    is_active,
    ordered,
    to_json,
    with_values,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
DIMENSIONS = st.one_of(
    st.builds(
        lambda low, span, step: Int(low=low, high=low + span, step=min(step, span)),
        st.integers(1, 50), st.integers(1, 200), st.integers(1, 40),
    ),
    st.builds(lambda low, span: Int(low=low, high=low + span, log=True),
              st.integers(1, 50), st.integers(1, 200)),
    st.builds(lambda low, factor: Float(low=low, high=low * factor, log=True),
              st.floats(1e-6, 1), st.floats(1.5, 1e4)),
    st.builds(lambda low, count, step: Float(low=low, high=low + count * step, step=step),
              st.floats(-5, 5), st.floats(1.2, 20), st.floats(0.01, 2)),
    st.builds(lambda values: Choice(values=values),
              st.lists(st.integers() | st.text(max_size=3), min_size=1, unique_by=repr)),
)  # fmt: skip


@given(dimension=DIMENSIONS, seed=st.integers(0, 2**31))
def test_what_is_drawn_lies_in_the_dimension(dimension, seed):
    check_dimension("x", dimension)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = samplers.suggest(study.ask(), "x", dimension)
    assert dimension.contains(drawn)
    if (finite := dimension.finite()) is not None:
        assert any(drawn == value or drawn == pytest.approx(value) for value in finite)


@given(dimension=DIMENSIONS)
def test_a_dimension_survives_json(dimension):
    assert from_json(json.loads(json.dumps(to_json(dimension)))) == dimension


@given(dimension=DIMENSIONS, value=st.floats(-1e3, 1e6))
def test_the_nearest_value_is_one_of_the_dimensions(dimension, value):
    near = dimension.nearest(value)
    assert near is None or dimension.contains(near)


@pytest.mark.parametrize(
    ("dimension", "line"),
    [
        (Float(low=0.0, high=1.0, log=True), "search.space.x must have low > 0 on a log scale"),
        (Float(low=2.0, high=1.0), "search.space.x must have low < high, got 2.0 to 1.0; nearest"),
        (Int(low=4, high=4), "search.space.x must have low < high"),
        (Float(low=0.0, high=float("inf")), "search.space.x must have low < high"),
        (Int(low=4, high=8, step=9), "search.space.x must have a step in (0, 4], got 9"),
        (Int(low=4, high=8, step=2, log=True), "search.space.x must have no step"),
        (Choice(values=[]), "search.space.x must have at least one value"),
        (Choice(values=[4, 4.0]), "got 4 twice"),
    ],
)
def test_a_dimension_that_nothing_can_be_drawn_from_is_refused(dimension, line):
    with pytest.raises(ConfigError) as caught:
        check_dimension("x", dimension)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "dimension", "line"),
    [
        ("train.lrr", Float(low=0.1, high=1), "Did you mean 'train.lr'"),
        ("seed", Int(low=0, high=9), "search.seeds"),
        ("runtime.threads", Int(low=1, high=2), "changes what is computed"),
        ("relora.r", Float(low=4, high=8), "int(interval(4, 8))"),
        ("relora.scaling", Choice(values=["standard", 3]), "must be str, got 3"),
        ("train.lr", Choice(values=["x"]), "search.space.train.lr must be float, got 'x'"),
        ("method", Int(low=1, high=2), "must be a choice() of options"),
    ],
)
def test_a_key_or_a_value_that_no_knob_takes_is_refused(make, key, dimension, line):
    with pytest.raises(ConfigError) as caught:
        check_space({key: dimension}, groups=["method"], when={}, config=make())
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("when", "line"),
    [
        ({"relora.q": "method=relora"}, "Did you mean 'relora.r'"),
        ({"relora.r": "metod=relora"}, "Did you mean 'method'"),
        ({"relora.r": "method"}, "must be KEY=VALUE"),
        ({"relora.r": "train.lr=1", "train.lr": "relora.r=4"}, "circles"),
    ],
)
def test_a_condition_that_cannot_be_judged_is_refused(make, when, line):
    space = {"relora.r": Int(low=4, high=8), "train.lr": Float(low=0.1, high=1)}
    with pytest.raises(ConfigError) as caught:
        check_space(space, groups=[], when=when, config=make())
    assert line in str(caught.value)


def test_groups_are_drawn_first_and_conditions_before_what_they_decide():
    space = {
        "relora.r": Int(low=4, high=8),
        "relora.alpha": Float(low=1, high=8),
        "method": Choice(values=["lora", "relora"]),
        "model": Choice(values=["nano"]),
    }
    when = {"relora.r": "relora.alpha=4"}
    order = ordered(space, groups=["model", "method"], when=when)
    assert order == ["method", "model", "relora.alpha", "relora.r"]


def test_what_knobs_depend_on_is_drawn_before_them():
    space = {
        "muon.momentum": Float(low=0.9, high=0.99),
        "train.optimizer": Choice(values=["adamw", "muon"]),
    }
    assert ordered(space, groups=[], when={}) == ["train.optimizer", "muon.momentum"]


def test_a_knob_of_a_method_is_drawn_for_that_method_only(make):
    space = {"relora.r": Int(low=4, high=8), "train.lr": Float(low=0.1, high=1)}

    def active(key, method, **params):
        when = {"train.lr": "relora.r=4,8"}
        config = make(method=method)
        return is_active(key, params=params, space=space, when=when, config=config, group=False)

    assert active("relora.r", "relora")
    assert active("relora.r", "lora")
    assert not active("relora.r", "full_rank")
    assert active("train.lr", "relora", **{"relora.r": 4})
    assert not active("train.lr", "relora", **{"relora.r": 5})
    assert not active("train.lr", "full_rank")


@pytest.mark.parametrize(
    ("value", "text", "same"),
    [
        (1e-5, "1e-5", True),
        (32.0, "32", True),
        (0.5, "0.50", True),
        (4, "4.0", True),
        (True, "true", True),
        (True, "1", False),
        (1, "true", False),
        (None, "null", True),
        ("4", "4", True),
        ("4", "4.0", False),
        ([1], "1", False),
    ],
)
def test_a_condition_means_numbers_however_they_are_written(make, value, text, same):
    space = {"train.lr": Float(low=0.1, high=1), "model.name": Choice(values=[value])}
    given = {"space": space, "when": {"train.lr": f"model.name={text}"}, "config": make()}
    assert is_active("train.lr", params={"model.name": value}, group=False, **given) == same


def test_values_are_set_in_the_type_of_their_knob(make):
    point = with_values(make(), {"relora.alpha": 8, "relora.r": 8.0, "train.lr": 0.5})
    assert (repr(get(point, "relora.alpha")), repr(get(point, "relora.r"))) == ("8.0", "8")
    same = with_values(make(), {"relora.alpha": 8.0, "relora.r": 8, "train.lr": 0.5})
    assert run_id(point) == run_id(same)
    assert make() == with_values(make(), {})


def test_base_keys_do_not_depend_on_the_order_of_groups():
    assert base_key({"model": "tiny", "method": "lora"}) == "method=lora,model=tiny"
    assert base_key({}) == ""

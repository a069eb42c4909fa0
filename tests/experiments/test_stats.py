"""Means and their intervals agree with the tables and with scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments.stats import mean_interval


def test_three_values_by_hand() -> None:
    # t(0.975, 2) = 4.30265 in any table; sd of 1, 2, 3 is 1.
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2.0 - 4.30265 / 3**0.5, abs=1e-4)
    assert found.high == pytest.approx(2.0 + 4.30265 / 3**0.5, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(lambda v: np.std(v) > 1e-3))
def test_agrees_with_scipy(values: list[float]) -> None:
    found = mean_interval(values)
    low, high = scipy_stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=scipy_stats.sem(values)
    )
    assert found.low == pytest.approx(low, rel=1e-6, abs=1e-6)
    assert found.high == pytest.approx(high, rel=1e-6, abs=1e-6)


def test_one_value_has_no_interval() -> None:
    found = mean_interval([2.5])
    assert (found.mean, found.low, found.high, found.sd, found.n) == (2.5, None, None, None, 1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = mean_interval([4.0, 4.0, 4.0])
    assert found.low == found.mean == found.high == 4.0


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 4))
    intervals = [mean_interval(list(row)) for row in draws]
    covered = np.mean([i.low <= 3.0 <= i.high for i in intervals if i.low and i.high])
    assert 0.935 < covered < 0.965

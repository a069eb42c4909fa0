"""Estimates from few values: pure functions of numbers. Not for: deciding which runs to average."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(kw_only=True, slots=True)
class Interval:
    """A mean and the Student t interval that covers it with 95 % confidence."""

    mean: float
    low: float | None
    """None, as `high` and `sd`, of a single value: it says nothing about spread."""
    high: float | None
    n: int
    sd: float | None
    """Of the sample, with n - 1."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its two-sided 95 % Student t interval: mean +- t(0.975, n - 1) * sd / sqrt(n).

    Raises ValueError without values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the mean of no values")
    mean = statistics.fmean(values)
    if n == 1:
        return Interval(mean=mean, low=None, high=None, n=1, sd=None)
    from scipy.special import stdtrit  # scipy.stats takes a second to load

    sd = statistics.stdev(values, mean)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * sd / math.sqrt(n)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n, sd=sd)

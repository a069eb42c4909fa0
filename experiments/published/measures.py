"""Numbers of two checkpoints around a restart, as sums: those of modules add up to the pooled.

Not for: what they mean (`verdicts.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.published.adapters import Adapter

MERGES = ("none", "unscaled", "scaled")
"""What may be added to W: nothing, B A, s B A."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Squares and products of two checkpoints, p before and q after, of one module or of many."""

    a_entries: float
    fresh: float
    """Expected square of A drawn anew from U(±1/sqrt(in)): r / 3."""
    aa_before: float
    aa_after: float
    a_dot: float
    signed: float
    """Entries of A that are not 0 in either."""
    same_sign: float
    """Of these, the ones with the same sign: half of them for an independent draw."""
    small: float
    """Entries of A within a quarter of a fresh draw's bound, after."""
    bb_before: float
    bb_after: float
    b_dot: float
    entries: float
    """Of W."""
    bf16_exact: float
    """Entries of W that bfloat16 holds exactly, before."""
    moved: float
    """|W_q - W_p|^2"""
    product: float
    """|B A|^2, before."""
    dot: float
    """<W_q - W_p, B A>"""
    growth_dot: float
    """<B A after, B A before>"""
    fits: tuple[float, ...]
    """For each of MERGES: |W_q - predicted|^2."""
    same: tuple[float, ...]
    """For each: entries of W_q that equal the predicted ones, to the last bit."""
    steps: tuple[float, ...]
    """For each: |predicted - W_p|^2."""
    step_dots: tuple[float, ...]
    """For each: <predicted - W_p, B A>"""

    @property
    def a_distance(self) -> float | None:
        """|A_q - A_p| / |A_p|"""
        square = self.aa_after + self.aa_before - 2 * self.a_dot
        return _root(square, self.aa_before)

    @property
    def a_distance_fresh(self) -> float | None:
        """What an independent draw would give on average: sqrt(1 + fresh / |A_p|^2)."""
        return _root(self.fresh + self.aa_before, self.aa_before)

    @property
    def a_correlation(self) -> float | None:
        """Cosine of A before and after; 0 ± 1 / sqrt(a_entries) for an independent draw."""
        return _cosine(self.a_dot, self.aa_before, self.aa_after)

    @property
    def a_same_sign(self) -> float | None:
        """Share of entries that have their sign still: 1/2 ± 1 / (2 sqrt(signed)) if drawn anew.

        A few entries decide neither this nor `a_small`, as they do decide distance and correlation:
        where pruning zeroes an entry's second moment alone, Adam moves it by thousands of rates.
        """
        return self.same_sign / self.signed if self.signed else None

    @property
    def a_small(self) -> float:
        """Share of A within a quarter of a fresh draw's bound, after: 1/4 if drawn anew."""
        return self.small / self.a_entries

    @property
    def a_size(self) -> float:
        """|A_q| over that of a fresh draw."""
        return math.sqrt(self.aa_after / self.fresh)

    @property
    def b_ratio(self) -> float | None:
        """|B_q| / |B_p|"""
        return _root(self.bb_after, self.bb_before)

    @property
    def b_correlation(self) -> float | None:
        return _cosine(self.b_dot, self.bb_before, self.bb_after)

    @property
    def factor(self) -> float | None:
        """c that minimises |W_q - W_p - c B A|."""
        return self.dot / self.product if self.product else None

    @property
    def factor_cosine(self) -> float | None:
        return _cosine(self.dot, self.moved, self.product)

    @property
    def expected_factors(self) -> tuple[float, ...] | None:
        """c that each of MERGES would give, with the rounding of a bfloat16 base."""
        return tuple(dot / self.product for dot in self.step_dots) if self.product else None

    @property
    def growth(self) -> float | None:
        """Share of B A before that B A after has: 1 where it did not change."""
        return self.growth_dot / self.product if self.product else None

    @property
    def misfits(self) -> tuple[float, ...] | None:
        """|W_q - predicted| for each of MERGES, over the largest change that one predicts."""
        largest = max(self.steps)
        return tuple(math.sqrt(fit / largest) for fit in self.fits) if largest else None


def add(sums: Iterable[Sums]) -> Sums:
    """The pooled sums of modules."""
    columns = zip(*(dataclasses.astuple(one) for one in sums), strict=True)
    fields = dataclasses.fields(Sums)
    return Sums(**{f.name: _added(list(c)) for f, c in zip(fields, columns, strict=True)})


def compare(before: Adapter, after: Adapter) -> Sums:
    """The sums of one module. Both must have the same shapes."""
    exact = before.weight.to(torch.bfloat16).to(before.weight.dtype) == before.weight
    w, w_after = before.weight.double(), after.weight.double()
    product = before.b @ before.a
    signs = before.a.sign() * after.a.sign()
    quarter = 0.25 / math.sqrt(after.a.shape[1])
    predicted = predict(before, rounded=bool(exact.all()))
    return Sums(
        a_entries=before.a.numel(),
        fresh=before.a.shape[0] / 3,
        aa_before=_square(before.a),
        aa_after=_square(after.a),
        a_dot=_dot(before.a, after.a),
        signed=(signs != 0).sum().item(),
        same_sign=(signs > 0).sum().item(),
        small=(after.a.abs() <= quarter).sum().item(),
        bb_before=_square(before.b),
        bb_after=_square(after.b),
        b_dot=_dot(before.b, after.b),
        entries=w.numel(),
        bf16_exact=exact.sum().item(),
        moved=_square(w_after - w),
        product=_square(product),
        dot=_dot(w_after - w, product),
        growth_dot=_dot(after.b @ after.a, product),
        fits=tuple(_square(w_after - p) for p in predicted),
        same=tuple((w_after == p).sum().item() for p in predicted),
        steps=tuple(_square(p - w) for p in predicted),
        step_dots=tuple(_dot(p - w, product) for p in predicted),
    )


def predict(before: Adapter, *, rounded: bool) -> tuple[Tensor, ...]:
    """W after each of MERGES, in float64.

    On a bfloat16 base (`rounded`) the product and the sum are rounded as the published merge does;
    what is less than half a last place is lost, so that a merge may change little of W.
    """
    dtype = torch.bfloat16 if rounded else torch.float32
    w = before.weight.to(torch.float32)
    product = (before.b.to(dtype) @ before.a.to(dtype)).to(torch.float32)
    factors = (0.0, 1.0, before.scale)
    return tuple((w + factor * product).to(dtype).double() for factor in factors)


def _square(x: Tensor) -> float:
    return x.square().sum().item()


def _dot(x: Tensor, y: Tensor) -> float:
    return (x * y).sum().item()


def _root(square: float, of: float) -> float | None:
    return math.sqrt(max(square, 0.0) / of) if of else None


def _cosine(dot: float, one: float, other: float) -> float | None:
    return dot / math.sqrt(one * other) if one and other else None


def _added(column: list[Any]) -> Any:
    """The sum of numbers, or of tuples entry by entry."""
    if isinstance(column[0], tuple):
        return tuple(math.fsum(x) for x in zip(*column, strict=True))
    return math.fsum(column)

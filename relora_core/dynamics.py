"""Singular-value measures of learning dynamics: pure functions of matrices, one pass over a model.

Not for: choosing when to measure (`train.py`), nor averaging over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def singular_values(matrices: Tensor) -> Tensor:
    """(..., m, n) -> (..., min(m, n)) in float64, descending; float32 rounds small ones away."""
    return torch.linalg.svdvals(matrices.detach().double())


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(-sum p ln p) with p = sigma / sum(sigma) (Roy and Vetterli 2007): (..., k) -> (...).

    Exact zeros add nothing (0 ln 0 = 0); a zero matrix has effective rank 0.
    """
    total = sigma.sum(dim=-1, keepdim=True)
    p = sigma / torch.where(total > 0, total, 1.0)
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0)


def proportional_effective_rank(sigma: Tensor, *, size: int) -> Tensor:
    """`effective_rank` / size: min(shape) in the published code, d_inter in the paper's text."""
    return effective_rank(sigma) / size


def condition_number(sigma: Tensor) -> Tensor:
    """Largest over smallest singular value: (..., k) -> (...). Singular: inf. Zero matrix: nan."""
    return sigma[..., 0] / sigma[..., -1]


def weight_metrics(weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Mean over layers of PER (by min(shape)) and condition number of each kind of block linear.

    `weights` are (name, effective weight) with names `layers.<i>.<kind>`; the matrices of one kind
    have one shape and are decomposed in one batch.
    """
    by_kind: dict[str, list[Tensor]] = {}
    for name, weight in weights:
        by_kind.setdefault(name.rsplit(".", 1)[-1], []).append(weight)
    metrics = {}
    for kind, matrices in by_kind.items():
        sigma = singular_values(torch.stack(matrices))  # (layers, k)
        per = proportional_effective_rank(sigma, size=sigma.shape[-1]).mean().item()
        metrics[f"dynamics/weight_per/{kind}"] = per
        condition = condition_number(sigma).mean().item()
        if math.isfinite(condition):
            metrics[f"dynamics/weight_condition_number/{kind}"] = condition
    return metrics

"""What methods with moments of a projected gradient share: the projection, and Adam's step in it.

A gradient G is projected on r vectors of the length of its shorter side, the columns of a basis P.
The projected gradient R is (r, columns) where rows <= columns, else (rows, r). Not for: which basis
that is, and how a weight is updated; each method's file says that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relora_core.methods.base import updates_done


def project(matrix: Tensor, *, basis: Tensor) -> Tensor:
    """R of a matrix: P^T G (r, columns) for rows <= columns, else G P (rows, r)."""
    rows, columns = matrix.shape
    return basis.T @ matrix if rows <= columns else matrix @ basis


def project_back(low: Tensor, *, basis: Tensor, like: Tensor) -> Tensor:
    """P L or L P^T, of the shape of `like`; inverse of `project` for an orthonormal basis, on
    matrices in its span."""
    rows, columns = like.shape
    return basis @ low if rows <= columns else low @ basis.T


def projected_axis(matrix: Tensor) -> int:
    """The axis along which R has r entries: 0 where rows <= columns, else 1."""
    rows, columns = matrix.shape
    return 0 if rows <= columns else 1


def begin_moments_(state: dict[str, Any], *, like: Tensor) -> None:
    """Set moments of the shape of `like` and the step count to 0."""
    state["exp_avg"] = torch.zeros_like(like)
    state["exp_avg_sq"] = torch.zeros_like(like)
    state["step"] = torch.tensor(0.0)


def adam_direction_(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's step psi(R), bias-corrected, without the learning rate; moments are updated in place.

    Of the shape of `gradient`, here R; `group` holds `betas` and `eps` (Kingma and Ba 2015).
    """
    (beta1, beta2), done = group["betas"], updates_done(state) + 1
    state["step"] = torch.tensor(float(done))
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    variance = state["exp_avg_sq"] / (1 - beta2**done)
    return state["exp_avg"] / (1 - beta1**done) / variance.sqrt_().add_(group["eps"])


def norm_ratio(direction: Tensor, low: Tensor, *, dim: int | None) -> Tensor:
    """||psi(R)|| / ||R||, 0 where R is 0: along `dim`, which keeps size 1, or over all entries.

    The factor by which Adam scales R, for scaling another gradient likewise.
    """
    size = torch.linalg.vector_norm(low, dim=dim, keepdim=True)
    ratio = torch.linalg.vector_norm(direction, dim=dim, keepdim=True) / size
    return torch.where(size == 0, 0.0, ratio)


def limit_growth(update: Tensor, state: dict[str, Any], *, most: float) -> Tensor:
    """The norm-growth limiter (Chen et al. 2024, arXiv 2410.01623).

    The update, scaled down where its norm is more than `most` times that of the last result, which
    is kept as the state's `last_norm`. A first update, or one after norm 0, stays as it is.
    Limiting c times the updates gives c times the results.
    """
    norm = torch.linalg.vector_norm(update)
    last = state.get("last_norm", torch.zeros_like(norm))
    factor = torch.where(last > 0, (most * last / norm).clamp(max=1.0), 1.0)
    state["last_norm"] = norm * factor
    return update * factor

"""What methods with moments of a projected gradient share: the projection, and Adam's step in it.

Not for: which basis a gradient is projected on, and what becomes of the projected step; each
method's file says that. Here "projected" means on r vectors of the shorter side of a matrix;
R is (r, columns) where rows <= columns, else (rows, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from relora_core.config import projected_shapes
from relora_core.methods.base import Method
from relora_core.optim import SplitAdamW, build_adamw


def project(matrix: Tensor, *, basis: Tensor) -> Tensor:
    """P^T G (r, columns) for rows <= columns, else G P (rows, r)."""
    rows, columns = matrix.shape
    return basis.T @ matrix if rows <= columns else matrix @ basis


def project_back(low: Tensor, *, basis: Tensor, like: Tensor) -> Tensor:
    """P L or L P^T, the shape of `like`; inverse of `project` on the span of the basis."""
    rows, columns = like.shape
    return basis @ low if rows <= columns else low @ basis.T


def projected_axis(matrix: Tensor) -> int:
    """The axis along which R has r entries: 0 where rows <= columns, else 1."""
    rows, columns = matrix.shape
    return 0 if rows <= columns else 1


def updates_done(state: dict[str, Any]) -> int:
    """Updates since the moments began. The counter is kept on the CPU, where reading it waits for
    no kernel; a load may move it."""
    return int(state["step"].cpu()) if state else 0


def begin_moments_(state: dict[str, Any], *, like: Tensor) -> None:
    """Zero moments of this shape, and no update done."""
    state["exp_avg"] = torch.zeros_like(like)
    state["exp_avg_sq"] = torch.zeros_like(like)
    state["step"] = torch.tensor(0.0)


def adam_direction_(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's step psi(R), bias-corrected, without the learning rate; the moments move on."""
    (beta1, beta2), done = group["betas"], updates_done(state) + 1
    state["step"] = torch.tensor(float(done))
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    variance = state["exp_avg_sq"] / (1 - beta2**done)
    return state["exp_avg"] / (1 - beta1**done) / variance.sqrt_().add_(group["eps"])


def norm_ratio(direction: Tensor, low: Tensor, *, dim: int | None) -> Tensor:
    """||psi(R)|| / ||R|| along a dimension that is kept, or of all; 0 where R is 0.

    What Adam made of a gradient, as a factor that another gradient can be multiplied by.
    """
    size = torch.linalg.vector_norm(low, dim=dim, keepdim=True)
    ratio = torch.linalg.vector_norm(direction, dim=dim, keepdim=True) / size
    return torch.where(size == 0, 0.0, ratio)


def limit_growth(update: Tensor, state: dict[str, Any], *, most: float) -> Tensor:
    """The norm-growth limiter (Chen et al. 2024): the update, shortened to `most` times the norm of
    the last one that this gave; the first, or after one of norm 0, as it is.

    That norm is the state's `last_norm`. A constant factor of all updates passes through it.
    """
    norm = torch.linalg.vector_norm(update)
    last = state.get("last_norm", torch.zeros_like(norm))
    factor = torch.where(last > 0, (most * last / norm).clamp(max=1.0), 1.0)
    state["last_norm"] = norm * factor
    return update * factor


class Projected(Method):
    """Every weight is trained; the moments of target linears are those of a projected gradient."""

    optimizer: type[SplitAdamW]

    def options(self) -> dict[str, Any]:
        """Of the targets' group: the optimizer's `own` and all else that an update needs."""
        raise NotImplementedError

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What AdamW updates as it is, then the projected targets with their options."""
        names = [f"{name}.weight" for name in projected_shapes(self.config)]
        targets = [model.get_parameter(name) for name in names]
        chosen = {id(parameter) for parameter in targets}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        return [{"params": rest}, {"params": targets, **self.options()}]

    def build_optimizer(self, model: nn.Module) -> AdamW:
        """AdamW over both groups. Gradients are clipped before, by their full-rank norm."""
        return build_adamw(self.param_groups(model), train=self.config.train, kind=self.optimizer)

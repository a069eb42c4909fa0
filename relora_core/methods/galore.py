"""GaLore (Zhao et al. 2024, arXiv 2403.03507): full-rank weights, low-rank optimizer state.

The gradient of a target matrix is projected on r of its singular vectors, AdamW's moments live in
that projection, and the update is projected back. Not for: adapters; no weight is frozen or added.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from relora_core.config import projected_shapes
from relora_core.methods.base import Method
from relora_core.optim import SplitAdamW, build_adamw


@torch.no_grad()
def projector(gradient: Tensor, *, r: int) -> Tensor:
    """Orthonormal columns (shorter side of the gradient, r): its leading singular vectors.

    Left ones where rows <= columns (Algorithm 2 of the paper; its code takes the right ones of a
    square matrix). Every vector's largest entry is made positive: a sign that the SVD leaves open
    would turn into the sign of a kept moment. A non-finite gradient, which has no SVD, gives unit
    vectors and so a non-finite update: the run reports divergence, as it would under AdamW.
    """
    rows, columns = gradient.shape
    if not gradient.isfinite().all():
        return torch.eye(min(rows, columns), r, dtype=gradient.dtype, device=gradient.device)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    vectors = left[:, :r] if rows <= columns else right[:r].T
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = (vectors * largest.sign()).contiguous()
    if dist.is_available() and dist.is_initialized():
        # Ranks hold equal gradients, but an SVD may round differently on each.
        dist.broadcast(vectors, src=0)
    return vectors


def project(matrix: Tensor, *, basis: Tensor) -> Tensor:
    """P^T G (r, columns) for rows <= columns, else G P (rows, r)."""
    rows, columns = matrix.shape
    return basis.T @ matrix if rows <= columns else matrix @ basis


def project_back(low: Tensor, *, basis: Tensor, like: Tensor) -> Tensor:
    """P L or L P^T, the shape of `like`; inverse of `project` on the span of the basis."""
    rows, columns = like.shape
    return basis @ low if rows <= columns else low @ basis.T


class GaLoreAdamW(SplitAdamW):
    """AdamW; in groups that hold `galore_r`, its moments are those of the projected gradient.

    Such groups hold `galore_update_gap`, `galore_scale` and `galore_moments` too. A target's state
    is `projector`, `exp_avg`, `exp_avg_sq` and `step`, and a state_dict carries all four. Kept
    moments are not rotated when the projector changes (as published): coordinate i of the old basis
    becomes coordinate i of the new one.
    """

    own = "galore_r"

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        # The counter is kept on the CPU, where reading it waits for no kernel; a load may move it.
        done = int(state["step"].cpu()) if state else 0
        if done % group["galore_update_gap"] == 0:
            state["projector"] = projector(gradient, r=group["galore_r"])
            if done == 0 or group["galore_moments"] == "reset":
                done = 0
                state["exp_avg"] = torch.zeros_like(project(gradient, basis=state["projector"]))
                state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        low = project(gradient, basis=state["projector"])
        state["step"] = torch.tensor(done + 1.0)
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        variance = state["exp_avg_sq"] / (1 - beta2 ** (done + 1))
        update = state["exp_avg"] / (1 - beta1 ** (done + 1)) / variance.sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        back = project_back(update, basis=state["projector"], like=weight)
        weight.add_(back, alpha=-group["lr"] * group["galore_scale"])


class GaLore(Method):
    """Every weight is trained; the moments of target linears are low-rank."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What AdamW updates as it is, then the projected targets with their options."""
        galore = self.config.galore
        names = [f"{name}.weight" for name in projected_shapes(self.config)]
        targets = [model.get_parameter(name) for name in names]
        chosen = {id(parameter) for parameter in targets}
        return [
            {"params": [p for p in model.parameters() if id(p) not in chosen]},
            {
                "params": targets,
                "galore_r": galore.r,
                "galore_update_gap": galore.update_gap,
                "galore_scale": galore.scale,
                "galore_moments": galore.moments,
            },
        ]

    def build_optimizer(self, model: nn.Module) -> AdamW:
        """AdamW over both groups. Gradients are clipped before, by their full-rank norm."""
        return build_adamw(self.param_groups(model), train=self.config.train, kind=GaLoreAdamW)

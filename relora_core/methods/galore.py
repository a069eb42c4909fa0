"""GaLore (Zhao et al. 2024, arXiv 2403.03507): full-rank weights, low-rank optimizer state.

The gradient of a target matrix is projected on r of its singular vectors, AdamW's moments live in
that projection, and the update is projected back. Not for: adapters; no weight is frozen or added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relora_core.methods.base import SplitMethod, updates_done
from relora_core.methods.projected import (
    adam_direction_,
    begin_moments_,
    project,
    project_back,
)
from relora_core.optim import SplitAdamW
from relora_core.ranks import take_from_rank_0_
from relora_core.spectra import column_signs


@torch.no_grad()
def projector(gradient: Tensor, *, r: int) -> Tensor:
    """Orthonormal columns (shorter side of the gradient, r): its leading singular vectors.

    Left ones where rows <= columns (Algorithm 2 of the paper; its code takes the right ones of a
    square matrix). Every vector's largest entry is positive: the SVD leaves signs open, and another
    sign would change that of a kept moment. A non-finite gradient, which has no SVD, gives unit
    vectors and so a non-finite update: the run reports divergence, as it would under AdamW.
    """
    rows, columns = gradient.shape
    finite = gradient.isfinite().all()
    left, _, right = torch.linalg.svd(torch.where(finite, gradient, 0.0), full_matrices=False)
    vectors = left[:, :r] if rows <= columns else right[:r].T
    unit = torch.eye(min(rows, columns), r, dtype=gradient.dtype, device=gradient.device)
    vectors = torch.where(finite, vectors * column_signs(vectors), unit).contiguous()
    take_from_rank_0_(vectors)
    return vectors


class GaLoreAdamW(SplitAdamW):
    """AdamW; in groups that hold `galore_r`, its moments are those of the projected gradient.

    Such groups hold `galore_update_gap`, `galore_scale` and `galore_moments` too. A target's state
    is `projector`, `exp_avg`, `exp_avg_sq` and `step`, and a state_dict carries all four. Kept
    moments are not rotated when the projector changes (as published): coordinate i of the old basis
    becomes coordinate i of the new one.
    """

    own = "galore_r"

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        _, direction = self._advance_moments_(weight, gradient, group)
        self._move_(weight, direction, group)

    def _advance_moments_(
        self, weight: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Update projector and moments; (R, Adam's step psi(R))."""
        state = self.state[weight]
        done = updates_done(state)
        if done % group["galore_update_gap"] == 0:
            state["projector"] = projector(gradient, r=group["galore_r"])
            if done == 0 or group["galore_moments"] == "reset":
                begin_moments_(state, like=project(gradient, basis=state["projector"]))
        low = project(gradient, basis=state["projector"])
        return low, adam_direction_(state, low, group)

    def _move_(self, weight: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        """Decay the weight, then add the step, projected back."""
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        back = project_back(direction, basis=self.state[weight]["projector"], like=weight)
        weight.add_(back, alpha=-group["lr"] * group["galore_scale"])


class GaLore(SplitMethod):
    """The projected step is the update."""

    optimizer = GaLoreAdamW

    def options(self) -> dict[str, Any]:
        galore = self.config.galore
        return {
            "galore_r": galore.r,
            "galore_update_gap": galore.update_gap,
            "galore_scale": galore.scale,
            "galore_moments": galore.moments,
        }

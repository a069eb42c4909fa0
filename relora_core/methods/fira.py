"""Fira (Chen et al. 2024, arXiv 2410.01623): GaLore, and the part of the gradient that it discards.

With R = P^T G, G (m, n), m <= n, and Adam's step psi(R), a target's update is

    scale P psi(R) + limit(S),    S_:,j = phi_j (G - P R)_:,j,    phi_j = ||psi(R)_:,j|| / ||R_:,j||

so that it has full rank: the part without moments is scaled as Adam scales the other. limit(S) lets
||S|| be at most `norm_growth` times that of the last update. As in the published code, `scale` is
not a factor of S.

Each phi is computed from r numbers: where rows > columns, the columns j above are rows, as in the
published code. (In a square matrix they are columns here, as in `galore`; the code takes its rows.)
Where that code differs otherwise, the paper is followed:

- It multiplies by `scale` when it projects back, and so takes G - scale P R for G - P R;
  `fira.residual=code` repeats that.
- It corrects Adam's bias after the limiter; here that is part of psi. The factor is one for the
  whole update, so only the growth that the limiter permits differs, in the first steps.
- Where R = 0 and phi is not defined, it divides by 1e-8; here phi is 0.

Not for: the projector (galore.py) and the limiter (projected.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from relora_core.methods.base import SplitMethod
from relora_core.methods.galore import GaLoreAdamW
from relora_core.methods.projected import limit_growth, norm_ratio, project_back, projected_axis


class FiraAdamW(GaLoreAdamW):
    """GaLore's AdamW with the scaled residual.

    Its groups hold GaLore's options, `fira_residual` and `fira_norm_growth`. With the limiter a
    target's state has `last_norm` besides GaLore's.
    """

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        low, direction = self._advance_moments_(weight, gradient, group)
        self._move_(weight, direction, group)
        state = self.state[weight]
        share = group["galore_scale"] if group["fira_residual"] == "code" else 1.0
        back = project_back(low, basis=state["projector"], like=gradient)
        residual = gradient.sub(back, alpha=share)
        residual *= norm_ratio(direction, low, dim=projected_axis(gradient))
        if group["fira_norm_growth"] is not None:
            residual = limit_growth(residual, state, most=group["fira_norm_growth"])
        weight.add_(residual, alpha=-group["lr"])


class Fira(SplitMethod):
    """GaLore's update and the scaled residual."""

    optimizer = FiraAdamW

    def options(self) -> dict[str, Any]:
        fira = self.config.fira
        return {
            "galore_r": fira.r,
            "galore_update_gap": fira.update_gap,
            "galore_scale": fira.scale,
            "galore_moments": "keep",
            "fira_residual": fira.residual,
            "fira_norm_growth": fira.norm_growth,
        }

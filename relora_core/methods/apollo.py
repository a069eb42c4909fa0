"""APOLLO (Zhu et al. 2024, arXiv 2412.05270): the gradient, scaled by what Adam does to a sketch.

With R = P G, G (m, n), m <= n, P (r, m) of entries N(0, 1 / r) that are drawn anew every
`update_gap` updates, and Adam's step psi(R), a target's update is

    sqrt(scale) limit(G diag(s)),    s_j = ||psi(R)_:,j|| / ||R_:,j||    (scaling=channel)
    sqrt(scale) limit(s G),          s = ||psi(R)|| / ||R||              (scaling=tensor)

where limit lets the norm be at most `norm_growth` times that of the last update. APOLLO-Mini
(conf/method/apollo_mini.yaml) is the second with r = 1. The update has the gradient's direction,
column by column: there is no momentum in it, and R gives its size alone. Moments are kept when P
changes.

With rows > columns, R = G P^T and each row has a factor. `scale` may come before or after the
limiter: the results are the same.

Written from these equations, with nothing of the published code, which is licensed for
non-commercial use. The paper keeps a seed and draws P again at every step. Here P is kept between
draws, in memory and in checkpoints, at the cost of GaLore's projector (r x shorter side; a vector
for APOLLO-Mini): no step waits for a draw, and a run that is resumed on another device has the same
P. It is drawn on the CPU from seed, updates done and layer name, the same on every rank.

Not for: the limiter and Adam's step (projected.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from relora_core.methods.base import SplitMethod, index_in_group, updates_done
from relora_core.methods.projected import (
    adam_direction_,
    begin_moments_,
    limit_growth,
    norm_ratio,
    project,
    projected_axis,
)
from relora_core.optim import SplitAdamW
from relora_core.overlap import upload
from relora_core.seeds import named_generator


def random_basis(size: int, *, r: int, generator: torch.Generator) -> Tensor:
    """P^T (size, r), float32 on the CPU: ||P x||^2 is ||x||^2 on average over draws."""
    return torch.randn(size, r, generator=generator) / math.sqrt(r)


class ApolloAdamW(SplitAdamW):
    """AdamW; in groups that hold `apollo_r`, the gradient scaled by the sizes of Adam's steps.

    Such groups hold `apollo_update_gap`, `apollo_scaling`, `apollo_scale`, `apollo_norm_growth`,
    `apollo_seed` and, for each of their parameters, a name in `apollo_names`. A target's state is
    `projector`, `exp_avg`, `exp_avg_sq`, `step` and, with the limiter, `last_norm`.
    """

    own = "apollo_r"

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        done = updates_done(state)
        if done % group["apollo_update_gap"] == 0:
            state["projector"] = self._draw(weight, done, group)
            if done == 0:
                begin_moments_(state, like=project(gradient, basis=state["projector"]))
        low = project(gradient, basis=state["projector"])
        direction = adam_direction_(state, low, group)
        dim = projected_axis(gradient) if group["apollo_scaling"] == "channel" else None
        update = gradient * norm_ratio(direction, low, dim=dim)
        if group["apollo_norm_growth"] is not None:
            update = limit_growth(update, state, most=group["apollo_norm_growth"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * math.sqrt(group["apollo_scale"]))

    def _draw(self, weight: Tensor, done: int, group: dict[str, Any]) -> Tensor:
        name = group["apollo_names"][index_in_group(weight, group)]
        generator = named_generator(group["apollo_seed"], done, name)
        basis = random_basis(min(weight.shape), r=group["apollo_r"], generator=generator)
        return upload(basis.to(weight.dtype), weight.device)


class Apollo(SplitMethod):
    """The scaled gradient is the update."""

    optimizer = ApolloAdamW

    def options(self) -> dict[str, Any]:
        apollo = self.config.apollo
        return {
            "apollo_r": apollo.r,
            "apollo_update_gap": apollo.update_gap,
            "apollo_scaling": apollo.scaling,
            "apollo_scale": apollo.scale,
            "apollo_norm_growth": apollo.norm_growth,
            "apollo_seed": self.config.seed,
            "apollo_names": self.targets(),
        }

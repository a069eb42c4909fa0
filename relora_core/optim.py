"""AdamW over a method's parameter groups, and pruning of its state. Not for: schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from relora_core.config import TrainConfig


def build_adamw(groups: list[dict[str, Any]], *, train: TrainConfig) -> AdamW:
    """torch's fused AdamW; weight decay on every parameter of the groups, as published."""
    return AdamW(
        groups,
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )


def set_lr_(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its own `lr_ratio`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


@torch.no_grad()
def prune_state_(
    optimizer: Optimizer,
    parameters: dict[str, nn.Parameter],
    *,
    ratio: float,
    generator: Callable[[str], torch.Generator],
) -> float:
    """Zero a random share of both Adam moments of `parameters`, reset the step counters; in place.

    One mask serves both moments: an entry with its second moment zeroed and its first kept would
    move by 29 learning rates at once. The counter is reset because pruned moments with an old
    counter are not bias-corrected: under a constant gradient the updates after a restart rise to 6
    learning rates. Returns the share of entries that are zero afterwards; no other parameter's
    state is touched.
    """
    zero = total = 0
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue  # no update yet, hence nothing to prune
        keep = torch.rand(parameter.shape, generator=generator(name)) >= ratio
        keep = keep.to(parameter.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment].mul_(keep)
        state["step"].zero_()
        zero += int((~keep).sum())
        total += keep.numel()
    return zero / total if total else 0.0

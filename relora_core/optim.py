"""AdamW over all or some of a method's groups, Muon beside it, clipping, pruning of their state.

Not for: schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from relora_core.config import RunConfig, TrainConfig
from relora_core.overlap import read, upload

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Entries of a parameter's state that are shaped as it is: AdamW's two, Muon's one."""


def build_adamw(
    groups: list[dict[str, Any]], *, train: TrainConfig, kind: type[AdamW] = AdamW
) -> AdamW:
    """torch's fused AdamW; weight decay on every parameter of the groups, as published."""
    return kind(
        groups,
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=True,
    )


class SplitAdamW(AdamW):
    """AdamW; parameters of groups that hold the key `own` are moved by `_update_` instead."""

    own: str

    def _is_own(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return self.own in group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        targets = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._is_own(parameter, group)
        ]
        for parameter, _, _ in targets:
            parameter.grad = None  # AdamW passes over what has no gradient
        super().step()
        for parameter, gradient, group in targets:
            parameter.grad = gradient
            self._update_(parameter, gradient, group)

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class MuonAdamW(Optimizer):
    """torch's Muon for some groups and AdamW for the others, seen as one optimizer.

    Both work on this one's groups and state, which therefore hold all that a checkpoint needs.
    """

    def __init__(self, adamw: AdamW, muon: Muon) -> None:
        self.parts: tuple[Optimizer, Optimizer] = (adamw, muon)
        self._first = len(adamw.param_groups)
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Part of `load_state_dict`, which puts new groups and a new state in place."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        adamw, muon = self.parts
        adamw.param_groups = self.param_groups[: self._first]
        muon.param_groups = self.param_groups[self._first :]
        adamw.state = muon.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        for part in self.parts:
            part.step()


def build_muon(
    groups: list[dict[str, Any]], *, matrices: list[nn.Parameter], config: RunConfig
) -> MuonAdamW:
    """Muon for `matrices`, AdamW for the groups' other parameters; groups keep their options.

    A step orthogonalises each m x n matrix (m <= n) with ns_steps m^2 (m + 2n) multiply-adds,
    however small the batch is, on every process: all hold the same gradients.
    """
    own = {id(matrix) for matrix in matrices}

    def part(group: dict[str, Any], *, hidden: bool) -> dict[str, Any]:
        return {**group, "params": [p for p in group["params"] if (id(p) in own) is hidden]}

    others = [part(group, hidden=False) for group in groups]
    hidden = [part(group, hidden=True) for group in groups]
    muon = config.muon
    for group in hidden:
        group["lr_ratio"] = muon.lr_ratio * group.get("lr_ratio", 1.0)
    return MuonAdamW(
        build_adamw([group for group in others if group["params"]], train=config.train),
        Muon(
            [group for group in hidden if group["params"]],
            lr=config.train.lr,
            weight_decay=config.train.weight_decay,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjust_lr_fn=muon.adjust_lr,
        ),
    )


def set_lr_(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its own `lr_ratio`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def clip(model: nn.Module, *, limit: float | None, measured: bool) -> float | Tensor | None:
    """Global gradient norm before clipping; None if it is neither limited nor logged.

    Without a limit no gradient is changed. If the squares overflow float32 the norm is computed
    on scaled gradients, so that finite gradients stay finite. A GPU adds them up in float64
    instead, which asks for no decision of the host: there the norm is a tensor.
    """
    if limit is None and not measured:
        return None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients and gradients[0].device.type == "cuda":
        norm = wide_norm(gradients)
        if limit is not None:
            clip_by_wide_(gradients, limit=limit, norm=norm)
        return norm
    norm = nn.utils.get_total_norm(gradients)
    largest = nn.utils.get_total_norm(gradients, math.inf) if norm.isinf() else norm
    if norm.isfinite() or not largest.isfinite():
        if limit is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
        return norm.item()
    share = nn.utils.get_total_norm([g / largest for g in gradients]).item()
    total = share * largest.item()
    if limit is not None and limit < total:
        for gradient in gradients:
            gradient.div_(largest).mul_(limit / share)
    return total


def wide_norm(gradients: list[Tensor]) -> Tensor:
    """Global norm in float64, a scalar; nothing is read by the host."""
    norms = torch._foreach_norm(gradients, 2, torch.float64)  # type: ignore[attr-defined]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_wide_(gradients: list[Tensor], *, limit: float, norm: Tensor) -> None:
    """As torch's clip_grads_with_norm_, bit for bit, by a norm in float64. The factor is float32 as
    the gradients are: for another type a GPU starts a kernel for each of them."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0).float()
    torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]


@torch.no_grad()
def prune_state_(
    optimizer: Optimizer,
    parameters: dict[str, nn.Parameter],
    *,
    policy: str,
    ratio: float,
    joint_mask: bool = True,
    reset_step: bool = True,
    dropped: int = 0,
    generator: Callable[[str], torch.Generator],
) -> float:
    """Prune the moments of `parameters` in place; the share of entries that were zeroed.

    policy: `zero` all, `keep` all, zero a `random` share `ratio`, or the share smallest in
    `magnitude` (of each tensor; entries kept are counted, so ties lose nothing). With `joint_mask`
    one mask serves both moments (by the first one's magnitude): an entry with its second moment
    zeroed and its first kept would move by 29 learning rates at once. With `reset_step` the step
    counter of a tensor that lost an entry goes to 0: pruned moments with an old counter are not
    bias-corrected, and under a constant gradient the updates after a restart rise to 6 learning
    rates. (A tensor has one counter: an entry kept beside pruned ones begins with a third of one.)
    Where nothing is pruned the counter stays, whatever `reset_step` says. No other parameter's
    state is touched. `dropped` entries, of tensors that were replaced, count as zeroed.

    Of Muon's state, one moment without a counter, `policy` and `ratio` alone decide.
    """
    zeroed: list[Tensor] = []
    total = dropped
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue  # no update yet, so nothing to prune
        draws, before = generator(name), len(zeroed)
        moments = [state[moment] for moment in MOMENTS if moment in state]
        keep = _kept(moments[0], policy=policy, ratio=ratio, generator=draws)
        for number, moment in enumerate(moments):
            if number and not joint_mask:
                keep = _kept(moment, policy=policy, ratio=ratio, generator=draws)
            moment.mul_(keep)
            zeroed.append((~keep).sum())
            total += keep.numel()
        if reset_step and "step" in state:
            state["step"].mul_(sum(zeroed[before:]) == 0)
    return (dropped + sum(read(*zeroed))) / total if total else 0.0


def _kept(moment: Tensor, *, policy: str, ratio: float, generator: torch.Generator) -> Tensor:
    """Boolean mask of the entries that a policy keeps."""
    if policy in ("zero", "keep"):
        return torch.full_like(moment, policy == "keep", dtype=torch.bool)
    if policy == "random":
        keep = torch.rand(moment.shape, generator=generator) >= ratio
        return upload(keep, moment.device)
    size = moment.abs().flatten()
    largest = size.topk(size.numel() - round(ratio * size.numel())).indices
    return torch.zeros_like(size, dtype=torch.bool).index_fill_(0, largest, True).view_as(moment)

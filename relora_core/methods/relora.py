"""LoRA and ReLoRA: frozen base, trained adapters, and the restart that merges them.

With the knobs of `corrected`, the effective weight W + s B A is the same before and after a
restart, the new adapter agrees on every rank, and no moment of the old adapter moves the new one.
The other options of conf/relora are the published procedures, a knob at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from relora_core.config import RunConfig, adapted_shapes
from relora_core.methods.adapter import Adapted, Pass, ReLoRALinear, named_generator
from relora_core.optim import MOMENTS, prune_state_
from relora_core.redraws import Draws
from relora_core.schedule import is_full_rank, scheduled_rank
from relora_core.spectra import product_singular_values


class LoRA(Adapted):
    """Adapters on a frozen base (Hu et al. 2021), at full rank in the phases that ask for it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._now = Pass(seed=config.seed)

    def adapt(self, model: nn.Module) -> None:
        """Wrap target linears. Adapters are drawn after all base weights, which stay unchanged."""
        relora = self.config.relora
        if self.config.method != "relora":  # without restarts their knobs have no effect
            relora = replace(relora, base_dtype="float32", after_merge="reinit", nested_rank=False)
        for name in adapted_shapes(self.config):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            if relora.r == 0:
                owner.get_submodule(child).requires_grad_(False)
                continue
            target: Any = owner.get_submodule(child)
            linear = ReLoRALinear(target, relora, name=name, now=self._now)
            zero_a = relora.init_a == "zero"
            linear.draw_(named_generator(self.config.seed, 0, name), zero_a=zero_a)
            setattr(owner, child, linear)
        self.set_phase(0, model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All that is trained in some phase; B in a group of its own where its rate differs."""
        relora = self.config.relora
        adapters = [module for _, module in self.adapters(model)]
        phases = relora.warm_start_steps or relora.full_rank_steps
        own = {id(m.lora_B) for m in adapters} if relora.lr_ratio_b != 1.0 else set()
        used = (p for p in model.parameters() if phases or p.requires_grad)
        rest = [p for p in used if id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if own:
            fast = [m.lora_B for m in adapters]
            groups.append({"params": fast, "lr_ratio": relora.lr_ratio_b})
        return groups

    def set_phase(self, step: int, model: nn.Module) -> bool:
        """Let update `step` train the base or the adapters; whether anything changed."""
        full = is_full_rank(step, config=self.config)
        changed = False
        for _, adapter in self.adapters(model):
            changed |= adapter.weight.requires_grad != full
            adapter.weight.requires_grad_(full)
            for parameter in (adapter.lora_A, adapter.lora_B, adapter.scalar):
                if parameter is not None:
                    parameter.requires_grad_(not full)
        return changed

    def before_pass(self, step: int, *, first: int, stride: int) -> None:
        """Dropout and nested ranks are drawn for the place of each sequence in the whole batch."""
        self._now.step, self._now.first, self._now.stride = step, first, stride

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Between phases: fold adapters into the base, or draw them anew on the trained base."""
        before = is_full_rank(step - 1, config=self.config)
        if before == is_full_rank(step, config=self.config):
            return {}
        for name, adapter in self.adapters(model):
            if before:
                optimizer.state.pop(adapter.weight, None)  # not needed while the base is frozen
                adapter.round_base_()
                adapter.draw_(named_generator(self.config.seed, step, name))
            else:
                adapter.merge_()
                adapter.lora_B.data.zero_()
                for parameter in (adapter.lora_A, adapter.lora_B, adapter.scalar):
                    if parameter is not None:
                        optimizer.state.pop(parameter, None)
        return {"phase/full_rank": float(not before)}


class ReLoRA(LoRA):
    """LoRA with restarts: merge, draw anew, prune the optimizer's state (Lialin et al. 2023)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.base_dtype = getattr(torch, config.relora.base_dtype)
        self._resized = False
        self._draws = Draws(config)

    def set_phase(self, step: int, model: nn.Module) -> bool:
        resized, self._resized = self._resized, False
        return super().set_phase(step, model) or resized

    def _next_ranks(self, step: int, due: list[tuple[int, str, ReLoRALinear]]) -> list[int]:
        """The schedule's rank at `step`, or a smaller one that keeps the energy of the product.

        An adapter that has learnt nothing, or nothing finite, gives no evidence and keeps its rank;
        a rank that the schedule has raised since the last draw applies to every adapter.
        """
        most = scheduled_rank(step, config=self.config)
        share = self.config.relora.adaptive_rank_energy
        if share is None:
            return [most for _ in due]
        ranks = [
            most
            if most > self._draws.rank(step, index)
            else min(most, _needed_rank(adapter, share=share) or adapter.rank)
            for index, _, adapter in due
        ]
        if dist.is_available() and dist.is_initialized():
            # Processes hold equal adapters, but an SVD may round differently on each.
            decided = torch.tensor(ranks, device=due[0][2].weight.device)
            dist.broadcast(decided, src=0)
            ranks = decided.tolist()
        return ranks

    def restarts(self, step: int) -> bool:
        return self._draws.redraws.get(step) is not None

    def redraws(self, step: int) -> bool:
        return step in self._draws.redraws

    def before_update(self, step: int, model: nn.Module) -> None:
        """The masters overwrite what the restart drew, after one pass with it."""
        if self.config.relora.after_merge == "restore" and self.redraws(step):
            for _, _, adapter in self._due(step, model):
                adapter.restore_masters_()

    def _due(self, step: int, model: nn.Module) -> list[tuple[int, str, ReLoRALinear]]:
        """(index, name, adapter) of those that are drawn anew at this step."""
        named = enumerate(self.adapters(model))
        return [(i, name, a) for i, (name, a) in named if self._draws.due(step, i)]

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        metrics = super().after_step(step, model, optimizer)
        if not self.redraws(step):
            return metrics
        relora, seed = self.config.relora, self.config.seed
        merged, dropped, pruned = 0.0, 0, {}
        due = self._due(step, model)
        for (_, name, adapter), rank in zip(due, self._next_ranks(step, due), strict=True):
            if relora.after_merge == "restore":
                adapter.keep_masters_()
            merged += adapter.merge_(scaled=relora.merge == "scaled").item()
            if rank != adapter.rank:
                dropped += _change_rank(adapter, rank, optimizer)
                self._resized = True
            adapter.draw_(named_generator(seed, step, name))
            pruned[f"{name}.lora_A"] = adapter.lora_A
            pruned[f"{name}.lora_B"] = adapter.lora_B
            if adapter.scalar is not None:
                pruned[f"{name}.scalar"] = adapter.scalar
        zeroed = prune_state_(
            optimizer,
            pruned,
            policy=relora.optimizer_state,
            ratio=relora.prune_ratio,
            joint_mask=relora.joint_mask,
            reset_step=relora.reset_adam_step,
            dropped=dropped,
            generator=lambda name: named_generator(seed, step, f"{name}/prune"),
        )
        if relora.rank_schedule or relora.adaptive_rank_energy:
            ranks = [adapter.rank for _, adapter in self.adapters(model)]
            metrics["restart/rank_mean"] = sum(ranks) / len(ranks)
            metrics["restart/rank_min"], metrics["restart/rank_max"] = min(ranks), max(ranks)
        number = self._draws.redraws[step]
        if number is None:
            return metrics
        return metrics | {
            "restart/count": float(number + 1),
            "restart/merged_norm": math.sqrt(merged),
            "restart/state_zeroed": zeroed,
        }


def _needed_rank(adapter: ReLoRALinear, *, share: float) -> int | None:
    """The fewest ranks that hold this share of BA's squared singular values; None of nothing."""
    sigma = product_singular_values(adapter.lora_B.detach(), adapter.lora_A.detach())
    energy = sigma.square().cumsum(dim=0)
    if not 0 < float(energy[-1]) < math.inf:
        return None
    return int((energy < share * energy[-1]).sum()) + 1


def _change_rank(adapter: ReLoRALinear, rank: int, optimizer: Optimizer) -> int:
    """New parameters of another rank, in the old ones' places in module and optimizer.

    Gives the number of entries of moments that were dropped with the old ones. Autograd
    remembers a parameter's shape while DDP refers to it, so replacing its data is not enough.
    """
    shapes = {"lora_A": (rank, adapter.lora_A.shape[1]), "lora_B": (adapter.lora_B.shape[0], rank)}
    dropped = 0
    for name, shape in shapes.items():
        old = getattr(adapter, name)
        new = nn.Parameter(old.detach().new_zeros(shape))
        state = optimizer.state.pop(old, {})
        dropped += sum(state[moment].numel() for moment in MOMENTS if moment in state)
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        setattr(adapter, name, new)
    return dropped

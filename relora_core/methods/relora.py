"""LoRA and ReLoRA: frozen base, trained adapters, and the restart that merges them.

With the knobs of conf/relora/corrected.yaml the effective weight W + s B A is the same before and
after a restart, every rank draws the same adapter, and no moment of the old adapter moves the new
one. The other options there are the published procedures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import RunConfig, adapted_shapes
from relora_core.methods.adapter import AdapterMethod, ForwardPass, ReLoRALinear
from relora_core.optim import MOMENTS, prune_state_
from relora_core.overlap import read
from relora_core.ranks import take_from_rank_0_
from relora_core.redraws import Draws
from relora_core.schedule import is_full_rank, scheduled_rank
from relora_core.seeds import named_generator
from relora_core.spectra import product_singular_values


class LoRA(AdapterMethod):
    """Adapters on a frozen base (Hu et al. 2021), at full rank in the phases that ask for it."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._place = ForwardPass(seed=config.seed)

    def adapt(self, model: nn.Module) -> None:
        """Wrap target linears. Adapters are drawn after all base weights, which stay unchanged."""
        relora = self.config.relora
        if self.config.method != "relora":  # without restarts their knobs have no effect
            relora = replace(relora, base_dtype="float32", after_merge="reinit", nested_rank=False)
        for name in adapted_shapes(self.config):
            linear: Any = model.get_submodule(name)
            if relora.r == 0:
                linear.requires_grad_(False)
                continue
            adapted = ReLoRALinear(linear, relora, name=name, place=self._place)
            zero_a = relora.init_a == "zero"
            adapted.draw_(named_generator(self.config.seed, 0, name), zero_a=zero_a)
            self.put_(model, name, adapted)
        self.set_phase(0, model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All parameters that some phase trains; B in a group of its own where its rate differs."""
        relora = self.config.relora
        adapters = [module for _, module in self.adapters(model)]
        phases = relora.warm_start_steps or relora.full_rank_steps
        trained = [p for p in model.parameters() if phases or p.requires_grad]
        if relora.lr_ratio_b == 1.0 or not adapters:
            return [{"params": trained}]
        factors = [adapter.lora_B for adapter in adapters]
        chosen = {id(factor) for factor in factors}
        return [
            {"params": [p for p in trained if id(p) not in chosen]},
            {"params": factors, "lr_ratio": relora.lr_ratio_b},
        ]

    def set_phase(self, step: int, model: nn.Module) -> bool:
        """Let update `step` train the base or the adapters; True if it was the other before."""
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
        self._place.step, self._place.first, self._place.stride = step, first, stride
        super().before_pass(step, first=first, stride=stride)

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Between phases: merge adapters into the base, or draw them anew on the trained base."""
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
        """The schedule's rank at `step`, or the fewest ranks that hold the energy of B A.

        An adapter with B A = 0, or not finite, keeps its rank; one that the schedule has raised
        since the last draw applies to every adapter.
        """
        most = scheduled_rank(step, config=self.config)
        share = self.config.relora.adaptive_rank_energy
        if share is None:
            return [most for _ in due]
        raised = [most > self._draws.rank(step, index) for index, _, _ in due]
        highest = torch.full((), most, device=due[0][2].weight.device)
        agreed = torch.stack(
            [
                highest if up else _needed_rank(adapter, most=most, share=share)
                for up, (_, _, adapter) in zip(raised, due, strict=True)
            ]
        )
        take_from_rank_0_(agreed)
        return agreed.tolist()

    def restarts(self, step: int) -> bool:
        return self._draws.redraws.get(step) is not None

    def redraws(self, step: int) -> bool:
        return step in self._draws.redraws

    def before_update(self, step: int, model: nn.Module) -> None:
        """Set A and B back to the masters, after one pass with what the restart drew."""
        if self.config.relora.after_merge == "restore" and self.redraws(step):
            for _, _, adapter in self._due(step, model):
                adapter.restore_masters_()

    def _due(self, step: int, model: nn.Module) -> list[tuple[int, str, ReLoRALinear]]:
        """(index, name, adapter) of the adapters that are drawn anew at this step."""
        named = enumerate(self.adapters(model))
        return [(i, name, a) for i, (name, a) in named if self._draws.due(step, i)]

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        metrics = super().after_step(step, model, optimizer)
        if not self.redraws(step):
            return metrics
        relora, seed = self.config.relora, self.config.seed
        merged, dropped, pruned = [], 0, {}
        due = self._due(step, model)
        for (_, name, adapter), rank in zip(due, self._next_ranks(step, due), strict=True):
            if relora.after_merge == "restore":
                adapter.keep_masters_()
            merged.append(adapter.merge_(scaled=relora.merge == "scaled"))
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
            "restart/merged_norm": math.sqrt(sum(read(*merged))),
            "restart/state_zeroed": zeroed,
        }


def _needed_rank(adapter: ReLoRALinear, *, most: int, share: float) -> Tensor:
    """The fewest ranks that hold this share of BA's squared singular values, an int64 scalar; the
    adapter's own where they are 0 or not finite."""
    sigma = product_singular_values(adapter.lora_B.detach(), adapter.lora_A.detach())
    energy = running_sums(sigma.square(), gpu=sigma.device.type == "cuda")
    measured = (energy[-1] > 0) & (energy[-1] < math.inf)
    rank = torch.where(measured, (energy < share * energy[-1]).sum() + 1, adapter.rank)
    return rank.clamp(max=most)


def running_sums(values: Tensor, *, gpu: bool) -> Tensor:
    """Sums of the first 1, 2, ... of values (r,); a GPU's cumsum adds up in any order."""
    if gpu:
        return values.expand(len(values), -1).tril().sum(dim=1)
    return values.cumsum(dim=0)


def _change_rank(adapter: ReLoRALinear, rank: int, optimizer: Optimizer) -> int:
    """Put parameters of another rank, all 0, in the place of A and B in module and optimizer.

    Returns how many entries of moments were dropped with the old ones. Autograd remembers a
    parameter's shape while DDP refers to it, so replacing its data is not enough.
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

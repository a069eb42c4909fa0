"""LoRA and ReLoRA: frozen base, trained adapters, and the restart that merges them.

`corrected` semantics: the effective weight W + s B A is the same before and after a restart, the
new adapter agrees on every rank, and no moment of the old adapter moves the new one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import adapted_shapes
from relora_core.methods.base import Method
from relora_core.optim import prune_state_
from relora_core.schedule import restart_steps


def named_generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that depends on nothing else, so every rank and every resume draws alike."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ReLoRALinear(nn.Module):
    """y = W x + s B A dropout(x); W (out, in) frozen, A (r, in), B (out, r), s = alpha / r."""

    def __init__(self, linear: nn.Linear, *, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.scale, self.dropout = scale, dropout
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **like))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(x, self.weight) + F.linear(low * self.scale, self.lora_B)

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """A ~ U(±1/sqrt(in)) (Kaiming uniform, a = sqrt 5), B = 0: the adapter adds nothing yet."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    @torch.no_grad()
    def merge_(self) -> Tensor:
        """W += s B A; returns the squared Frobenius norm of what was added."""
        update = self.scale * (self.lora_B @ self.lora_A)
        self.weight += update
        return update.square().sum()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + s B A, (out, in)."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


class LoRA(Method):
    """Adapters on a frozen base, from the first step to the last (Hu et al. 2021)."""

    def adapt(self, model: nn.Module) -> None:
        """Wrap target linears. Adapters are drawn after the whole base, which stays as it was."""
        relora = self.config.relora
        for name in adapted_shapes(self.config):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            linear = ReLoRALinear(
                owner.get_submodule(child),  # type: ignore[arg-type]
                r=relora.r,
                scale=relora.alpha / relora.r,
                dropout=relora.dropout,
            )
            linear.draw_(named_generator(self.config.seed, 0, name))
            setattr(owner, child, linear)

    def adapters(self, model: nn.Module) -> Iterator[tuple[str, ReLoRALinear]]:
        """(qualified name, module) of every adapted linear."""
        for name, module in model.named_modules():
            if isinstance(module, ReLoRALinear):
                yield name, module

    def effective_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, module in model.named_modules():
            if isinstance(module, ReLoRALinear):
                yield name, module.effective_weight()
            elif isinstance(module, nn.Linear) and name.startswith("layers."):
                yield name, module.weight.detach()


class ReLoRA(LoRA):
    """LoRA with restarts: merge, draw anew, prune the optimizer's state (Lialin et al. 2023)."""

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        if step not in restart_steps(self.config):
            return {}
        merged, pruned = 0.0, {}
        for name, adapter in self.adapters(model):
            merged += adapter.merge_().item()
            adapter.draw_(named_generator(self.config.seed, step, name))
            pruned[f"{name}.lora_A"] = adapter.lora_A
            pruned[f"{name}.lora_B"] = adapter.lora_B
        zeroed = prune_state_(
            optimizer,
            pruned,
            ratio=self.config.relora.prune_ratio,
            generator=lambda name: named_generator(self.config.seed, step, f"{name}/prune"),
        )
        count = step // self.config.relora.reset_frequency
        return {
            "restart/count": float(count),
            "restart/merged_norm": math.sqrt(merged),
            "restart/state_zeroed": zeroed,
        }

    def state_dict(self) -> dict[str, Any]:
        return {}  # restarts are a pure function of the step; A, B and W are weights

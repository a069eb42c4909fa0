"""Sparse Optimization (SO): full-rank weights, of which an update moves few entries.

Mrabah, Richet, Ben Ayed and Granger 2025, arXiv 2504.12436, published for few-shot fine-tuning. Of
a target with n entries, k = int(density * n) are drawn every T updates: the support S. Moments
exist for at most k entries, the state I. An update with gradient g takes g_S, which is g on S and 0
elsewhere, and for the entries of I and S together

    m = b1 m + (1 - b1) g_S,  v = b2 v + (1 - b2) g_S^2   (m = v = 0 where there were none)
    W = W - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay W)

Then I is the k entries with the largest |m|. So which entries are updated is random, and which
ones are remembered goes by importance. At density 1 it is AdamW; with one S for the whole run it is
random static sparse training.

The published code (SparseOptimizer.py) does the same, but
- divides the first moment of dense parameters by 1 - b1^t twice: those are AdamW's here;
- compares every entry of S with every one of I, k x k: here a table of n places is looked up;
- adds weight decay to g, as L2: here it is decoupled, and on the entries that are updated alone;
- has its t run over all updates, also for entries that are new: `sparse.bias_correction`.

Embedding and head are dense, too; in its fine-tuning of BERT the embedding is sparse. Not for masks
on weights: entries that were never drawn keep their value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from relora_core.methods.adapter import named_generator
from relora_core.methods.base import Method
from relora_core.methods.projected import updates_done
from relora_core.optim import SplitAdamW, build_adamw

PLACES = ("support", "indices")
"""State that holds places in a flattened weight, in int32."""


class SparseAdamW(SplitAdamW):
    """AdamW; in groups that hold `sparse_names` few entries have moments.

    Such groups hold the names of their parameters, `sparse_entries` (k of each), `sparse_seed` and
    the options `sparse_update_gap`, `_select`, `_keep` and `_bias_correction`. A target's state is
    `support` and `indices` (k,), `exp_avg`, `exp_avg_sq` and, where each entry counts its own
    steps, `age` (k,) of `indices`, and `step`; a state_dict carries all of it.
    """

    own = "sparse_names"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved. torch alone would make places floats, which are not exact beyond 2^24."""
        super().load_state_dict(state_dict)
        parameters = (p for group in self.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):
            saved = state_dict["state"].get(number, {})
            for name in saved.keys() & PLACES:
                self.state[parameter][name] = saved[name].to(parameter.device)

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), gap = self.state[weight], group["betas"], group["sparse_update_gap"]
        done = updates_done(state)
        if done == 0 or (gap and done % gap == 0):
            state["support"] = _draw(weight, gradient, group, done)
        if done == 0:
            state["indices"] = state["support"]
            aged = group["sparse_bias_correction"] == "entry"
            for name in ("exp_avg", "exp_avg_sq", *(["age"] if aged else [])):
                state[name] = weight.new_zeros(len(state["support"]))
        support, indices = state["support"].long(), state["indices"].long()
        k = len(support)

        # 2 k slots: the entries with moments, then those drawn, empty where one is among the first.
        entries, number = torch.cat((indices, support)), torch.arange(2 * k, device=weight.device)
        table = torch.full_like(weight, -1, dtype=torch.int32).view(-1)
        table[indices] = number[:k].int()
        place = table.index_select(0, support)
        new = place < 0
        used = torch.cat((torch.ones_like(new), new))
        slots = torch.where(new, number[k:], place)
        g = weight.new_zeros(2 * k).scatter_(0, slots, gradient.flatten().index_select(0, support))

        m = _extended(state["exp_avg"]).lerp_(g, 1 - beta1)
        v = _extended(state["exp_avg_sq"]).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = _extended(state["age"]).add_(1) if "age" in state else done + 1
        variance = v / _correction(beta2, t)
        update = m / _correction(beta1, t) / variance.sqrt_().add_(group["eps"])
        flat = weight.view(-1)
        update.add_(flat.index_select(0, entries), alpha=group["weight_decay"])
        flat.index_add_(0, entries, update * used, alpha=-group["lr"])

        state["step"] = torch.tensor(done + 1.0)
        size = m.abs() if group["sparse_keep"] == "importance" else torch.isin(entries, support)
        size = torch.where(used, size, -1.0)
        kept = size.topk(k, sorted=False).indices
        state["indices"] = entries[kept].int()
        state["exp_avg"], state["exp_avg_sq"] = m[kept], v[kept]
        if isinstance(t, Tensor):
            state["age"] = t[kept]


def _correction(beta: float, t: int | Tensor) -> float | Tensor:
    """1 - beta^t; in float64, where little is left for a beta near 1."""
    return (1 - beta ** t.double()).to(t.dtype) if isinstance(t, Tensor) else 1 - beta**t


def _extended(values: Tensor) -> Tensor:
    """(k,) -> (2 k,), with zeros."""
    return torch.cat((values, torch.zeros_like(values)))


def _draw(weight: Tensor, gradient: Tensor, group: dict[str, Any], done: int) -> Tensor:
    """A new support (k,), rising, after `done` updates: the same on every rank and resume."""
    named = zip(group["sparse_names"], group["sparse_entries"], group["params"], strict=True)
    name, k = next((name, k) for name, k, parameter in named if parameter is weight)
    if group["sparse_select"] == "gradient":
        drawn = gradient.flatten().abs().topk(k, sorted=False).indices
    else:
        generator = named_generator(group["sparse_seed"], done, f"{name}/support")
        drawn = torch.randperm(weight.numel(), generator=generator)[:k].to(weight.device)
    return drawn.sort().values.int()


class Sparse(Method):
    """Every weight is trained, targets few entries at a time."""

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What AdamW updates as it is, then the targets with their options."""
        sparse, entries = self.config.sparse, self.config.sparse.entries(self.config)
        targets = [model.get_parameter(f"{name}.weight") for name in entries]
        chosen = {id(parameter) for parameter in targets}
        return [
            {"params": [p for p in model.parameters() if id(p) not in chosen]},
            {
                "params": targets,
                "sparse_names": list(entries),
                "sparse_entries": list(entries.values()),
                "sparse_seed": self.config.seed,
                "sparse_update_gap": sparse.update_gap,
                "sparse_select": sparse.select,
                "sparse_keep": sparse.keep,
                "sparse_bias_correction": sparse.bias_correction,
            },
        ]

    def build_optimizer(self, model: nn.Module) -> AdamW:
        """AdamW over both groups. Gradients are clipped before, by the norm of all entries."""
        return build_adamw(self.param_groups(model), train=self.config.train, kind=SparseAdamW)

"""Sparse Optimization (SO): full-rank weights, of which an update changes few entries.

Mrabah, Richet, Ben Ayed and Granger 2025, arXiv 2504.12436, published for few-shot fine-tuning. Of
a target with n entries, k = int(density * n) are drawn every T updates: the support S. Moments are
kept for k entries, I. An update with gradient g takes g_S, which is g on S and 0 elsewhere, and for
the entries of I and S together

    m = b1 m + (1 - b1) g_S,  v = b2 v + (1 - b2) g_S^2   (m = v = 0 where there were none)
    W = W - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay W)

Then I becomes the k entries with the largest |m|. So entries get gradients at random, and keep
moments by importance. At density 1 it is AdamW; with one S for the whole run it is random static
sparse training.

The published code (SparseOptimizer.py) does the same, but
- divides the first moment of dense parameters by 1 - b1^t twice; here AdamW updates those;
- compares every entry of S with every one of I, k x k; here a table of n entries is looked up;
- adds weight decay to g, as L2; here it is decoupled, and on the entries alone that are updated;
- takes the run's t for new entries, too; so does `sparse.bias_correction=global`.

Embedding and head are dense; in its fine-tuning of BERT the embedding is sparse. Not for masks on
weights: entries that were never drawn keep their value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relora_core.methods.base import SplitMethod, index_in_group, updates_done
from relora_core.optim import SplitAdamW
from relora_core.overlap import upload
from relora_core.seeds import named_generator

PLACES = ("support", "indices")
"""S and I in the optimizer's state: places in the flattened weight, int32."""


class SparseAdamW(SplitAdamW):
    """AdamW; in groups that hold `sparse_names`, the rule above.

    Such groups hold the names of their parameters, `sparse_entries` (k of each), `sparse_seed` and
    the options `sparse_update_gap`, `_select`, `_keep` and `_bias_correction`. A target's state is
    `support` (k,); `indices` (k,) with `exp_avg`, `exp_avg_sq` and, where each entry counts its own
    steps, `age` (k,) of these; and `step`.
    """

    own = "sparse_names"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore places as integers: torch makes them floats, which are inexact beyond 2^24."""
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
            state["support"] = _draw_support(weight, gradient, group, done)
        if done == 0:
            state["indices"] = state["support"]
            count_each = group["sparse_bias_correction"] == "entry"
            for name in ("exp_avg", "exp_avg_sq", *(["age"] if count_each else [])):
                state[name] = weight.new_zeros(len(state["support"]))
        support, indices = state["support"].long(), state["indices"].long()
        k = len(support)

        # 2 k slots: for I, then for S, of which those are unused whose entry is in I already.
        entries, number = torch.cat((indices, support)), torch.arange(2 * k, device=weight.device)
        table = torch.full_like(weight, -1, dtype=torch.int32).view(-1)
        table[indices] = number[:k].int()
        place = table.index_select(0, support)
        new = place < 0
        used = torch.cat((torch.ones_like(new), new))
        slots = torch.where(new, number[k:], place)
        g = weight.new_zeros(2 * k).scatter_(0, slots, gradient.flatten().index_select(0, support))

        m = _append_zeros(state["exp_avg"]).lerp_(g, 1 - beta1)
        v = _append_zeros(state["exp_avg_sq"]).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = _append_zeros(state["age"]).add_(1) if "age" in state else done + 1
        variance = v / _bias(beta2, t)
        update = m / _bias(beta1, t) / variance.sqrt_().add_(group["eps"])
        flat = weight.view(-1)
        update.add_(flat.index_select(0, entries), alpha=group["weight_decay"])
        flat.index_add_(0, entries, update * used, alpha=-group["lr"])

        state["step"] = torch.tensor(done + 1.0)
        if group["sparse_keep"] == "importance":
            size = m.abs()
        else:  # whether it is in S; torch.isin would wait for a GPU
            size = torch.zeros_like(used).index_fill_(0, slots, True)
        size = torch.where(used, size, -1.0)
        largest = size.topk(k, sorted=False).indices
        state["indices"] = entries[largest].int()
        state["exp_avg"], state["exp_avg_sq"] = m[largest], v[largest]
        if isinstance(t, Tensor):
            state["age"] = t[largest]


def _bias(beta: float, t: int | Tensor) -> float | Tensor:
    """1 - beta^t; in float64, as the difference loses digits for a beta near 1."""
    return (1 - beta ** t.double()).to(t.dtype) if isinstance(t, Tensor) else 1 - beta**t


def _append_zeros(values: Tensor) -> Tensor:
    """(k,) -> (2 k,)."""
    return torch.cat((values, torch.zeros_like(values)))


def _draw_support(weight: Tensor, gradient: Tensor, group: dict[str, Any], done: int) -> Tensor:
    """A new support (k,), ascending, after `done` updates: the same on every rank and resume."""
    index = index_in_group(weight, group)
    name, k = group["sparse_names"][index], group["sparse_entries"][index]
    if group["sparse_select"] == "gradient":
        drawn = gradient.flatten().abs().topk(k, sorted=False).indices
    else:
        generator = named_generator(group["sparse_seed"], done, f"{name}/support")
        places = torch.randperm(weight.numel(), generator=generator)[:k]
        drawn = upload(places, weight.device)
    return drawn.sort().values.int()


class Sparse(SplitMethod):
    """Every weight is trained, targets few entries at a time."""

    optimizer = SparseAdamW

    def options(self) -> dict[str, Any]:
        sparse, entries = self.config.sparse, self.config.sparse.entries(self.config)
        return {
            "sparse_names": list(entries),
            "sparse_entries": list(entries.values()),
            "sparse_seed": self.config.seed,
            "sparse_update_gap": sparse.update_gap,
            "sparse_select": sparse.select,
            "sparse_keep": sparse.keep,
            "sparse_bias_correction": sparse.bias_correction,
        }

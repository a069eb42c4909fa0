"""SwitchLoRA (Zhou et al. 2024, arXiv 2406.06564): adapters that exchange a few vectors at a time.

A linear (m, n) computes with W + s B A, s = alpha / r, W frozen. Beside the r columns b of B and
the r rows a of A, min(m, n) - r spare ones of either kind wait in a pool. After k updates
(0 < k < N = train.steps) each adapter switches c_k rows of A and c_k columns of B:

    x_k = r / interval * 0.3^((k + 1) / (decay N)),  c_k = floor(x_k) + Bernoulli(x_k - floor(x_k))

at most floor(r / 2) less those switched after the freeze_steps - 1 updates before. To switch row
a_i for the spare a', so that the function stays,

    W += s b_i (a_i - a'),  a_i <-> a',

and since the gradient of its counterpart b_i was one for a_i, both of Adam's moments of b_i and its
step count, which every vector has of its own, go to 0, and its gradient is taken as 0 for
freeze_steps updates. a_i keeps the moments of its place: b_i, which its gradient depends on, is the
same. A column of B likewise. Places i take turns, those of B r / 2 ahead of those of A, so that no
frozen vector is switched.

Initialisation, g = 1 / sqrt 3: at alpha = 1 entries of s B A deviate as those of a Kaiming draw do,
and a gradient step of either factor changes the output equally much:

    a ~ U(+-sqrt 3 (r sqrt m / n^1.5)^(1/4) sqrt g),  b ~ U(+-sqrt 3 (r / sqrt(m n))^(1/4) sqrt g)

and W = W_0 - s B A, so that the model begins as that of any other method.

Where texts and code (github.com/asfsdsf/SwitchLoRA) differ, the code is followed, since its runs
are the published ones: the frequency falls to 0.3 (described: a third) within decay N steps; the
step count of a frozen vector goes on, so that its first move is half a learning rate rather than a
whole one, and weight decay does not stop. Departures: it switches between backward pass and update,
here it is done between updates, which the function cannot tell apart, and not before the first,
where there is nothing to keep; its pools are on the host, here they are the model's buffers; r = 1,
with which it never switches, is refused; c_k is at most the number of spare vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import ReLoRAConfig, RunConfig, SwitchLoRAConfig, switched_shapes
from relora_core.methods.adapter import Adapted, ReLoRALinear, named_generator, named_seed
from relora_core.optim import SplitAdamW, build_adamw
from relora_core.schedule import switch_rate


class SwitchLinear(ReLoRALinear):
    """y = W x + s B A x, with spare rows of A (`pool_A`) and columns of B (`pool_B`, as rows)."""

    pool_A: Tensor
    pool_B: Tensor

    def __init__(self, linear: nn.Linear, switch: SwitchLoRAConfig) -> None:
        super().__init__(linear, ReLoRAConfig(r=switch.r, alpha=switch.alpha))
        rows, columns = self.weight.shape
        spare = switch.spare((rows, columns))
        self.register_buffer("pool_A", self.weight.new_zeros(spare, columns))
        self.register_buffer("pool_B", self.weight.new_zeros(spare, rows))

    @torch.no_grad()
    def begin_(self, generator: torch.Generator) -> None:
        """Draw factors and pools as published, and take s B A off W: the function stays."""
        (rows, columns), r, gain = self.weight.shape, self.rank, 3**-0.5
        of_a = math.sqrt(3 * gain) * (r * rows**0.5 / columns**1.5) ** 0.25
        of_b = math.sqrt(3 * gain) * (r / (rows * columns) ** 0.5) ** 0.25
        drawn = ((self.lora_A, of_a), (self.lora_B, of_b), (self.pool_A, of_a), (self.pool_B, of_b))
        for vectors, bound in drawn:
            uniform = torch.empty(vectors.shape).uniform_(-bound, bound, generator=generator)
            vectors.copy_(uniform)
        self.weight.sub_(self.lora_B @ self.lora_A, alpha=self._scale)

    @property
    def _scale(self) -> float:
        assert isinstance(self.scale, float)
        return self.scale

    @torch.no_grad()
    def switch_a_(self, places: Tensor, spares: Tensor) -> None:
        """Exchange rows of A for spare ones; W takes up the difference."""
        old, new = self.lora_A[places], self.pool_A[spares]
        self.weight.addmm_(self.lora_B[:, places], old - new, alpha=self._scale)
        self.lora_A[places], self.pool_A[spares] = new, old

    @torch.no_grad()
    def switch_b_(self, places: Tensor, spares: Tensor) -> None:
        """Exchange columns of B for spare ones; W takes up the difference."""
        old, new = self.lora_B[:, places], self.pool_B[spares].T
        self.weight.addmm_(old - new, self.lora_A[places], alpha=self._scale)
        self.lora_B[:, places], self.pool_B[spares] = new, old.T


class SwitchAdamW(SplitAdamW):
    """AdamW; a factor whose vectors have been reset has a step count for each vector.

    Its state is `exp_avg`, `exp_avg_sq`, and, shaped to broadcast over the factor, `step` and
    `frozen`: for how many more updates its gradient is taken as 0. Other parameters, and factors
    before their first reset, are torch's, bit for bit.
    """

    def _is_own(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return "frozen" in self.state[parameter]

    @torch.no_grad()
    def reset_(self, factor: Tensor, vectors: Tensor, *, dim: int, freeze: int) -> None:
        """Zero moments and step count of some vectors along `dim`, and freeze them."""
        state = self.state[factor]
        if "frozen" not in state:
            shape = [1, 1]
            shape[dim] = factor.shape[dim]
            state["step"] = state["step"].to(factor.device).expand(shape).clone()
            state["frozen"] = torch.zeros_like(state["step"])
        for name in ("exp_avg", "exp_avg_sq", "step"):
            state[name].index_fill_(dim, vectors, 0)
        state["frozen"].index_fill_(dim, vectors, freeze)

    def _update_(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        gradient = gradient.masked_fill(state["frozen"] > 0, 0)
        state["frozen"].sub_(1).clamp_(min=0)
        state["step"].add_(1)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = state["step"].double()  # 1 - 0.999 has three digits less in float32
        first, second = (1 - beta**step for beta in (beta1, beta2))
        size = (state["exp_avg_sq"] / second.to(weight.dtype)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(state["exp_avg"] / size * (group["lr"] / first).to(weight.dtype))


class SwitchLoRA(Adapted):
    """LoRA whose vectors are switched a few at a time; nothing is ever merged or pruned."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._switched = dict.fromkeys(switched_shapes(config), 0)
        self._recent: dict[str, list[int]] = {name: [] for name in self._switched}

    def adapt(self, model: nn.Module) -> None:
        """Wrap target linears; what is drawn depends on seed and name alone."""
        for name in switched_shapes(self.config):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            target: Any = owner.get_submodule(child)
            linear = SwitchLinear(target, self.config.switchlora)
            linear.begin_(named_generator(self.config.seed, 0, name))
            setattr(owner, child, linear)

    def build_optimizer(self, model: nn.Module) -> SwitchAdamW:
        optimizer = build_adamw(self.param_groups(model), train=self.config.train, kind=SwitchAdamW)
        assert isinstance(optimizer, SwitchAdamW)
        return optimizer

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Switch what is due before the next update; at the end nothing is."""
        if self.config.switchlora.interval is None or step >= self.config.train.steps:
            return {}
        assert isinstance(optimizer, SwitchAdamW)
        for name, adapter in self.adapters(model):
            assert isinstance(adapter, SwitchLinear)
            if count := self._count(step, name, adapter):
                self._switch_(step, name, adapter, count=count, optimizer=optimizer)
        return {}

    def _count(self, step: int, name: str, adapter: SwitchLinear) -> int:
        """c_k of an adapter, which is kept in mind for as long as counterparts are frozen."""
        rate = switch_rate(step, config=self.config)
        chance = named_seed(self.config.seed, step, f"{name}/switch") / 2**63
        recent = self._recent[name]
        most = min(adapter.rank // 2 - sum(recent), len(adapter.pool_A))
        count = min(int(rate) + (chance < rate % 1), most)
        recent.append(count)
        del recent[: max(0, len(recent) - max(0, self.config.switchlora.freeze_steps - 1))]
        return count

    def _switch_(
        self, step: int, name: str, adapter: SwitchLinear, *, count: int, optimizer: SwitchAdamW
    ) -> None:
        r, device = adapter.rank, adapter.weight.device
        turn = torch.arange(count, device=device) + self._switched[name]
        of_a, of_b = turn % r, (turn + r // 2) % r
        adapter.switch_a_(of_a, self._spares(step, f"{name}/A", adapter, turn=turn))
        adapter.switch_b_(of_b, self._spares(step, f"{name}/B", adapter, turn=turn))
        freeze = self.config.switchlora.freeze_steps
        optimizer.reset_(adapter.lora_B, of_a, dim=1, freeze=freeze)
        optimizer.reset_(adapter.lora_A, of_b, dim=0, freeze=freeze)
        self._switched[name] += count

    def _spares(self, step: int, name: str, adapter: SwitchLinear, *, turn: Tensor) -> Tensor:
        """Places in a pool. In sequence a vector comes back after all others have been in."""
        spare = len(adapter.pool_A)
        if self.config.switchlora.order == "sequential":
            return turn % spare
        generator = named_generator(self.config.seed, step, name)
        return torch.randperm(spare, generator=generator)[: len(turn)].to(turn.device)

    def state_dict(self) -> dict[str, Any]:
        """By adapter: how many of its vectors have been switched, and how many of late."""
        recent = {name: list(counts) for name, counts in self._recent.items()}
        return {"switched": dict(self._switched), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._switched |= state["switched"]
        self._recent |= {name: list(counts) for name, counts in state["recent"].items()}

"""SwitchLoRA (Zhou et al. 2024, arXiv 2406.06564): adapters that exchange a few vectors at a time.

A linear (m, n) computes with W + s B A, s = alpha / r, W frozen. Besides the r columns b of B and
the r rows a of A, min(m, n) - r spare ones of either kind wait in a pool. After k updates
(0 < k < N = train.steps) each adapter switches c_k rows of A and c_k columns of B:

    x_k = r / interval * 0.3^((k + 1) / (decay N)),  c_k = floor(x_k) + Bernoulli(x_k - floor(x_k))

at most floor(r / 2) minus the sum of the last freeze_steps - 1 counts. Switching row a_i for the
spare a' leaves the function unchanged,

    W += s b_i (a_i - a'),  a_i <-> a',

and freezes the counterpart b_i, whose moments come from gradients for the old a_i: they and its
step count, of which every vector has its own, go to 0, and its gradient is taken as 0 for
freeze_steps updates. The new a_i takes over moments and count of the old one: its gradient depends
on b_i, which is the same. A column of B likewise. Places i take turns, those of B r / 2 ahead of
those of A, so that no frozen vector is switched.

Initialisation, g = 1 / sqrt 3: at alpha = 1 the entries of s B A have the standard deviation of a
Kaiming draw, and a gradient step of either factor changes the output by as much as one of the
other:

    a ~ U(+-sqrt 3 (r sqrt m / n^1.5)^(1/4) sqrt g),  b ~ U(+-sqrt 3 (r / sqrt(m n))^(1/4) sqrt g)

and W = W_0 - s B A, so that the model begins as that of any other method.

Where the paper and its code (github.com/asfsdsf/SwitchLoRA) differ, the code is followed, which
made the published runs: the frequency falls to 0.3 (described: a third) within decay N steps; the
step
count of a frozen vector goes on, so that its first move is half a learning rate rather than a whole
one, and its weight decay does not stop. Departures from that code: it switches between backward
pass and update, here that is done between updates, which gives the same function, and not before
the first one, where moments are 0; its pools are in the host's memory, here they are the model's
buffers; r = 1, with which it never switches, is refused; c_k is at most the number of spare
vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import ReLoRAConfig, RunConfig, SwitchLoRAConfig
from relora_core.methods.adapter import AdapterMethod, ReLoRALinear
from relora_core.optim import SplitAdamW, build_adamw
from relora_core.overlap import upload
from relora_core.schedule import switch_rate
from relora_core.seeds import named_generator, named_seed


class SwitchLinear(ReLoRALinear):
    """y = W x + s B A x, with spare rows of A (`pool_A`) and columns of B (`pool_B`, as rows)."""

    pool_A: Tensor
    pool_B: Tensor

    def __init__(self, linear: nn.Linear, switch: SwitchLoRAConfig) -> None:
        super().__init__(linear, ReLoRAConfig(r=switch.r, alpha=switch.alpha))
        rows, columns = self.weight.shape
        spare = switch.spare_vectors((rows, columns))
        self.register_buffer("pool_A", self.weight.new_zeros(spare, columns))
        self.register_buffer("pool_B", self.weight.new_zeros(spare, rows))

    @torch.no_grad()
    def initialize_(self, generator: torch.Generator) -> None:
        """Draw A, B and the pools as published, and subtract s B A from W: the function stays."""
        (rows, columns), r, gain = self.weight.shape, self.rank, 3**-0.5
        bound_a = math.sqrt(3 * gain) * (r * rows**0.5 / columns**1.5) ** 0.25
        bound_b = math.sqrt(3 * gain) * (r / (rows * columns) ** 0.5) ** 0.25
        for vectors, bound in (
            (self.lora_A, bound_a),
            (self.lora_B, bound_b),
            (self.pool_A, bound_a),
            (self.pool_B, bound_b),
        ):
            uniform = torch.empty(vectors.shape).uniform_(-bound, bound, generator=generator)
            vectors.copy_(uniform)
        self.weight.sub_(self.lora_B @ self.lora_A, alpha=self._scale)

    @property
    def _scale(self) -> float:
        assert isinstance(self.scale, float)
        return self.scale

    @torch.no_grad()
    def switch_a_(self, places: Tensor, spares: Tensor) -> None:
        """Exchange rows of A at `places` (c,) for the spare ones at `spares` (c,); W makes up for
        it."""
        old, new = self.lora_A[places], self.pool_A[spares]
        self.weight.addmm_(self.lora_B[:, places], old - new, alpha=self._scale)
        self.lora_A[places], self.pool_A[spares] = new, old

    @torch.no_grad()
    def switch_b_(self, places: Tensor, spares: Tensor) -> None:
        """Likewise columns of B."""
        old, new = self.lora_B[:, places], self.pool_B[spares].T
        self.weight.addmm_(old - new, self.lora_A[places], alpha=self._scale)
        self.lora_B[:, places], self.pool_B[spares] = new, old.T


class SwitchAdamW(SplitAdamW):
    """AdamW; an A or B whose vectors have been reset has a step count for each vector.

    Its state is `exp_avg`, `exp_avg_sq`, `step` and `frozen`, for how many more updates a vector's
    gradient is taken as 0; the last two broadcast over the parameter. All other parameters are
    updated by torch's AdamW, bit for bit.
    """

    def _is_own(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return "frozen" in self.state[parameter]

    @torch.no_grad()
    def reset_(self, factor: Tensor, vectors: Tensor, *, dim: int, freeze: int) -> None:
        """Zero moments and step count of the vectors with these indices along `dim`, and freeze
        them for `freeze` updates."""
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
        step = state["step"].double()  # in float32, 1 - 0.999 has lost three digits
        bias1, bias2 = (1 - beta**step for beta in (beta1, beta2))
        size = (state["exp_avg_sq"] / bias2.to(weight.dtype)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(state["exp_avg"] / size * (group["lr"] / bias1).to(weight.dtype))


class SwitchLoRA(AdapterMethod):
    """LoRA whose vectors are switched a few at a time; nothing is ever merged or pruned."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._switched = dict.fromkeys(config.switchlora.targets(config), 0)
        self._recent: dict[str, list[int]] = {name: [] for name in self._switched}

    def adapt(self, model: nn.Module) -> None:
        """Wrap target linears; what is drawn depends on seed and name alone."""
        for name in self._switched:
            linear: Any = model.get_submodule(name)
            adapted = SwitchLinear(linear, self.config.switchlora)
            adapted.initialize_(named_generator(self.config.seed, 0, name))
            self.put_(model, name, adapted)

    def build_optimizer(self, model: nn.Module) -> SwitchAdamW:
        optimizer = build_adamw(self.param_groups(model), train=self.config.train, kind=SwitchAdamW)
        assert isinstance(optimizer, SwitchAdamW)
        return optimizer

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Switch vectors before the next update; none after the last one."""
        if self.config.switchlora.interval is None or step >= self.config.train.steps:
            return {}
        assert isinstance(optimizer, SwitchAdamW)
        for name, adapter in self.adapters(model):
            assert isinstance(adapter, SwitchLinear)
            if count := self._count(step, name, adapter):
                self._switch_(step, name, adapter, count=count, optimizer=optimizer)
        return {}

    def _count(self, step: int, name: str, adapter: SwitchLinear) -> int:
        """c_k of an adapter; remembered for as long as it limits the next ones."""
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
        """Places in a pool; `sequential` takes the vectors in turn."""
        spare = len(adapter.pool_A)
        if self.config.switchlora.order == "sequential":
            return turn % spare
        generator = named_generator(self.config.seed, step, name)
        return upload(torch.randperm(spare, generator=generator)[: len(turn)], turn.device)

    def state_dict(self) -> dict[str, Any]:
        """By adapter: how many vectors of A have been switched, and the newest counts c_k."""
        recent = {name: list(counts) for name, counts in self._recent.items()}
        return {"switched": dict(self._switched), "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._switched |= state["switched"]
        self._recent |= {name: list(counts) for name, counts in state["recent"].items()}

"""The linear with an adapter: its forward pass, how it is drawn and merged.

Not for: when that happens (`relora.py`, `switchlora.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_core.config import ReLoRAConfig, RunConfig, adapter_scale
from relora_core.dropout import Dropout, mask_in_graph
from relora_core.kernels import adapted_linear
from relora_core.methods.base import Method
from relora_core.overlap import upload
from relora_core.seeds import named_seed


@dataclass(slots=True)
class ForwardPass:
    """A forward pass's place in the run: with a layer's name it decides dropout and nested rank."""

    seed: int = 0
    """The run's."""
    step: int = 0
    """Updates complete."""
    first: int = 0
    stride: int = 1
    """See `dropout.Dropout`."""


class ReLoRALinear(nn.Module):
    """y = W x + s B A dropout(x); W (out, in) frozen, A (r, in), B (out, r)."""

    scalar: nn.Parameter | None
    master_A: Tensor | None
    master_B: Tensor | None
    master_scalar: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        relora: ReLoRAConfig,
        *,
        name: str = "",
        place: ForwardPass | None = None,
    ) -> None:
        """In the place of `linear`; A and B are not drawn yet. A model's adapters share `place`,
        which `LoRA.before_pass` keeps up to date."""
        super().__init__()
        self.name, self.place = name, place or ForwardPass()
        out_features, in_features = linear.weight.shape
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.dropout, self.base_dtype = relora.dropout, getattr(torch, relora.base_dtype)
        self.weight = nn.Parameter(self._rounded(linear.weight.detach()), requires_grad=False)
        self.lora_A = nn.Parameter(torch.empty(relora.r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, relora.r, **like))
        self.alpha, self.rslora = relora.alpha, relora.scaling == "rslora"
        self.nested = relora.nested_rank
        trainable = relora.scaling == "trainable"
        self.scalar = nn.Parameter(torch.ones((), **like)) if trainable else None
        self.numbers: Tensor | None = None
        """(4,) int64 on the device, for graphs: the pass's seed and first sequence, nested rank."""
        self.weight_bf16: Tensor | None = None
        self._cast_version: int | None = None
        # What the optimizer's masters hold between a merge and the next update.
        masters = relora.after_merge == "restore"
        self.register_buffer("master_A", torch.zeros_like(self.lora_A) if masters else None)
        self.register_buffer("master_B", torch.zeros_like(self.lora_B) if masters else None)
        scalar = self.scalar.detach().clone() if masters and self.scalar is not None else None
        self.register_buffer("master_scalar", scalar)

    def _rounded(self, weight: Tensor) -> Tensor:
        """The nearest values in `base_dtype`, stored as float32."""
        return weight.to(self.base_dtype).to(weight.dtype)

    @property
    def rank(self) -> int:
        """r, which a restart may change."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float | Tensor:
        """s; a scalar tensor where it is trained."""
        if self.scalar is not None:
            return self.scalar.tanh()
        return adapter_scale(self.alpha, rank=self.rank, rslora=self.rslora)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.compiler.is_compiling():
            return self._forward_in_graph(x)
        a, b = self.lora_A, self.lora_B
        if self.nested and self.training:
            rank = 1 + self._seed("nested") % self.rank
            a, b = a[:rank], b[:, :rank]
        scale, dropout, weight = self.scale, self._dropout(), self.weight
        if self.weight_bf16 is not None and torch.is_autocast_enabled(x.device.type):
            weight = self.weight_bf16
        if not self.weight.requires_grad and not isinstance(scale, Tensor):
            return adapted_linear(x, weight, a, b, scale=scale, dropout=dropout)
        low = F.linear(x * dropout.mask(x) * dropout.gain if dropout else x, a)
        return F.linear(x, weight) + F.linear(low * scale, b)

    def _forward_in_graph(self, x: Tensor) -> Tensor:
        """As `forward` in training, in plain operations that a compiler fuses."""
        numbers, weight, dropped = self.numbers, self.weight, x
        assert numbers is not None
        if self.weight_bf16 is not None and torch.is_autocast_enabled(x.device.type):
            weight = self.weight_bf16
        if self.dropout:
            draws = Dropout(self.dropout, seed=0)
            stride = self.place.stride
            keep = mask_in_graph(x, share=self.dropout, numbers=numbers, stride=stride)
            dropped = x * keep * draws.gain
        low = F.linear(dropped, self.lora_A)
        if self.nested:
            low = low * (torch.arange(self.rank, device=x.device) < numbers[2])
        return F.linear(x, weight) + F.linear(low * self.scale, self.lora_B)

    def pass_numbers(self) -> list[int]:
        """What `numbers` holds in this pass."""
        rank = 1 + self._seed("nested") % self.rank if self.nested else self.rank
        return [self._seed("dropout") if self.dropout else 0, self.place.first, rank, 0]

    def cast_frozen_(self) -> None:
        """On a GPU let `weight_bf16` be W in bf16 while W is frozen; cast it where W has changed.

        Autocast would cast it in every pass, which a frozen W outlives by thousands.
        """
        weight = self.weight
        if weight.device.type != "cuda":
            return
        version = None if weight.requires_grad else weight._version
        if version is None:
            self.weight_bf16 = None
        elif self.weight_bf16 is None:
            self.weight_bf16 = weight.detach().bfloat16()
        elif version != self._cast_version:
            self.weight_bf16.copy_(weight.detach())
        self._cast_version = version

    def _seed(self, what: str) -> int:
        return named_seed(self.place.seed, self.place.step, f"{self.name}/{what}")

    def _dropout(self) -> Dropout | None:
        """This pass's dropout; None where nothing is dropped."""
        if not self.dropout or not self.training:
            return None
        seed, place = self._seed("dropout"), self.place
        return Dropout(self.dropout, seed=seed, first=place.first, stride=place.stride)

    def resize_(self, rank: int) -> None:
        """Change the rank before the first pass: A and B stay the same objects, and become 0."""
        self.lora_A.data = self.lora_A.data.new_zeros(rank, self.lora_A.shape[1])
        self.lora_B.data = self.lora_B.data.new_zeros(self.lora_B.shape[0], rank)

    def fit_(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Take the rank from a checkpoint's shapes, and add what earlier versions did not save."""
        saved = state_dict.get(f"{prefix}lora_A")
        if saved is not None and saved.shape[0] != self.rank:
            self.resize_(saved.shape[0])
        if self.master_scalar is not None and f"{prefix}scalar" in state_dict:
            # Those versions did not restore s at a restart; their runs go on so.
            state_dict.setdefault(f"{prefix}master_scalar", state_dict[f"{prefix}scalar"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # type: ignore[override]
        self.fit_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def draw_(self, generator: torch.Generator, *, zero_a: bool = False) -> None:
        """A ~ U(±1/sqrt(in)) (Kaiming uniform, a = sqrt 5) or 0, B = 0: nothing is added yet."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(upload(torch.zeros_like(drawn) if zero_a else drawn, self.lora_A.device))
        self.lora_B.zero_()
        if self.scalar is not None:
            self.scalar.fill_(1.0)

    @torch.no_grad()
    def round_base_(self) -> None:
        """W in `base_dtype`, after it was trained in float32."""
        self.weight.copy_(self._rounded(self.weight))

    @torch.no_grad()
    def merge_(self, *, scaled: bool = True) -> Tensor:
        """W += s B A, or B A; in `base_dtype`. Returns the squared Frobenius norm of the update."""
        product = self.lora_B.to(self.base_dtype) @ self.lora_A.to(self.base_dtype)
        update = product.to(self.weight.dtype)
        update *= self.scale if scaled else 1.0
        self.weight.copy_(self._rounded(self.weight + update))
        return update.square().sum()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + s B A, (out, in)."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def keep_masters_(self) -> None:
        """Copy A, B and s to the masters, as the optimizer of the published run kept them."""
        for master, parameter in self._masters():
            master.copy_(parameter)

    @torch.no_grad()
    def restore_masters_(self) -> None:
        """Set A, B and s to the masters; the gradients stay those of the new adapter."""
        for master, parameter in self._masters():
            parameter.copy_(master)

    def _masters(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """(master, parameter) of A, B and a trained s."""
        assert self.master_A is not None
        assert self.master_B is not None
        yield self.master_A, self.lora_A
        yield self.master_B, self.lora_B
        if self.master_scalar is not None:
            assert self.scalar is not None
            yield self.master_scalar, self.scalar


class AdapterMethod(Method):
    """What methods with a `ReLoRALinear` have in common."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._adapters: list[ReLoRALinear] = []
        self._numbers: Tensor | None = None

    def put_(self, model: nn.Module, name: str, adapter: ReLoRALinear) -> None:
        """Put an adapter in the place of a linear."""
        model.set_submodule(name, adapter)
        self._adapters.append(adapter)

    def prepare_graphs(self, model: nn.Module) -> None:
        """Give each adapter its row of a table that `before_pass` fills."""
        if not self._adapters:
            return
        device = self._adapters[0].weight.device
        self._numbers = torch.zeros(len(self._adapters), 4, dtype=torch.int64, device=device)
        for adapter, row in zip(self._adapters, self._numbers, strict=True):
            adapter.numbers = row

    def before_pass(self, step: int, *, first: int, stride: int) -> None:
        """Cast frozen weights that have changed, where products are in bf16; fill the table."""
        if self._numbers is not None:
            rows = torch.tensor([adapter.pass_numbers() for adapter in self._adapters])
            self._numbers.copy_(upload(rows, self._numbers.device))
        if self.config.train.precision == "bf16":
            for adapter in self._adapters:
                adapter.cast_frozen_()

    def adapters(self, model: nn.Module) -> Iterator[tuple[str, ReLoRALinear]]:
        """(qualified name, module) of every adapted linear."""
        for name, module in model.named_modules():
            if isinstance(module, ReLoRALinear):
                yield name, module

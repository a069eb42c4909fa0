"""SLTrain (Han et al. 2024, arXiv 2406.02214): W = (alpha / r) B A + S, and no frozen base.

S is sparse: int(delta n) of a target's n entries, drawn once and trained. delta = 0 leaves s B A,
low rank from scratch; r = 0 leaves S, random static sparse training. Each forward pass builds W, so
that weights and the optimizer's state are those of A, B and S alone.

As published A ~ U(±1/sqrt(in)) (Kaiming uniform, a = sqrt 5), B = 0, S ~ U(±1/sqrt(in)). The
published code (splora_linear.py) refuses r = 0 and delta = 0. With B = 0 the latter cannot learn:
every block gives 0, and no factor has a gradient. `init=spectral` begins with the best
approximation of rank r of a dense linear's draw instead (Khodak et al. 2021). The published
backward pass builds W anew; here autograd keeps it from the forward pass, which `costs` counts.

`refactor_every` is the weight refactorisation of Glentis et al. 2025 (arXiv 2505.22922): with the
SVD B A = U D V^T, B becomes U sqrt(D) and A sqrt(D) V^T, and Adam's moments of both are dropped.
The function stays: this is what a restart does to the optimizer, without its merge. S stays as it
is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core.config import SLTrainConfig, linear_shapes
from relora_core.methods.base import Method
from relora_core.overlap import read
from relora_core.ranks import take_from_rank_0_
from relora_core.seeds import named_generator
from relora_core.spectra import column_signs


class SLTrainLinear(nn.Module):
    """y = (s B A + S) x; A (r, in), B (out, r), and the k entries of S: `values` (k,) at `places`
    (k,) of the flattened matrix. A part without entries is None."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    values: nn.Parameter | None
    places: Tensor | None

    def __init__(self, linear: nn.Linear, sltrain: SLTrainConfig, *, entries: int) -> None:
        """In the place of `linear`; everything is 0 until `draw_`."""
        super().__init__()
        weight, r = linear.weight.detach(), sltrain.r
        self.shape = (rows, columns) = weight.shape
        self.scale = sltrain.alpha / r if r else 0.0
        self.lora_A = nn.Parameter(weight.new_zeros(r, columns)) if r else None
        self.lora_B = nn.Parameter(weight.new_zeros(rows, r)) if r else None
        self.values = nn.Parameter(weight.new_zeros(entries)) if entries else None
        places = weight.new_zeros(entries, dtype=torch.int32) if entries else None
        self.register_buffer("places", places)

    @torch.no_grad()
    def draw_(self, seed: int, name: str, *, dense: Tensor | None) -> None:
        """Initialise as published; with `dense` (out, in), s B A is its best approximation."""
        bound = 1 / math.sqrt(self.shape[1])
        if self.lora_A is not None and self.lora_B is not None:
            if dense is None:
                self.lora_A.uniform_(-bound, bound, generator=named_generator(seed, 0, name))
            else:
                left, d, right = torch.linalg.svd(dense.double() / self.scale, full_matrices=False)
                r = len(self.lora_A)
                self._set_factors_(left[:, :r], d[:r], right[:r])
        if self.values is not None and self.places is not None:
            generator = named_generator(seed, 0, f"{name}/sparse")
            drawn = torch.randperm(math.prod(self.shape), generator=generator)
            self.places.copy_(drawn[: len(self.places)].sort().values)
            self.values.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self._build_weight()
        return F.linear(x, weight)

    def _build_weight(self) -> Tensor:
        if self.lora_A is None or self.lora_B is None:
            return self._build_sparse()
        product = self.lora_B @ self.lora_A * self.scale
        if self.values is None or self.places is None:
            return product
        return product.view(-1).index_add(0, self.places, self.values).view(self.shape)

    def _build_sparse(self) -> Tensor:
        if self.values is None or self.places is None:
            assert self.lora_A is not None
            return self.lora_A.new_zeros(self.shape)
        zeros = self.values.new_zeros(math.prod(self.shape))
        return zeros.index_add(0, self.places, self.values).view(self.shape)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """s B A + S, (out, in)."""
        return self._build_weight()

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """S, (out, in)."""
        return self._build_sparse()

    @torch.no_grad()
    def norm_ratio(self) -> Tensor:
        """The norm of B over that of A, a float64 scalar."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return self.lora_B.double().norm() / self.lora_A.double().norm()

    @torch.no_grad()
    def balance_(self, ratio: float | None = None) -> float:
        """Set B and A to U sqrt(D) and sqrt(D) V^T of the SVD of their product; returns the norm of
        B over that of A before, which may be given.

        Both stay as they are where the product is 0, whose factors would have no gradient, or not
        finite.
        """
        assert self.lora_A is not None
        assert self.lora_B is not None
        ratio = self.norm_ratio().item() if ratio is None else ratio
        if 0 < ratio < math.inf:
            b, a = self.lora_B.double(), self.lora_A.double()
            (left, upper), (right, lower) = torch.linalg.qr(b), torch.linalg.qr(a.T)
            u, d, v = torch.linalg.svd(upper @ lower.T)
            self._set_factors_(left @ u, d, v @ right.T)
            take_from_rank_0_(self.lora_B.data, self.lora_A.data)
        return ratio

    def _set_factors_(self, left: Tensor, d: Tensor, right: Tensor) -> None:
        """B = U sqrt(D), A = sqrt(D) V^T, with signs that make each column's largest entry of U
        positive."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        root = d.sqrt() * column_signs(left)[0]
        self.lora_B.copy_(left * root)
        self.lora_A.copy_(root[:, None] * right)


class SLTrain(Method):
    """Linears of low rank plus sparse; embedding, head and norms as they are."""

    def adapt(self, model: nn.Module) -> None:
        """Replace target linears. They are drawn after all other weights, which stay unchanged."""
        sltrain = self.config.sltrain
        for name, entries in sltrain.entries(self.config).items():
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            linear = SLTrainLinear(dense, sltrain, entries=entries)
            spectral = dense.weight.detach() if sltrain.init == "spectral" else None
            linear.draw_(self.config.seed, name, dense=spectral)
            model.set_submodule(name, linear)

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Refactor B A of every target at multiples of `refactor_every`."""
        if not self.refactors(step):
            return {}
        linears = [linear for _, linear in self.targets(model)]
        balances = self.config.sltrain.refactor == "balance"
        ratios = read(*(linear.norm_ratio() for linear in linears)) if balances else []
        for linear, ratio in zip(linears, ratios, strict=False):
            linear.balance_(ratio)
        for linear in linears:
            for factor in (linear.lora_A, linear.lora_B):
                if factor is not None:
                    optimizer.state.pop(factor, None)
        metrics = {"refactor/count": float(step // (self.config.sltrain.refactor_every or 1))}
        return metrics | ({"refactor/norm_ratio": sum(ratios) / len(ratios)} if ratios else {})

    def refactors(self, step: int) -> bool:
        """Whether to refactor when `step` updates are complete; not at the end."""
        sltrain = self.config.sltrain
        every = sltrain.refactor_every if sltrain.r else None
        return every is not None and step % every == 0 and step < self.config.train.steps

    def targets(self, model: nn.Module) -> Iterator[tuple[str, SLTrainLinear]]:
        """(qualified name, module) of every linear that was replaced."""
        for name, module in model.named_modules():
            if isinstance(module, SLTrainLinear):
                yield name, module

    def base_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """(name, (out, in) matrix) of every block linear; S of a target."""
        for name in linear_shapes(self.config.model):
            linear: Any = model.get_submodule(name)
            sparse = isinstance(linear, SLTrainLinear)
            yield name, linear.sparse_weight() if sparse else linear.weight.detach()

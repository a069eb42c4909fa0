"""Which matrices of a run are measured, relative to what, and the metrics of them.

Rounding noise. Rounding a matrix to a dtype changes it by at most its eps / 2 times the Frobenius
norm of what was rounded. The noise floor is eps times that norm, which leaves a margin for
accumulation. A singular value below it may be rounding alone (Weyl's inequality): `numerical_rank`
and `condition_number` leave it out, and `noise_fraction` is the share of such values.
`condition_number_all` is the published measure, with noise: it is infinite where a matrix is
exactly singular, which its mean leaves out and `condition_number_all_infinite` counts.

Not for: functions of a single matrix (`spectra.py`), nor averages over seeds
(`experiments/stats.py`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from relora_core import graphs
from relora_core.config import RunConfig, linear_shapes
from relora_core.overlap import read_arrays
from relora_core.spectra import (
    concatenated,
    condition_number,
    effective_rank,
    heads,
    noise_floor,
    numerical_rank,
    product_singular_values,
    proportional_effective_rank,
    singular_values,
)

if TYPE_CHECKING:
    from relora_core.methods.base import Method


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval of the finite values; the ends are nan for a single value."""
    from scipy.special import stdtrit  # half a second, which a run without dynamics need not wait

    finite = [v for v in values if math.isfinite(v)]
    n = len(finite)
    if not n:
        return math.nan, math.nan, math.nan
    mean = math.fsum(finite) / n
    if n == 1:
        return mean, math.nan, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


@dataclass(kw_only=True, slots=True)
class Spectrum:
    """Singular values of one kind of matrix in several layers, or in their heads."""

    sigma: Tensor
    """(layers, k) or (layers, heads, k), k = min(shape)."""
    noise: Tensor
    """(layers,) or (layers, heads)."""
    layers: list[int]

    def values(self, *, d_inter: int) -> dict[str, Tensor]:
        """Every measure of each layer, (layers,): of heads the mean of those where it is finite."""
        size = self.sigma.shape[-1]
        with_noise = condition_number(self.sigma)
        infinite = with_noise.isinf().double()
        rank = numerical_rank(self.sigma, noise=self.noise)
        values = {
            "per": proportional_effective_rank(self.sigma, size=size),
            "per_d_inter": proportional_effective_rank(self.sigma, size=d_inter),
            "effective_rank": effective_rank(self.sigma),
            "condition_number": condition_number(self.sigma, noise=self.noise),
            "condition_number_all": torch.where(infinite > 0, math.nan, with_noise),
            "numerical_rank": rank,
            "noise_fraction": 1 - rank / size,
        }
        values = {name: v.nanmean(dim=-1) if v.ndim == 2 else v for name, v in values.items()}
        return values | {INFINITE: infinite.sum(dim=-1) if infinite.ndim == 2 else infinite}


INFINITE = "condition_number_all_infinite"
"""How many matrices `condition_number_all` leaves out as exactly singular."""
INTERVALS = ("per", "condition_number")
"""Measures with an interval; per_d_inter and effective_rank are `per` times a constant."""


def summary(values: dict[str, Tensor]) -> dict[str, float]:
    """Means over layers, with intervals; of `INFINITE` the sum.

    Measures that are undefined in every layer are left out.
    """
    metrics = {}
    for name, value in values.items():
        if name == INFINITE:
            metrics[name] = value.sum().item()
            continue
        mean, low, high = mean_interval(value.tolist())
        metrics[name] = mean
        if name in INTERVALS:
            metrics |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def table(
    values: dict[str, Tensor], *, what: str, kind: str, layers: list[int]
) -> list[dict[str, Any]]:
    """A row per layer; undefined and infinite values are None (`INFINITE` counts the latter)."""
    rows = []
    for index, layer in enumerate(layers):
        numbers = {name: value[index].item() for name, value in values.items()}
        finite = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        rows.append({"what": what, "kind": kind, "layer": layer, **finite})
    return rows


class GradientTap:
    """dL/dW_eff of linears, summed over the passes while it is open.

    From x and dL/dy of y = W_eff x alone, so the same for every method; dropout on an adapter's
    input is not part of W_eff. Training stays the same, bit for bit where blocks are not compiled:
    a step with measured gradients runs them without (`graphs.without`), which rounds otherwise.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self.gradients: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Forget earlier gradients and sum those of the passes inside."""
        self.gradients = {}
        handles = [
            module.register_forward_hook(functools.partial(self._on_forward, name))
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        x = args[0].detach()
        y.register_hook(lambda gradient: self._add(name, gradient, x))

    def _add(self, name: str, gradient: Tensor, x: Tensor) -> None:
        # (B, T, out), (B, T, in) -> (out, in); in float32 also where autocast made them bf16
        product = gradient.detach().flatten(0, -2).float().mT @ x.flatten(0, -2).float()
        sum_so_far = self.gradients.get(name)
        self.gradients[name] = product if sum_so_far is None else sum_so_far + product


@dataclass(kw_only=True, slots=True)
class Matrices:
    """Matrices by name, and what was rounded to which dtype (`noise_floor`)."""

    values: dict[str, Tensor]
    reference: dict[str, Tensor]
    dtype: torch.dtype

    def stack(self, names: dict[int, str]) -> tuple[Tensor, Tensor, list[int]]:
        """Values and references (L, m, n) of the layers with a matrix, and these layers."""
        layers = [layer for layer, name in names.items() if name in self.values]
        there = [names[layer] for layer in layers]
        values = torch.stack([self.values[name] for name in there])
        return values, torch.stack([self.reference[name] for name in there]), layers


class Recorder:
    """Measures what `config.dynamics` names, and keeps the weights that updates are relative to.

    The initial weights are those of the given model, drawn from the seed again at each attempt:
    they need no disk. The weights after the newest restart are part of a checkpoint.
    """

    def __init__(self, config: RunConfig, *, model: nn.Module, method: Method) -> None:
        self.config, self.model, self.method = config, model, method
        self.what = list(dict.fromkeys(config.dynamics.what))
        self.kinds = list(dict.fromkeys(config.dynamics.kinds))
        wanted = {"v_proj", "o_proj"} if "ov" in self.kinds else set()
        wanted |= set(self.kinds)
        names = [n for n in linear_shapes(config.model) if n.rpartition(".")[2] in wanted]
        self._names = names
        tapped = names if "gradient" in self.what else []
        self._tap = GradientTap({name: model.get_submodule(name) for name in tapped})
        on = config.dynamics.every_steps is not None
        self._initial = self._copy() if on and "update_total" in self.what else {}
        self._restarted = self._copy() if on and "update_restart" in self.what else {}

    def _select(self, weights: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights if name in self._names}

    def _copy(self) -> dict[str, Tensor]:
        chosen = self._select(self.method.effective_weights(self.model))
        return {name: weight.detach().clone() for name, weight in chosen.items()}

    def due(self, step: int) -> bool:
        """Whether to measure when `step` updates are complete."""
        every = self.config.dynamics.every_steps
        return every is not None and step % every == 0

    def gradients(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward passes of the update that completes `step`."""
        wanted = self.due(step) and "gradient" in self.what
        return self._tapped() if wanted else contextlib.nullcontext()

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        with self._tap.open(), graphs.without(self.model):
            yield

    def after_restart(self) -> None:
        """From now on measure `update_restart` relative to the current weights."""
        if self._restarted:
            self._restarted = self._copy()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the effective weights after the newest restart."""
        return self._restarted

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`. Copies: on a CPU the given tensors are the checkpoint's file,
        and NFS removes no folder of which a file is in use."""
        for name, weight in state.items():
            self._restarted[name].copy_(weight)

    def average_gradients_(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Mean over ranks of each rank's gradients; every rank calls it."""
        self._tap.gradients = {n: mean(g) for n, g in self._tap.gradients.items()}

    def measure(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics `dynamics/<what>/<kind>/<measure>` and the table's rows; draws no random number.

        Gradients are those of the newest update, so none at step 0. Kinds without such a matrix,
        like the product BA of a full-rank method, are left out.
        """
        metrics: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        spectra = {what: self.spectra(what) for what in self.what}
        _move_to_host([spectrum for kinds in spectra.values() for spectrum in kinds.values()])
        for what in self.what:
            for kind, spectrum in spectra[what].items():
                values = spectrum.values(d_inter=self.config.model.d_ff)
                means = summary(values)
                metrics |= {f"dynamics/{what}/{kind}/{name}": v for name, v in means.items()}
                rows += table(values, what=what, kind=kind, layers=spectrum.layers)
        self._tap.gradients = {}
        return metrics, rows

    def spectra(self, what: str) -> dict[str, Spectrum]:
        """Kind -> singular values of the matrices `what` as they are now."""
        weights = self._select(self.method.effective_weights(self.model))
        matrices = self._matrices(what, weights)
        spectra: dict[str, Spectrum] = {}
        for kind in self.kinds:
            if kind == "ov":
                spectra |= self._circuits(what, matrices, weights)
            elif any(name in matrices.values for name in self._of_kind(kind).values()):
                values, reference, layers = matrices.stack(self._of_kind(kind))
                noise = noise_floor(_norm(reference), dtype=matrices.dtype)
                sigma = singular_values(values)
                spectra[kind] = Spectrum(sigma=sigma, noise=noise, layers=layers)
        return spectra

    def _of_kind(self, kind: str) -> dict[int, str]:
        names = [name for name in self._names if name.endswith(f".{kind}")]
        return {int(name.split(".")[1]): name for name in names}

    def _matrices(self, what: str, weights: dict[str, Tensor]) -> Matrices:
        precision, base = self.config.train.precision, self.method.base_dtype
        compute = torch.bfloat16 if precision == "bf16" else base
        match what:
            case "weight":
                values, dtype = weights, torch.float32
            case "base":
                values = self._select(self.method.base_weights(self.model))
                dtype = torch.float32
            case "gradient":
                values = self._tap.gradients
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            case "update_proxy":
                factors = self.method.adapter_factors(self.model)
                products = ((n, (b.to(compute) @ a.to(compute)).float()) for n, b, a in factors)
                values, dtype = self._select(products), compute
            case _:
                since = self._initial if what == "update_total" else self._restarted
                values = {name: weight - since[name] for name, weight in weights.items()}
                return Matrices(values=values, reference=weights, dtype=base)
        return Matrices(values=values, reference=values, dtype=dtype)

    def _circuits(
        self, what: str, matrices: Matrices, weights: dict[str, Tensor]
    ) -> dict[str, Spectrum]:
        """The OV circuit of weights; of gradients and updates its first-order change, O dV + dO V.

        `ov_head` is O_h V_h, (d, d), and `ov` all heads side by side. `vo_head` is V_h O_h,
        (hd, hd), and `vo` all heads side by side, as published: it has the same eigenvalues other
        than 0, but not the same singular values.
        """
        v_names, o_names = self._of_kind("v_proj"), self._of_kind("o_proj")
        layers = [i for i in v_names if {v_names[i], o_names[i]} & set(matrices.values)]
        if not layers:
            return {}

        def stacked(of: dict[str, Tensor], names: dict[int, str]) -> Tensor:
            zeros = torch.zeros_like(weights[names[layers[0]]])  # where only the other has a change
            return torch.stack([of.get(names[i], zeros).double() for i in layers])

        def both(of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            n_heads = self.config.model.n_heads
            return heads(stacked(of, v_names), stacked(of, o_names), n_heads=n_heads)

        dv, do = both(matrices.values)
        itself = what in ("weight", "base")
        v, o = (dv, do) if itself else both(weights)
        v_rounded, o_rounded = both(matrices.reference)
        # The error of a product is at most each factor's error times the other factor's norm.
        norm = _norm(o) * _norm(v_rounded) + _norm(o_rounded) * _norm(v)
        per_head = noise_floor(norm, dtype=matrices.dtype)  # (L, H)
        per_layer = per_head.square().sum(dim=-1).sqrt()  # (L,)
        left = o if itself else torch.cat((o, do), dim=-1)  # (L, H, d, hd or 2 hd)
        right = v if itself else torch.cat((dv, v), dim=-2)  # (L, H, hd or 2 hd, d)
        spectra = {
            "ov_head": (product_singular_values(left, right), per_head),
            "ov": (singular_values(concatenated(left, right)), per_layer),
        }
        if itself:
            vo = v @ o  # (L, H, hd, hd)
            row = vo.movedim(1, -2).flatten(-2)  # (L, hd, H * hd)
            spectra |= {
                "vo_head": (singular_values(vo), per_head),
                "vo": (singular_values(row), per_layer),
            }
        return {k: Spectrum(sigma=s, noise=n, layers=layers) for k, (s, n) in spectra.items()}


def _move_to_host(spectra: list[Spectrum]) -> None:
    """Singular values and noise floors of them all, in one copy: dozens of measures read them."""
    arrays = read_arrays([array for s in spectra for array in (s.sigma, s.noise)])
    for spectrum, sigma, noise in zip(spectra, arrays[::2], arrays[1::2], strict=True):
        spectrum.sigma, spectrum.noise = sigma, noise


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norms, (..., m, n) -> (...), in float64."""
    return torch.linalg.matrix_norm(matrices.double())

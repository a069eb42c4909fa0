"""Singular values of matrices, and the ranks and condition numbers that follow from them.

Pure functions. Not for: which matrices are measured, and when (`dynamics.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def singular_values(matrices: Tensor) -> Tensor:
    """(..., m, n) -> (..., min(m, n)) in float64, descending; float32 would lose small ones.

    nan for a matrix that is not finite: measuring must not stop a run that diverges.
    """
    matrices = matrices.detach().double()
    finite = matrices.isfinite().all(dim=-1).all(dim=-1)[..., None]
    sigma = _each(_sigma, torch.where(finite[..., None], matrices, 0.0))
    return torch.where(finite, sigma, math.nan)


def _sigma(matrices: Tensor) -> Tensor:
    """Makes an oblong matrix square first, which is as accurate and takes half the time."""
    rows, columns = matrices.shape[-2:]
    if rows != columns:
        matrices = _triangle(matrices if rows > columns else matrices.mT)
    return torch.linalg.svdvals(matrices)


def _triangle(matrices: Tensor) -> Tensor:
    """R of a QR decomposition, (..., m, n) -> (..., min(m, n), n)."""
    return torch.linalg.qr(matrices, mode="r").R


def _each(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """`function` of every matrix (..., m, n), several at a time with one thread each.

    A decomposition of this size gains a third from a second thread; two at once gain more.
    """
    shape = matrices.shape
    threads = torch.get_num_threads() if matrices.device.type == "cpu" else 1
    if threads == 1 or matrices.ndim == 2:
        return function(matrices)
    one = functools.partial(torch.set_num_threads, 1)  # of the pool's threads, not of this one
    with ThreadPoolExecutor(threads, initializer=one) as pool:
        parts = list(pool.map(function, matrices.flatten(0, -3).chunk(threads)))
    return torch.cat(parts).unflatten(0, shape[:-2])


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Those of left @ right, (..., m, k) and (..., k, n) -> (..., min(m, n)), without forming it.

    At most k are not zero; they come from a product of two triangles, which keeps the exact zeros.
    """
    outer = min(left.shape[-2], right.shape[-1])
    r_left = _each(_triangle, left.double())
    r_right = _each(_triangle, right.double().mT)
    sigma = singular_values(r_left @ r_right.mT)[..., :outer]
    return torch.nn.functional.pad(sigma, (0, outer - sigma.shape[-1]))


def effective_rank(sigma: Tensor) -> Tensor:
    """exp(-sum p ln p) with p = sigma / sum(sigma) (Roy and Vetterli 2007): (..., k) -> (...).

    Exact zeros add nothing (0 ln 0 = 0); a zero matrix has effective rank 0.
    """
    total = sigma.sum(dim=-1, keepdim=True)
    p = sigma / torch.where(total == 0, 1.0, total)
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    return torch.where(total[..., 0] == 0, 0.0, entropy.exp())


def proportional_effective_rank(sigma: Tensor, *, size: int) -> Tensor:
    """`effective_rank` / size: min(shape) in the published code, d_inter in the paper's text."""
    return effective_rank(sigma) / size


def noise_floor(reference_norm: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Below this a singular value may be rounding: eps times the norm of what was rounded.

    What was rounded is the matrix itself or, for a difference W - W_0, the larger W. For float32
    and coarser dtypes: float64 is the SVD's own precision.
    """
    return torch.finfo(dtype).eps * reference_norm.double()


def numerical_rank(sigma: Tensor, *, noise: Tensor) -> Tensor:
    """Number of singular values (..., k) above their matrix's noise floor (...), in float64.

    A zero matrix has none; nan for a matrix that is not finite.
    """
    rank = (sigma > noise[..., None]).sum(dim=-1)
    return torch.where(sigma.isnan().any(dim=-1), math.nan, rank.double())


def condition_number(sigma: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Largest over smallest singular value: (..., k) -> (...). Singular: inf. Zero matrix: nan.

    With `noise` (...) over the values above it only: finite, or nan where no value is above.
    """
    if noise is None:
        return sigma[..., 0] / sigma[..., -1]
    rank = numerical_rank(sigma, noise=noise).nan_to_num(0.0)
    smallest = sigma.gather(-1, (rank.long() - 1).clamp(min=0)[..., None])[..., 0]
    return torch.where(rank > 0, sigma[..., 0] / smallest, math.nan)


def heads(v: Tensor, o: Tensor, *, n_heads: int) -> tuple[Tensor, Tensor]:
    """V_h (L, H, hd, d) and O_h (L, H, d, hd) of v_proj (L, kv * hd, d) and o_proj (L, d, H * hd).

    Query heads that share a value head repeat it.
    """
    head_dim = o.shape[-1] // n_heads
    per_value = v.unflatten(-2, (-1, head_dim))
    per_head = per_value.repeat_interleave(n_heads // per_value.shape[1], dim=1)
    return per_head, o.unflatten(-1, (n_heads, head_dim)).movedim(-2, 1)


def column_signs(matrix: Tensor) -> Tensor:
    """Sign of the largest entry of each column, (m, n) -> (1, n): what an SVD leaves open."""
    return matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True)).sign()


def concatenated(left: Tensor, right: Tensor) -> Tensor:
    """Matrix (L, m, H * k') with the singular values of [left_1 right_1, ..., left_H right_H].

    left (L, H, m, k), right (L, H, k, n): an orthonormal basis of each right_h is left out.
    """
    r_right = _each(_triangle, right.double().mT)  # (L, H, k', k)
    return (left.double() @ r_right.mT).movedim(1, -2).flatten(-2)

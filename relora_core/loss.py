"""The head's loss without the full (tokens, vocabulary) logits, and the log-probs that evals need.

At d_model 96 and 50,304 ids the head is most of the work and nearly all of the memory, so logits
are made for a few rows at a time, and the gradient of a chunk is taken while its logits are still
there. `torch.nn.functional.linear_cross_entropy` of torch 2.13 is not used: its scalar loss
accumulates in the input's type and is wrong in bfloat16 (8.00 where float64 says 10.85).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 128 * 50304, "cuda": 8192 * 50304}
"""Logits alive at a time: 26 MB stay near the CPU's caches; a GPU wants larger matmuls."""

LOG_PROB_BLOCK = {"cpu": (1024, 512), "cuda": (8192, 50304)}
"""Rows and columns of logits alive at a time where no gradient is wanted."""


def _chunk_rows(weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // weight.shape[0])


@contextlib.contextmanager
def _reduced_matmuls(enabled: bool) -> Iterator[None]:
    """bf16 (CPU) or TF32 (CUDA) products with float32 storage and sums, for the head alone."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad: bool) -> Tensor:
        reduced = torch.is_autocast_enabled(hidden.device.type)
        rows, total = _chunk_rows(weight), hidden.shape[0]
        w = weight.detach().float()
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if grad else None
        d_weight = torch.zeros_like(w) if grad and weight.requires_grad else None
        # float64: thousands of float32 terms would lose the last digits of the mean.
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), _reduced_matmuls(reduced):
            for start in range(0, total, rows):
                h, y = hidden[start : start + rows].float(), targets[start : start + rows]
                logits = h @ w.T
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                picked = logits.gather(1, y[:, None])
                loss += (normaliser - picked).double().sum()
                if d_hidden is None:
                    continue
                error = logits.sub_(normaliser).exp_()  # softmax, in place of the logits
                error.scatter_add_(1, y[:, None], torch.full_like(picked, -1.0))
                error.div_(total)
                torch.mm(error, w, out=d_hidden[start : start + rows])
                if d_weight is not None:
                    d_weight.addmm_(error.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.types = hidden.dtype, weight.dtype
        return (loss / total).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        scale = grads[0]
        d_weight = None if d_weight is None else (d_weight * scale).to(weight_type)
        return (d_hidden * scale).to(hidden_type), d_weight, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N of -log softmax(hidden @ weight.T)[targets], in nats: a float32 scalar.

    hidden (N, C), weight (V, C), targets (N,) int64. Logits, softmax and gradients are float32;
    under autocast the matmuls take bf16 inputs (relative gradient error about 1e-4).
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, needs_grad)  # type: ignore[assignment]
    return loss


@torch.no_grad()
def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weight.T)[rows, targets]: (N, C), (V, C), (M,), (M,) -> (M,) float32.

    `rows` may name a row of `hidden` several times; by default each has one target. A bf16 `weight`
    asks for matmuls in bf16; sums and exponentials are float32 or wider all the same.
    """
    normaliser = _log_normalisers(hidden, weight)
    own = hidden if rows is None else hidden[rows]
    picked = (own.float() * weight[targets].float()).sum(dim=1)
    return picked - (normaliser if rows is None else normaliser[rows])


def _log_normalisers(hidden: Tensor, weight: Tensor) -> Tensor:
    """log sum exp(hidden @ weight.T) over the vocabulary: (N,) float32.

    Blocks of logits are summed up while they are in the cache: no row of V logits ever exists. On a
    CPU exp2 takes 0.4 of the time of exp, and no pass looks for the largest logit: rows that
    overflow without, which a trained model hardly has, are computed again.
    """
    rows, columns = LOG_PROB_BLOCK.get(hidden.device.type, LOG_PROB_BLOCK["cpu"])
    out = torch.empty(hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            own = hidden[start : start + rows].float() * math.log2(math.e)
            total = torch.zeros(len(own), dtype=torch.float64, device=own.device)
            for block in _logit_blocks(own, weight, columns=columns):
                total += block.exp2_().sum(dim=1)
            found = total.log().float()
            wide = ~((total > 1e-30) & (total < math.inf))
            if wide.any():
                blocks = _logit_blocks(own[wide], weight, columns=columns)
                parts = [(block * math.log(2)).logsumexp(dim=1) for block in blocks]
                found[wide] = torch.stack(parts).logsumexp(dim=0)
            out[start : start + rows] = found
    return out


def _logit_blocks(hidden: Tensor, weight: Tensor, *, columns: int) -> Iterator[Tensor]:
    hidden = hidden.to(weight.dtype)
    for first in range(0, weight.shape[0], columns):
        yield (hidden @ weight[first : first + columns].T).float()
